"""`slots factors` finds the slot that contains a factor, and tests on pictures not used before."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dino_sparo.__main__ import main
from dino_sparo.data.shapes import FACTORS, draw_factors, shapes_source
from dino_sparo.slots import factors
from dino_sparo.slots.factors import NUM_VALUES, chance, factor_pictures, score_factors
from dino_sparo.slots.parts import columns_of, fit_discriminant, moments

CPU = torch.device("cpu")
SLOTS, WIDTH = 4, 6
NUM_PLANTED = {"color": 8, "size": 3}


def planted(count, seed):
    """Slot 2 contains only the color; one dimension of slot 1 grows with size; the rest is noise."""
    rng = np.random.default_rng(seed)
    values = {name: rng.integers(number, size=count) for name, number in NUM_PLANTED.items()}
    features = rng.normal(size=(count, SLOTS, WIDTH))
    colors = np.random.default_rng(0).normal(size=(8, WIDTH))
    features[:, 2] = colors[values["color"]] + 0.1 * features[:, 2]
    features[:, 1, 3] = values["size"] + 0.1 * features[:, 1, 3]
    return features.reshape(count, -1).astype(np.float32), values


def scores(train=None, test=None, num_values=NUM_PLANTED, num_parts=SLOTS):
    train, test = train or planted(600, seed=1), test or planted(300, seed=2)
    return score_factors(*train, *test, num_values=num_values, num_parts=num_parts, device=CPU)


def test_planted_factors_are_found_in_their_slots():
    alone, whole = scores()
    color, size = np.array(alone).T
    assert color[2] > 97 and (np.delete(color, 2) < 100 / 8 + 8).all()
    assert size[1] > 97 and (np.delete(size, 1) < 100 / 3 + 9).all()  # also the size between the others
    assert whole["color"] > 97 and whole["size"] > 97
    (as_one,), same = scores(num_parts=1)
    assert same == pytest.approx(whole) and as_one == list(same.values())


def test_the_ridge_is_the_one_that_fits_pictures_held_out(monkeypatch):
    rng = np.random.default_rng(0)
    values = rng.integers(2, size=600)
    features = (rng.normal(size=(600, 90)) + 0.25 * values[:, None]).astype(np.float32)
    # little more pictures to learn from than numbers
    train, test = ((features[rows], {"color": values[rows]}) for rows in (slice(120), slice(120, 600)))

    def score():
        return scores(train, test, {"color": 2}, num_parts=1)[1]["color"]

    chosen, found = score(), []
    for ridge in factors.RIDGES:
        monkeypatch.setattr(factors, "RIDGES", (ridge,))
        found.append(score())
    assert chosen == max(found) > min(found) + 5


def test_test_values_change_nothing_that_is_learnt():
    test, values = planted(300, seed=2)
    changed = {name: (number - 1) - values[name] for name, number in NUM_PLANTED.items()}
    alone, _ = scores(test=(test, changed))
    assert alone[2][0] < 3  # 8 colors, none of which is its own opposite


@pytest.mark.parametrize("subset", [[1], [2], [0, 3]])
def test_the_discriminant_is_that_of_the_formula(subset):
    features, values = planted(600, seed=1)
    probe = fit_discriminant(
        moments(features, values["color"], num_classes=8, device=CPU),
        columns_of(SLOTS * WIDTH, SLOTS, subset),
        ridge=0,
    )
    rows = features.reshape(-1, SLOTS, WIDTH)[:, subset].reshape(len(features), -1).astype(np.float64)
    labels = values["color"]
    means = np.stack([rows[labels == color].mean(axis=0) for color in range(8)])
    apart = rows - means[labels]
    precision = np.linalg.inv(apart.T @ apart / len(rows))
    shares = np.bincount(labels) / len(rows)
    expected = rows @ precision @ means.T - (means @ precision * means).sum(1) / 2 + np.log(shares)
    found = (torch.from_numpy(rows).float() @ probe.weight + probe.bias).numpy()
    difference = found - expected  # one constant for each picture is left
    assert np.abs(difference - difference.mean(axis=1, keepdims=True)).max() < 2e-3 * np.abs(expected).max()
    assert (found.argmax(1) == expected.argmax(1)).all()


def test_numbers_that_never_vary_and_values_that_never_occur_do_no_harm():
    features, values = planted(400, seed=1)
    features[:, 2 * WIDTH] = 5
    features[:, 2 * WIDTH + 1] = 0
    sums = moments(features, values["color"], num_classes=9, device=CPU)
    probe = fit_discriminant(sums, columns_of(SLOTS * WIDTH, SLOTS, [2]), ridge=0.01)
    scored = torch.from_numpy(features[:, 2 * WIDTH : 3 * WIDTH]) @ probe.weight + probe.bias
    assert (scored.argmax(1).numpy() == values["color"]).mean() > 0.9
    assert probe.weight.isfinite().all() and (scored[:, 8] == -torch.inf).all()


def test_pictures_are_those_that_no_training_sees():
    source, values = factor_pictures(3, 40)
    assert source.seed not in (shapes_source("train").seed, shapes_source("val").seed)
    assert source.indices.tolist() == list(range(3, 43))
    assert [*values] == [*NUM_VALUES] == [*FACTORS, "count"]
    for number in range(40):
        drawn = draw_factors(source.seed, 3 + number)
        expected = {name: getattr(drawn, name) for name in FACTORS} | {"count": drawn.num_objects - 1}
        assert {name: int(of[number]) for name, of in values.items()} == expected
    assert all(of.max() < NUM_VALUES[name] for name, of in values.items())


@pytest.mark.long
def test_the_command_beside_a_control(slot_runs, tmp_path, capsys):
    run, control = str(slot_runs["sparo"]), f"--control={slot_runs['cls']}"
    more = ("--num_images=200", "--num_workers=0", "--device=cpu", f"--out={tmp_path}")
    assert main(["slots", "factors", run, control, *more]) == 0
    found = json.loads((tmp_path / "factors" / "factors.json").read_text())
    assert (found["num_train"], found["num_test"]) == (200, 100)
    assert found["factors"]["count"] == 3 and found["chance"] == pytest.approx(chance())
    assert found["chance"]["color"] == 12.5
    ours, other = found["encoders"]
    assert (ours["name"], other["name"]) == ("sparo", "control (cls)")
    assert np.array(ours["alone"]).shape == (3, 7) and other["alone"] == []
    for one in (ours, other):
        assert one["whole"].keys() == found["factors"].keys()
        assert all(0 <= accuracy <= 100 for accuracy in one["whole"].values())
    assert other["whole"] != ours["whole"]
    picture = np.asarray(Image.open(tmp_path / "factors" / "factors.png").convert("RGB"))
    assert min(picture.shape[:2]) > 150 and picture.std() > 10
    shown = capsys.readouterr().out
    assert "control (cls)" in shown and all(f"\n{name} " in shown for name in NUM_VALUES)
