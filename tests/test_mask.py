"""A learned mask keeps the slots that contain the label, and is evaluated on other images."""

import json
from itertools import product

import numpy as np
import pytest
import torch

from dino_sparo.__main__ import main
from dino_sparo.slots.mask import accuracy, class_means, learn_mask, masked_cosines, spread

CPU = torch.device("cpu")


def planted(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Ten slots of four numbers, all far off zero; only slots 3 and 7, by two numbers each, tell the four
    classes, and the others vary three times as much."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count)
    parts = 4 + 3 * rng.normal(size=(count, 10, 4))
    corners = 1.5 * np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]])
    for slot in (3, 7):
        parts[:, slot] = 4 + rng.normal(size=(count, 4))
        parts[:, slot, :2] += corners[labels]
    return parts.reshape(count, 40).astype(np.float16), labels


def learn(features, labels, means, **changes):
    settings = {"num_masked": 10, "epochs": 20, "lr": 0.02, "batch_size": 250, "seed": 0} | changes
    return learn_mask(features, labels, means, **settings)


@pytest.mark.parametrize(
    ("num_masked", "least", "most"),
    [  # the quiet numbers of the planted slots may stay
        (10, {3, 7}, {3, 7}),
        (40, {12, 13, 28, 29}, {12, 13, 14, 15, 28, 29, 30, 31}),
    ],
)
def test_the_mask_keeps_what_tells_the_classes(num_masked, least, most):
    (train, train_labels), (test, test_labels) = planted(3000, 0), planted(1000, 1)
    means = class_means(train, train_labels, 4, CPU)
    learned = learn(train, train_labels, means, num_masked=num_masked)
    assert least <= set(np.flatnonzero(learned.mask > 0.5).tolist()) <= most
    assert learned.mask.min() >= 0 and learned.mask.max() <= 1
    assert learned.last_loss < learned.first_loss and learned.scale >= 100
    initial = accuracy(test, test_labels, means, torch.ones(40))
    assert accuracy(test, test_labels, means, spread(learned.mask, 40)) > initial + 2


def test_one_step_is_sgd_on_the_formula():
    train, labels = planted(60, 0)
    means = class_means(train, labels, 4, CPU)
    learned = learn(train, labels, means, epochs=1, batch_size=60, lr=0.001)
    theta = torch.zeros(10, requires_grad=True)
    alpha = torch.tensor(np.log(100.0), dtype=torch.float64, requires_grad=True)
    mask = torch.sigmoid(alpha.exp() / 4 * theta).repeat_interleave(4).float()
    y = torch.from_numpy(train).float()
    cosines = torch.nn.functional.cosine_similarity((mask * y)[:, None], (mask * means)[None], dim=2)
    loss = torch.nn.functional.cross_entropy(alpha.exp() * cosines.double(), torch.from_numpy(labels))
    loss.backward()
    with torch.no_grad():
        scale = max(100.0, float((alpha - 0.001 * alpha.grad).exp()))
        stepped = torch.sigmoid(scale / 4 * (theta - 0.001 * theta.grad))
    torch.testing.assert_close(learned.mask, stepped, rtol=1e-4, atol=1e-5)
    assert learned.scale == pytest.approx(scale, abs=1e-4) and scale > 100.001
    assert learned.first_loss == learned.last_loss == pytest.approx(loss.item(), rel=1e-4)


def test_cosines_means_and_order():
    features = np.array([[3, 0, 9], [1, 2, 9], [0, 5, -9]], dtype=np.float32)
    means = class_means(features, np.array([0, 0, 1]), 3, CPU)
    assert means.tolist() == [[2, 1, 9], [0, 5, -9], [0, 0, 0]]
    mask = torch.tensor([1.0, 0.5, 0.0])
    cosine = masked_cosines(torch.tensor([[1.0, 2.0, 7.0]]), means[:2], mask)
    assert cosine.tolist() == [pytest.approx([2.5 / np.sqrt(2 * 4.25), 1 / np.sqrt(2)])]
    assert accuracy(features, np.array([0, 1, 1]), means[:2], mask) == pytest.approx(200 / 3)
    assert spread(torch.tensor([1.0, 2.0]), 4).tolist() == [1, 1, 2, 2]


def test_the_seed_decides_the_order():
    train, labels = planted(120, 0)
    means = class_means(train, labels, 4, CPU)
    few = {"epochs": 2, "batch_size": 50}
    one, same, other = (learn(train, labels, means, seed=seed, **few).mask for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_the_command_with_transfer_and_control(slot_runs, tmp_path, capsys):
    run, control, data = (str(slot_runs[name]) for name in ("sparo", "cls", "data"))
    more = ["--epochs=5", "--transfer", f"second={slot_runs['other']}", "--control", control]
    machine = [f"--out={tmp_path}", "--num-workers=0", "--device=cpu"]
    assert main(["slots", "mask", run, "--data.path", data, *more, *machine]) == 0
    found = json.loads((tmp_path / "mask" / "mask.json").read_text())
    assert [(row["encoder"], row["over"], row["test_set"]) for row in found["rows"]] == list(
        product(("sparo", "control (cls)"), ("slots", "dimensions"), ("val", "second"))
    )
    assert [len(mask) for mask in found["masks"].values()] == [3, 12, 2, 16]
    for row in found["rows"]:
        mask = np.array(found["masks"][f"{row['encoder']} {row['over']}"])
        assert row["kept"] == pytest.approx(np.mean(mask > 0.5))
        if row["initial"]:
            change = 100 * (row["masked"] / row["initial"] - 1)
            assert row["relative_change"] == pytest.approx(change, abs=1e-9)
    first, second = found["rows"][:2]
    assert first["initial"] * 12 / 100 == pytest.approx(round(first["initial"] * 12 / 100))
    assert second["initial"] * 8 / 100 == pytest.approx(round(second["initial"] * 8 / 100))
    said = capsys.readouterr().out
    row = ["sparo", "slots", "second", f"{second['initial']:.2f}", f"{second['masked']:.2f}"]
    assert any(line.split()[:5] == row for line in said.splitlines())
    assert "16 dimensions cannot be split into 3 equal parts; it has 2" in said
    assert (tmp_path / "mask" / "mask.png").stat().st_size > 10_000
