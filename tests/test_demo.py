"""A small demo end to end: table, curve, and slot maps, on generated pictures and on a folder."""

import re
import shlex
import shutil

import numpy as np
import pytest
import yaml
from PIL import Image

from dino_sparo.__main__ import main
from dino_sparo.cli.pretraining import fitted_to_folder
from dino_sparo.data.shapes import SHAPES_SIZES
from dino_sparo.demo import table
from dino_sparo.slots.curves import COLORS, draw_curve
from tests.tiny import CLS, tiny_arguments, tiny_options, write_pictures


def run_demo(data, run_dir, **changes) -> None:
    arguments = tiny_arguments(data, run_dir, monitor__knn_every_epochs=1, **changes)
    assert main(["demo", *arguments]) == 0


def assert_is_picture(path) -> None:
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert min(pixels.shape[:2]) > 100
    assert pixels.std() > 10


def test_generated_pictures(tmp_path, capsys):
    run_demo("shapes", tmp_path, data__max_images=20, monitor__knn_images_per_class=10)
    shown = capsys.readouterr().out
    assert "20-NN top-1" in shown
    assert "gain over the encoder before training" in shown
    assert len([line for line in shown.splitlines() if " % ± " in line]) == 4  # epochs 0 to 3
    assert re.search(r"on \d+ test images", shown)
    for name in ("curve.png", "slots.png"):
        assert_is_picture(tmp_path / name)


@pytest.mark.parametrize(("count", "limit", "used"), [(7, "null", 7), (60, "null", 20), (60, 12, 12)])
def test_own_folder_takes_as_many_steps(tmp_path, monkeypatch, count, limit, used):
    monkeypatch.setitem(SHAPES_SIZES, "train", 20)  # the recipe's four epochs, of 20 pictures each
    write_pictures(tmp_path, count)
    options = tiny_options(tmp_path, tmp_path / "run", data__max_images=limit, optim__epochs=4)
    recipe = fitted_to_folder(options)
    optim, images = recipe.optim, recipe.data.max_images
    assert images == used
    assert optim.epochs * images == pytest.approx(4 * 20, abs=images / 2)
    assert optim.freeze_last_layer_epochs < optim.epochs  # or the prototypes never learn
    assert optim.warmup_epochs == round(optim.epochs / 4)


@pytest.mark.long
def test_own_flat_folder_and_the_commands_that_are_printed_which_can_be_pasted(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SHAPES_SIZES, "train", 10)
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "data", 7)
    run_demo(tmp_path / "data" / "train" / "class0", tmp_path / "run", optim__epochs=4)
    optim = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["optim"]
    assert optim["epochs"] == round(4 * 10 / 7)
    shown = capsys.readouterr().out
    assert "no 20-NN accuracy: it needs class folders" in shown and "test images" not in shown
    for name in ("slots.png", "curve.png", "neighbors.png"):
        assert_is_picture(tmp_path / "run" / name)
        assert str(tmp_path / "run" / name) in shown
    lines = [line for line in shown.splitlines() if ": " in line]
    commands = [shlex.split(line.split(": ", 1)[1]) for line in lines if "--data.path" in line]
    assert [words[1] for words in commands] == ["slots", "embed"]
    for program, *arguments in commands:
        assert shutil.which(program), f"no shell finds {program}"
        assert main([*arguments, "--device=cpu", "--num_workers=0"]) == 0


@pytest.mark.parametrize(
    ("first", "last", "images", "chance"),
    [(62.1, 64.7, 153, True), (52.2, 84.4, 1000, False), (62.1, 64.7, None, False)],
)
def test_a_gain_within_chance_is_said_to_be(first, last, images, chance):
    of = {"knn20_images": images} if images else {}
    shown = table([{"epoch": 0, "knn20_top1": first, **of}, {"epoch": 8, "knn20_top1": last, **of}])
    assert ("not significant" in shown) == chance
    assert f"{last - first:+.1f} points" in shown
    assert ("± 3.9" in shown and "153 test images" in shown) == (images == 153)


def test_the_curve_of_one_entry_is_a_point(tmp_path):
    with open(tmp_path / "curve.png", "wb") as file:
        draw_curve([{"epoch": 1.0, "step": 1, "loss": 5.9}], file)
    color = [int(COLORS[0][at : at + 2], 16) for at in (1, 3, 5)]
    assert (np.asarray(Image.open(tmp_path / "curve.png").convert("RGB")) == color).all(axis=2).any()


@pytest.mark.long
def test_read_out_without_slots_has_no_slot_maps(tmp_path, capsys):
    shorter = {"data__max_images": 8, "optim__epochs": 2, "monitor__knn_images_per_class": 2}
    run_demo("shapes", tmp_path, **CLS, **shorter)
    assert (tmp_path / "curve.png").exists()
    assert not (tmp_path / "slots.png").exists()
    assert "where slots look" not in capsys.readouterr().out


def test_own_folder_leaves_what_the_user_has_set(tmp_path):
    write_pictures(tmp_path / "data", 60, classes=3)
    changes = {"optim__epochs": 2, "monitor__knn_images_per_class": 17, "monitor__knn_every_epochs": 1}
    options = tiny_options(tmp_path / "data", tmp_path / "run", **changes)
    recipe = fitted_to_folder(options)
    assert (recipe.optim.epochs, recipe.data.max_images) == (2, None)
    assert (recipe.monitor.knn_every_epochs, recipe.monitor.knn_images_per_class) == (1, 17)
