"""Parts of an encoding against k-NN and ridge regression of the same columns alone."""

import numpy as np
import pytest
import torch

from dino_sparo.evaluation.knn import NoDirectionError, knn_classify
from dino_sparo.slots.parts import (
    RIDGE,
    Picked,
    fit_probe,
    knn_accuracies,
    moments,
    parts_of,
    probe_accuracies,
)

CPU = torch.device("cpu")
PARTS, CLASSES = 4, 3
EACH = [[part] for part in range(PARTS)]


@pytest.fixture(scope="module")
def images():
    """Train and test features (n, 12) of very different scales, off zero, and labels that they hint at."""
    rng = np.random.default_rng(0)
    scale = rng.uniform(0.1, 5, 12)
    centres = rng.normal(size=(CLASSES, 12))
    made = []
    for count in (150, 70):
        labels = rng.integers(0, CLASSES, count)
        features = (rng.normal(size=(count, 12)) + 0.7 * centres[labels]) * scale + 1
        made += [features.astype(np.float32), labels]
    return made


def columns(subset):
    return np.concatenate([np.arange(3 * part, 3 * part + 3) for part in subset])


def test_parts_are_neighboring_numbers():
    assert parts_of(torch.arange(12)[None], 4)[0].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    with pytest.raises(ValueError, match="num_parts is 5, expected a divisor of the 12 numbers"):
        parts_of(torch.zeros(1, 12), 5)


@pytest.mark.parametrize("chunks", [{}, {"train_chunk": 7, "test_chunk": 11}])
def test_knn_of_parts_is_that_of_their_columns(images, chunks):
    train, train_labels, test, test_labels = images
    subsets = [*EACH, [0, 2], [1, 2, 3], list(range(PARTS))]
    found = knn_accuracies(
        *images, num_parts=PARTS, subsets=subsets, k=10, num_classes=CLASSES, device=CPU, **chunks
    )
    alone = [
        knn_classify(train[:, c], train_labels, test[:, c], test_labels, k=10)[10].top1
        for c in map(columns, subsets)
    ]
    assert found == pytest.approx(alone, abs=1e-9)
    assert found[-1] == knn_classify(*images, k=10)[10].top1
    assert len(set(found)) > 3  # parts differ, so that a mix-up would show


def test_knn_names_the_image_that_is_zero_in_a_part(images):
    train, train_labels, test, test_labels = images
    train = train.copy()
    train[101, columns([2])] = 0
    with pytest.raises(NoDirectionError) as told:
        knn_accuracies(
            *(train, train_labels, test, test_labels),
            num_parts=PARTS,
            subsets=EACH,
            k=3,
            num_classes=CLASSES,
            device=CPU,
            train_chunk=20,
        )
    assert (told.value.side, told.value.number, told.value.kind) == ("train", 101, "zero")


@pytest.mark.parametrize("subset", [[1], [0, 3], [0, 1, 2, 3]])
def test_probe_of_parts_is_that_trained_alone(images, subset):
    train, train_labels, test, test_labels = images
    sums = moments(train, train_labels, num_classes=CLASSES, device=CPU, chunk=13)
    probe = fit_probe(sums, PARTS, subset)
    # Ridge regression as least squares with further rows, on these columns only.
    seen = train[:, columns(subset)].astype(np.float64)
    mean, std = seen.mean(axis=0), seen.std(axis=0)
    targets = np.eye(CLASSES)[train_labels]
    rows = np.concatenate([(seen - mean) / std, np.sqrt(RIDGE * len(seen)) * np.eye(len(mean))])
    wanted = np.concatenate([targets - targets.mean(axis=0), np.zeros((len(mean), CLASSES))])
    weight = np.linalg.lstsq(rows, wanted, rcond=None)[0] / std[:, None]
    bias = targets.mean(axis=0) - mean @ weight
    torch.testing.assert_close(probe.weight, torch.from_numpy(weight).float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(probe.bias, torch.from_numpy(bias).float(), rtol=1e-4, atol=1e-6)
    right = (test[:, columns(subset)] @ weight + bias).argmax(axis=1) == test_labels
    found = probe_accuracies([probe], test, test_labels, num_parts=PARTS, device=CPU, chunk=9)
    assert found == [pytest.approx(100 * right.mean())]


def test_sums_of_two_sets_of_images_are_those_of_all(images):
    train, labels, *_ = images
    rows = np.arange(len(train))
    pieces = [
        moments(Picked(train, some), labels[some], num_classes=CLASSES, device=CPU)
        for some in (rows[::3], np.setdiff1d(rows, rows[::3]))
    ]
    whole = fit_probe(moments(train, labels, num_classes=CLASSES, device=CPU), PARTS, [0, 1])
    torch.testing.assert_close(fit_probe(pieces[0] + pieces[1], PARTS, [0, 1]).weight, whole.weight)


def test_a_constant_number_gets_no_weight(images):
    train, labels, *_ = images
    train = train.copy()
    train[:, 4] = 0.1
    probe = fit_probe(moments(train, labels, num_classes=CLASSES, device=CPU), PARTS, [1])
    assert (probe.weight[1] == 0).all() and (probe.weight[[0, 2]] != 0).all()
