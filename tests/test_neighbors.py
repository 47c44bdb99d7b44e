"""Nearest neighbors by whole encodings, and the map of encodings."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino_sparo.__main__ import main
from dino_sparo.data.sources import open_images
from dino_sparo.interop.load import load_encoder
from dino_sparo.slots import neighbors as module
from dino_sparo.slots.curves import COLORS
from dino_sparo.slots.neighbors import draw_map, far_apart, nearest_neighbors, principal_components
from tests.tiny import write_pictures

MACHINE = ("--device=cpu", "--num_workers=0")


def test_planted_neighbors_come_first_and_never_the_image_itself():
    features = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float16)
    features[30], features[31], features[7] = features[4], 2 * features[4], 0
    cosines, numbers = nearest_neighbors(features, [4, 7], 3, device=torch.device("cpu"))
    assert sorted(numbers[0, :2].tolist()) == [30, 31]
    torch.testing.assert_close(cosines[0, :2], torch.ones(2))
    assert cosines[1].tolist() == [0.0] * 3 and 7 not in numbers[1], "an encoding without a direction"


def test_principal_components_are_those_of_a_singular_value_decomposition():
    features = np.random.default_rng(0).normal(size=(40, 12)) * np.linspace(4, 1, 12)
    places, fractions = principal_components(features)
    rows = features / np.linalg.norm(features, axis=1, keepdims=True)
    left, sizes, _ = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(np.abs(places), np.abs(left[:, :2] * sizes[:2]), atol=1e-10)
    np.testing.assert_allclose(fractions, sizes[:2] ** 2 / (sizes**2).sum())
    farthest = np.abs(places).argmax(axis=0)
    assert (places[farthest, [0, 1]] > 0).all(), "the signs are the same on every machine"


@pytest.mark.parametrize("features", [np.ones((5, 3)), np.zeros((5, 3)), np.ones((1, 3))])
def test_encodings_that_are_all_equal_have_a_place(features):
    places, fractions = principal_components(features)
    np.testing.assert_allclose(places, np.zeros((len(features), 2)), atol=1e-12)
    assert np.isfinite(fractions).all()


def test_places_that_are_chosen_are_far_apart_and_leave_no_room():
    places = np.random.default_rng(0).normal(size=(300, 2))
    chosen = far_apart(places, 0.5)
    apart = np.abs(places[:, None] - places[chosen]).max(axis=2)
    assert all(np.delete(row, at).min() >= 0.5 for at, row in enumerate(apart[chosen]))
    assert apart.min(axis=1).max() < 0.5


def test_ten_classes_are_named_and_others_are_gray(run_dir, tmp_path):
    write_pictures(tmp_path, 26, classes=12)
    source, encoder = open_images(str(tmp_path)), load_encoder(run_dir)
    names = ("$x_", "_hidden", "\ud800", *source.classes[3:])
    places = np.random.default_rng(0).normal(size=(26, 2))
    found = []
    for classes in (names, source.classes):
        draw_map(places, [0.5, 0.1], replace(source, classes=classes), encoder, tmp_path / "map.png")
        found.append(np.asarray(Image.open(tmp_path / "map.png").convert("RGB")))
    assert found[0].shape == found[1].shape and (found[0] != found[1]).any(), "names are in the legend"
    for color in COLORS:  # of the frames of pictures
        assert (found[1] == [int(color[at : at + 2], 16) for at in (1, 3, 5)]).all(axis=2).any()


def test_classes_without_a_point_are_not_in_the_legend(run_dir, tmp_path, monkeypatch):
    write_pictures(tmp_path, 9, classes=9)
    source, figures = open_images(str(tmp_path)), []
    monkeypatch.setattr(module, "write_figure", lambda _path, figure: figures.append(figure))
    places = np.random.default_rng(0).normal(size=(9, 2))
    named = replace(source, classes=(*source.classes, "unused"))
    draw_map(places, [0.5, 0.1], named, load_encoder(run_dir), tmp_path / "map.png")
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == list(source.classes)


def test_titles_name_the_encoder_and_the_cosine_on_lines_of_their_own(run_dir, tmp_path, monkeypatch):
    write_pictures(tmp_path, 4, classes=1)
    source, drawn = open_images(str(tmp_path / "train" / "class0")), []
    monkeypatch.setattr(module, "draw_grid", lambda _rows, titles, *_others, **_options: drawn.extend(titles))
    near = torch.tensor([[0.857]]), torch.tensor([[1]])
    found = {"untrained": near, "trained": near}
    module.draw_neighbors(found, [0], source, load_encoder(run_dir), tmp_path / "neighbors.png")
    names = [Path(source.name(number)).name for number in (0, 1)]
    assert drawn == [[f"{name}\n{names[0]}", f"{names[1]}\ncosine 0.86"] for name in found]


@pytest.mark.parametrize("run", ["sparo", "cls"])
def test_pictures_and_numbers_of_a_flat_folder(slot_runs, tmp_path, run, capsys):
    data = slot_runs["data"] / "train" / "class0"
    arguments = [str(slot_runs[run]), f"--data.path={data}", f"--out={tmp_path}", *MACHINE]
    assert main(["slots", "neighbors", *arguments, "--num_images=3", "--num_neighbors=4"]) == 0
    content = json.loads((tmp_path / "neighbors" / "neighbors.json").read_text())
    assert len(content["images"]) == 3 and content["num_images"] == content["num_points"] == 20
    for image in content["images"]:
        cosines = [near["cosine"] for near in image["neighbors"]]
        assert len(cosines) == 4 and cosines == sorted(cosines, reverse=True)
        assert image["image"] not in {near["image"] for near in image["neighbors"]}
    printed = capsys.readouterr().out
    for name in ("neighbors.png", "map.png"):
        assert np.asarray(Image.open(tmp_path / "neighbors" / name).convert("L")).std() > 10
        assert str(tmp_path / "neighbors" / name) in printed


@pytest.mark.long
def test_features_of_the_gallery_are_used_again(slot_runs, tmp_path):
    cache = tmp_path / "cache"
    for command in ("gallery", "neighbors"):
        arguments = [
            str(slot_runs["sparo"]),
            f"--data.path={slot_runs['data']}",
            f"--out={tmp_path}",
            *MACHINE,
        ]
        assert main(["slots", command, *arguments, f"--cache={cache}"]) == 0
        if command == "gallery":
            before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    assert before == {path: path.stat().st_mtime_ns for path in cache.rglob("*")} != {}
