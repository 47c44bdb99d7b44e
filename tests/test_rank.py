"""Ranking finds planted slots without using val images; parts agree with k-NN and ridge regression on the
same columns."""

import json

import numpy as np
import pytest
import torch

from dino_sparo.__main__ import main
from dino_sparo.evaluation.knn import NoDirectionError, knn_classify
from dino_sparo.slots.parts import (
    RIDGE,
    columns_of,
    fit_probe,
    knn_accuracies,
    moments,
    most_parts,
    probe_accuracies,
)
from dino_sparo.slots.rank import rank_parts, sizes, split_by_class

CPU = torch.device("cpu")
PLANTED = {3, 7}
PARTS, CLASSES = 4, 3


def planted(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Ten slots of four dimensions: slot 3 distinguishes two pairs of the four classes, slot 7 the others."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count)
    parts = rng.normal(size=(count, 10, 4))
    parts[:, 3, 0] += 4 * (labels // 2) - 2
    parts[:, 7, 0] += 4 * (labels % 2) - 2
    return parts.reshape(count, 40).astype(np.float32), labels


def rank(train, train_labels, test, test_labels):
    split = split_by_class(train_labels, 0.25, seed=0)
    about = {"num_parts": 10, "k": 10, "num_classes": 4, "device": CPU}
    return rank_parts(train, train_labels, test, test_labels, split, **about)


@pytest.fixture(scope="module")
def ranked():
    return rank(*planted(400, 0), *planted(200, 1))


def test_planted_slots_come_first(ranked):
    for way, order in ranked["orders"].items():
        assert set(order[:2]) == PLANTED and sorted(order) == list(range(10))
        one, both, *_ = ranked["curve"][way]
        assert both["kept"] == 2 and both["knn"] > 90 and one["knn"] < 60  # each alone tells half
        assert both["knn"] > ranked["all"]["knn"]  # noise harms the vote
        assert both["linear"] > 90


def test_figures_are_those_of_the_whole_train_set(ranked):
    (train, train_labels), (test, test_labels) = planted(400, 0), planted(200, 1)
    every = knn_classify(train, train_labels, test, test_labels, k=10)[10].top1
    assert ranked["all"]["knn"] == every
    kept = ranked["orders"]["knn"][:5]
    some = columns_of(40, 10, sorted(kept))
    half = knn_classify(train[:, some], train_labels, test[:, some], test_labels, k=10)[10].top1
    assert (ranked["half"]["knn"]["kept"], ranked["half"]["knn"]["knn"]) == (5, half)
    sums = moments(train, train_labels, num_classes=4, device=CPU)
    for way, points in ranked["curve"].items():
        kept = [sorted(ranked["orders"][way][: at["kept"]]) for at in points]
        probes = [fit_probe(sums, columns_of(40, 10, parts)) for parts in kept]
        wanted = probe_accuracies(probes, test, test_labels)
        assert [at["linear"] for at in points] == wanted


def test_nothing_is_chosen_on_test_images(ranked):
    (train, train_labels), (test, test_labels) = planted(400, 0), planted(200, 1)
    other = rank(train, train_labels, test[::-1].copy(), (test_labels + 1) % 4)
    assert other["orders"] == ranked["orders"] and other["alone"] == ranked["alone"]
    assert other["all"]["knn"] < 30 < ranked["all"]["knn"]


def test_the_split_is_by_class_and_by_seed():
    labels = np.repeat([0, 1, 2, 3], [100, 10, 2, 1])
    split = split_by_class(labels, 0.2, seed=0)
    assert np.bincount(labels[split.select], minlength=4).tolist() == [20, 2, 1, 0]
    assert np.array_equal(np.sort(np.concatenate([split.fit, split.select])), np.arange(113))
    assert np.array_equal(split.select, split_by_class(labels, 0.2, seed=0).select)
    assert not np.array_equal(split.select, split_by_class(labels, 0.2, seed=1).select)


def test_sizes_and_parts():
    assert sizes(64) == [1, 2, 4, 8, 16, 32, 64]
    assert sizes(10) == [1, 2, 4, 5, 8, 10] and sizes(1) == [1]
    assert (most_parts(384, 64), most_parts(16, 3), most_parts(7, 3)) == (64, 2, 1)
    assert columns_of(12, 4, [2, 0]).tolist() == [6, 7, 8, 0, 1, 2]


def test_the_command_with_a_control(slot_runs, tmp_path, capsys):
    run, control, data = (str(slot_runs[name]) for name in ("sparo", "cls", "data"))
    machine = [f"--out={tmp_path}", "--num-workers=0", "--device=cpu"]
    assert main(["slots", "rank", run, "--data.path", data, "--k=3", "--control", control, *machine]) == 0
    found = json.loads((tmp_path / "rank" / "rank.json").read_text())
    assert (found["num_fit"], found["num_select"], found["num_test"]) == (39, 9, 12)
    own, other = found["encoders"]
    assert (own["name"], own["num_parts"], own["part_dim"]) == ("sparo", 3, 4)
    assert (other["name"], other["num_parts"], other["part_dim"]) == ("control (cls)", 2, 8)
    assert [at["kept"] for at in own["curve"]["knn"]] == [1, 2, 3]
    assert all(sorted(order) == [0, 1, 2] for order in own["orders"].values())
    said = capsys.readouterr().out
    assert "16 dimensions cannot be split into 3 equal parts; it has 2" in said
    assert "16 dimensions cannot be split into 3" in found["remarks"][0]
    assert any(line.split()[:2] == ["3", f"{own['all']['knn']:.2f}"] for line in said.splitlines())
    assert (tmp_path / "rank" / "curve.png").stat().st_size > 10_000
    assert (found["which"], found["control"]) == ("teacher", str(slot_runs["cls"]))


# --- Parts of an encoding


@pytest.fixture(scope="module")
def images():
    """Features (n, 12) with different scales and nonzero means, and labels that correlate with them."""
    rng = np.random.default_rng(0)
    scale = rng.uniform(0.1, 5, 12)
    centers = rng.normal(size=(CLASSES, 12))
    made = []
    for count in (150, 70):
        labels = rng.integers(0, CLASSES, count)
        features = (rng.normal(size=(count, 12)) + 0.7 * centers[labels]) * scale + 1
        made += [features.astype(np.float32), labels]
    return made


def columns(*parts):
    return columns_of(12, PARTS, parts)


@pytest.mark.parametrize("chunks", [{}, {"train_chunk": 7, "test_chunk": 11}])
def test_knn_of_parts_is_that_of_their_columns(images, chunks):
    train, train_labels, test, test_labels = images
    sets = [*map(columns, range(PARTS)), columns(0, 2), columns(1, 2, 3), columns(0, 1, 2, 3)]
    found = knn_accuracies(*images, columns=sets, k=10, num_classes=CLASSES, device=CPU, **chunks)
    alone = [
        knn_classify(train[:, some], train_labels, test[:, some], test_labels, k=10)[10].top1 for some in sets
    ]
    assert found == pytest.approx(alone, abs=1e-9)
    assert found[-1] == knn_classify(*images, k=10)[10].top1
    assert len(set(found)) > 3  # parts differ, so that a mix-up would show


def test_knn_names_the_image_that_is_zero_in_a_part(images):
    train, train_labels, test, test_labels = images
    train = train.copy()
    train[101, columns(2)] = 0
    about = {"columns": [*map(columns, range(PARTS))], "k": 3, "num_classes": CLASSES, "device": CPU}
    with pytest.raises(NoDirectionError) as told:
        knn_accuracies(train, train_labels, test, test_labels, **about, train_chunk=20)
    assert (told.value.side, told.value.number, told.value.kind) == ("train", 101, "zero")


@pytest.mark.parametrize("subset", [[1], [0, 3], [0, 1, 2, 3]])
def test_probe_of_parts_is_that_trained_alone(images, subset):
    train, train_labels, test, test_labels = images
    sums = moments(train, train_labels, num_classes=CLASSES, device=CPU, chunk=13)
    probe = fit_probe(sums, columns(*subset))
    # Ridge regression as least squares with further rows, on these columns only.
    seen = train[:, columns(*subset)].astype(np.float64)
    mean, std = seen.mean(axis=0), seen.std(axis=0)
    targets = np.eye(CLASSES)[train_labels]
    rows = np.concatenate([(seen - mean) / std, np.sqrt(RIDGE * len(seen)) * np.eye(len(mean))])
    wanted = np.concatenate([targets - targets.mean(axis=0), np.zeros((len(mean), CLASSES))])
    weight = np.linalg.lstsq(rows, wanted, rcond=None)[0] / std[:, None]
    bias = targets.mean(axis=0) - mean @ weight
    torch.testing.assert_close(probe.weight, torch.from_numpy(weight).float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(probe.bias, torch.from_numpy(bias).float(), rtol=1e-4, atol=1e-6)
    right = (test[:, columns(*subset)] @ weight + bias).argmax(axis=1) == test_labels
    found = probe_accuracies([probe], test, test_labels, chunk=9)
    assert found == [pytest.approx(100 * right.mean())]


def test_a_constant_number_gets_no_weight(images):
    train, labels, *_ = images
    train = train.copy()
    train[:, 4] = 0.1
    probe = fit_probe(moments(train, labels, num_classes=CLASSES, device=CPU), columns(1))
    assert (probe.weight[1] == 0).all() and (probe.weight[[0, 2]] != 0).all()
