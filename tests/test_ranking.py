"""Ranking finds planted slots, and never looks at the images that it reports on."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dino_sparo.__main__ import main
from dino_sparo.evaluation.knn import knn_classify
from dino_sparo.slots import rank as module
from dino_sparo.slots.parts import fit_probe, moments, most_parts, probe_accuracies
from dino_sparo.slots.rank import greedy_images, greedy_order, rank_parts, sizes, split_by_class
from tests.tiny import tiny_arguments, write_pictures

CPU = torch.device("cpu")
WITHOUT_SLOTS = {"model__readout__name": "cls"} | {
    f"model__readout__{key}": "null" for key in ("num_slots", "slot_dim", "key_dim", "group_size")
}
PLANTED = {3, 7}


def planted(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Ten slots of four numbers; of four classes slot 3 tells two pairs apart, slot 7 the two others."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count)
    parts = rng.normal(size=(count, 10, 4))
    parts[:, 3, 0] += 4 * (labels // 2) - 2
    parts[:, 7, 0] += 4 * (labels % 2) - 2
    return parts.reshape(count, 40).astype(np.float32), labels


def rank(train, train_labels, test, test_labels):
    split = split_by_class(train_labels, 0.25, seed=0)
    return rank_parts(
        *(train, train_labels, test, test_labels, split, split),
        num_parts=10,
        k=10,
        num_classes=4,
        device=CPU,
    )


@pytest.fixture(scope="module")
def ranked():
    return rank(*planted(400, 0), *planted(200, 1))


@pytest.mark.parametrize("way", ["knn", "linear", "greedy"])
def test_planted_slots_come_first(ranked, way):
    order = ranked["orders"][way]
    assert set(order[:2]) == PLANTED and sorted(order) == list(range(10))
    both = next(at for at in ranked["curve"][way] if at["kept"] == 2)
    assert both["knn"] > 90 and ranked["curve"][way][0]["knn"] < 60  # each alone tells half
    assert both["knn"] > ranked["all"]["knn"]  # noise harms the vote
    assert both["linear"] > 90


def test_figures_are_those_of_the_whole_train_set(ranked):
    (train, train_labels), (test, test_labels) = planted(400, 0), planted(200, 1)
    every = knn_classify(train, train_labels, test, test_labels, k=10)[10].top1
    assert ranked["all"]["knn"] == every
    kept = ranked["orders"]["greedy"][:5]
    columns = np.concatenate([np.arange(4 * part, 4 * part + 4) for part in sorted(kept)])
    half = knn_classify(train[:, columns], train_labels, test[:, columns], test_labels, k=10)[10].top1
    assert (ranked["half"]["greedy"]["kept"], ranked["half"]["greedy"]["knn"]) == (5, half)
    sums = moments(train, train_labels, num_classes=4, device=CPU)
    for way, points in ranked["curve"].items():
        probes = [fit_probe(sums, 10, sorted(ranked["orders"][way][: at["kept"]])) for at in points]
        wanted = probe_accuracies(probes, test, test_labels, num_parts=10, device=CPU)
        assert [at["linear"] for at in points] == wanted


def test_nothing_is_chosen_on_test_images(ranked):
    (train, train_labels), (test, test_labels) = planted(400, 0), planted(200, 1)
    other = rank(train, train_labels, test[::-1].copy(), (test_labels + 1) % 4)
    assert other["orders"] == ranked["orders"] and other["alone"] == ranked["alone"]
    assert other["all"]["knn"] < 30 < ranked["all"]["knn"]


def test_greedy_sees_through_a_copy():
    """Slot 5 repeats slot 3: alone it is as good, beside it worth nothing."""
    (train, train_labels), (test, test_labels) = planted(300, 0), planted(100, 1)
    train[:, 20:24], test[:, 20:24] = train[:, 12:16], test[:, 12:16]
    arrays = [torch.from_numpy(x) for x in (train, train_labels, test, test_labels)]
    arrays[0], arrays[2] = arrays[0].view(-1, 10, 4), arrays[2].view(-1, 10, 4)
    order = greedy_order(*arrays, k=10, num_classes=4, preferred=[3, 5, 7, 0, 1, 2, 4, 6, 8, 9])
    assert 7 in order[:2] and len(set(order[:2]) & {3, 5}) == 1


def test_greedy_steps_are_those_of_the_exact_knn():
    (train, train_labels), (test, test_labels) = planted(200, 2), planted(100, 3)
    arrays = [torch.from_numpy(x) for x in (train, train_labels, test, test_labels)]
    arrays[0], arrays[2] = arrays[0].view(-1, 10, 4), arrays[2].view(-1, 10, 4)
    order = greedy_order(*arrays, k=10, num_classes=4, preferred=range(10))
    for step in range(1, 5):

        def score(part, before=tuple(order[: step - 1])):
            sides = [x[:, [*before, part]].flatten(1) for x in (arrays[0], arrays[2])]
            return knn_classify(sides[0], train_labels, sides[1], test_labels, k=10)[10].top1

        scores = {part: score(part) for part in range(10) if part not in order[: step - 1]}
        assert scores[order[step - 1]] == max(scores.values())


def test_the_split_is_by_class_and_by_seed(monkeypatch):
    labels = np.repeat([0, 1, 2, 3], [100, 10, 2, 1])
    split = split_by_class(labels, 0.2, seed=0)
    assert np.bincount(labels[split.select], minlength=4).tolist() == [20, 2, 1, 0]
    assert np.array_equal(np.sort(np.concatenate([split.fit, split.select])), np.arange(113))
    assert np.array_equal(split.select, split_by_class(labels, 0.2, seed=0).select)
    assert not np.array_equal(split.select, split_by_class(labels, 0.2, seed=1).select)
    monkeypatch.setattr(module, "GREEDY_FIT", 30)
    few = greedy_images(labels, split, seed=0)
    assert 28 <= len(few.fit) <= 32 and set(few.fit) <= set(split.fit)
    assert few.select is split.select


def test_sizes_and_parts():
    assert sizes(64) == [1, 2, 4, 8, 16, 32, 64]
    assert sizes(10) == [1, 2, 4, 5, 8, 10] and sizes(1) == [1]
    assert (most_parts(384, 64), most_parts(16, 3), most_parts(7, 3)) == (64, 2, 1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Pictures of three classes, a run with three slots, and one without slots, 16 numbers wide."""
    folder = tmp_path_factory.mktemp("runs")
    write_pictures(folder / "data", 60, classes=3)
    common = {"optim__epochs": 1, "optim__global_batch_size": 24}
    slots = tiny_arguments(folder / "data", folder / "sparo", model__readout__num_slots=3, **common)
    assert main(["pretrain", *slots]) == 0
    plain = tiny_arguments(folder / "data", folder / "cls", **WITHOUT_SLOTS, **common)
    assert main(["pretrain", *plain]) == 0
    return {"data": folder / "data", "sparo": folder / "sparo", "cls": folder / "cls"}


