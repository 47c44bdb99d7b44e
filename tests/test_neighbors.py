"""Nearest neighbors by whole encodings."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino_sparo.__main__ import main
from dino_sparo.data.sources import open_images
from dino_sparo.interop.load import load_encoder
from dino_sparo.slots import neighbors as module
from dino_sparo.slots.neighbors import nearest_neighbors
from tests.tiny import write_pictures

MACHINE = ("--device=cpu", "--num_workers=0")


def test_planted_neighbors_come_first_and_never_the_image_itself():
    features = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float16)
    features[30], features[31], features[7] = features[4], 2 * features[4], 0
    cosines, numbers = nearest_neighbors(features, [4, 7], 3, device=torch.device("cpu"))
    assert sorted(numbers[0, :2].tolist()) == [30, 31]
    torch.testing.assert_close(cosines[0, :2], torch.ones(2))
    assert cosines[1].tolist() == [0.0] * 3 and 7 not in numbers[1], "an encoding without a direction"


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
    assert len(content["images"]) == 3 and content["num_images"] == 20
    for image in content["images"]:
        cosines = [near["cosine"] for near in image["neighbors"]]
        assert len(cosines) == 4 and cosines == sorted(cosines, reverse=True)
        assert image["image"] not in {near["image"] for near in image["neighbors"]}
    printed = capsys.readouterr().out
    picture = tmp_path / "neighbors" / "neighbors.png"
    assert np.asarray(Image.open(picture).convert("L")).std() > 10
    assert str(picture) in printed


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