def rank_program(runs: dict[str, Path], out: Path, *more: str, run: str = "sparo") -> int:
    command = ["slots", "rank", str(runs[run]), "--data.path", str(runs["data"]), "--out", str(out)]
    return main([*command, "--num-workers=0", "--device=cpu", *more])


def test_the_program_with_a_control(runs, tmp_path, capsys):
    assert rank_program(runs, tmp_path, "--k=3", "--control", str(runs["cls"])) == 0
    found = json.loads((tmp_path / "rank" / "rank.json").read_text())
    assert (found["num_fit"], found["num_select"], found["num_test"]) == (39, 9, 12)
    own, control = found["encoders"]
    assert (own["name"], own["num_parts"], own["part_dim"]) == ("sparo", 3, 4)
    assert (control["name"], control["num_parts"], control["part_dim"]) == ("control (cls)", 2, 8)
    assert [at["kept"] for at in own["curve"]["greedy"]] == [1, 2, 3]
    assert all(sorted(order) == [0, 1, 2] for order in own["orders"].values())
    said = capsys.readouterr().out
    assert "16 numbers cannot be cut into 3 equal parts, so it has 2" in said
    assert "16 numbers cannot be cut into 3" in found["remarks"][0]
    assert any(line.split()[:4] == ["|", "3", "|", f"{own['all']['knn']:.2f}"] for line in said.splitlines())
    assert (tmp_path / "rank" / "curve.png").stat().st_size > 10_000
    assert (found["which"], found["control"]) == ("teacher", str(runs["cls"]))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--k=40"], "k is 40, expected 1 to the 39 train images that are left to fit on"),
        (["--k=3", "--select-fraction=1"], "select_fraction is 1.0, expected above 0 and below 1"),
    ],
)
def test_mistakes(runs, tmp_path, capsys, more, said):
    assert rank_program(runs, tmp_path, *more) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "rank").exists()


def test_a_control_has_no_slots(runs, tmp_path, capsys):
    assert rank_program(runs, tmp_path, "--k=3", "--control", str(runs["sparo"])) == 2
    assert "has slots (read-out sparo), expected a run without" in capsys.readouterr().err


def test_no_slots_and_no_classes(runs, tmp_path, capsys):
    assert rank_program(runs, tmp_path, "--k=3", run="cls") == 2
    assert "has no slots (read-out cls)" in capsys.readouterr().err
    flat = runs | {"data": runs["data"] / "train" / "class0"}
    assert rank_program(flat, tmp_path, "--k=3") == 2
    assert "not in class folders" in capsys.readouterr().err
