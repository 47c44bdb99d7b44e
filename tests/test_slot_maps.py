"""`slots maps` end to end: overlays, grid, and maps.json, and images that cannot be drawn."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino_sparo.__main__ import main
from dino_sparo.data.images import normalize
from dino_sparo.data.sources import open_images
from dino_sparo.interop.load import load_encoder
from dino_sparo.models import build_encoder
from dino_sparo.slots import maps as module
from dino_sparo.slots.attention import cls_attention, slot_attention
from dino_sparo.slots.drawing import SeenImages, draw_attention

SIDES = (24, 16, 40)  # of the pictures, whose widths are these and whose heights are 24


@pytest.fixture
def pictures(tmp_path):
    """A flat folder of three pictures: square, tall, wide."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number, width in enumerate(SIDES):
        pixels = rng.integers(0, 256, (24, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def run(run_dir: Path, pictures: Path, out: Path, *options: str, num_workers: int = 0) -> int:
    machine = (f"--num_workers={num_workers}", "--device=cpu")
    arguments = [str(run_dir), f"--data.path={pictures}", f"--out={out}", *machine]
    return main(["slots", "maps", *arguments, *options])


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_center_crops(run_dir, pictures, tmp_path, capsys):
    assert run(run_dir, pictures, tmp_path, "--slots=[1,0]", "--images=[2,0]") == 0
    folder = tmp_path / "maps"
    content = json.loads((folder / "maps.json").read_text())
    assert (content["run"], content["which"], content["data"]) == (str(run_dir), "teacher", str(pictures))
    assert [Path(name).name for name in content["images"]] == ["2.png", "0.png"]
    assert (content["slots"], content["grid"]) == ([1, 0], "grid.png")
    keys = ("cls", "1", "0")
    names = ("cls", "slot01", "slot00")
    assert content["overlays"] == {
        image: {key: f"image{image}_{name}.png" for key, name in zip(keys, names, strict=True)}
        for image in ("2", "0")
    }
    listed = {name for of_image in content["overlays"].values() for name in of_image.values()}
    assert {path.name for path in folder.iterdir()} == listed | {"maps.json", "grid.png"}
    grid = read(folder / "grid.png")
    assert grid.shape[1] > 4 * 100 and grid.std() > 10  # image, CLS and two slots
    assert str(folder / "grid.png") in capsys.readouterr().out
    encoder = load_encoder(run_dir)
    crops = SeenImages(open_images(str(pictures)), 8, 16)  # what the encoder was trained at
    seen = [crops[number] for number in (2, 0)]
    pixels = torch.stack([one.pixels for one in seen])
    of_slots, _ = slot_attention(encoder, normalize(pixels))
    of_cls = cls_attention(encoder, normalize(pixels)).mean(dim=1)
    maps = {"cls": of_cls, "slot00": of_slots[:, 0], "slot01": of_slots[:, 1]}
    for row, number in enumerate((2, 0)):
        for name, of_images in maps.items():
            expected = draw_attention(seen[row].picture, of_images[row]).astype(int)
            found = read(folder / f"image{number}_{name}.png").astype(int)
            assert abs(found - expected).max() <= 1  # batches round differently


def test_without_slots_every_head_of_the_cls_token_is_drawn(run_dir, slot_runs, pictures, tmp_path, capsys):
    assert run(slot_runs["cls"], pictures, tmp_path, "--images=[1]") == 0
    content = json.loads((tmp_path / "maps" / "maps.json").read_text())
    assert content["slots"] == []
    assert content["overlays"] == {"1": {key: f"image1_{key}.png" for key in ("cls", "head0", "head1")}}
    vit = build_encoder({"width": 128, "depth": 2, "num_heads": 2}, 8, 16, readout="cls")
    torch.save(vit.backbone.state_dict(), tmp_path / "official.pth")
    assert run(tmp_path / "official.pth", pictures, tmp_path / "official", "--images=[1]") == 0
    other = json.loads((tmp_path / "official" / "maps" / "maps.json").read_text())
    assert other["overlays"] == content["overlays"]
    assert run(slot_runs["cls"], pictures, tmp_path / "out", "--slots=[0]") == 2
    assert "slots is [0], but the encoder has none (read-out cls)" in capsys.readouterr().err
    control = f"--control={slot_runs['cls']}"
    assert run(run_dir, pictures, tmp_path / "both", control, "--images=[1]", "--slots=[0]") == 0
    content = json.loads((tmp_path / "both" / "maps" / "maps.json").read_text())
    assert (content["slots"], content["control"]) == ([0], str(slot_runs["cls"]))
    grids = [
        read(folder / "maps" / name)
        for folder, name in ((tmp_path, "grid.png"), (tmp_path / "both", "control.png"))
    ]
    assert (grids[0] == grids[1]).all()


def test_whole_images_that_are_not_square(run_dir, pictures, tmp_path):
    assert run(run_dir, pictures, tmp_path, "--short_side=32", "--batch_size=2") == 0
    content = json.loads((tmp_path / "maps" / "maps.json").read_text())
    assert sorted(content["slots"]) == [0, 1]  # all there are
    # 24x24 -> 32x32; 16 wide, 24 high -> 32, 48; 40 wide, 24 high -> 53, 32, of which 48 are whole patches;
    # all drawn 7 times as large, so that the short side has 224 pixels
    shapes = {"0": (224, 224), "1": (336, 224), "2": (224, 336)}
    for number, names in content["overlays"].items():
        assert {read(tmp_path / "maps" / name).shape[:2] for name in names.values()} == {shapes[number]}


def test_a_coarse_map_says_so(run_dir, pictures, tmp_path, capsys):
    assert run(run_dir, pictures, tmp_path, "--images=[0]") == 0
    assert "the encoder sees 2 × 2 patches; slots maps --short-side 448" in capsys.readouterr().out
    assert run(run_dir, pictures, tmp_path, "--images=[0]", "--short_side=32") == 0
    assert "448" not in capsys.readouterr().out
    assert json.loads((tmp_path / "maps" / "maps.json").read_text())["patches"] == [[4, 4]]


def test_why_slots_are_chosen(slot_runs, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "distinct_slots", lambda maps, count: [2, 0])
    assert run(slot_runs["sparo"], pictures, tmp_path, "--images=[0]") == 0
    assert "slots that look at different places (2, 0) on 1 image: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("times", "said"), [(0.9, "no patch above uniform"), (1.1, "at most 1.10 × uniform"), (2.0, "")]
)
def test_a_gray_column_says_why(run_dir, pictures, monkeypatch, times, said):
    def equal(_encoder, images):
        return torch.full((len(images), 2, 2, 2), times / 5)  # of 5 tokens

    monkeypatch.setattr(module, "cls_attention", equal)
    rows = module.look(load_encoder(run_dir), open_images(str(pictures)), [0, 1])
    assert rows.titles["cls"].partition("\n")[2] == said


def test_pictures_of_an_earlier_run_go_and_others_stay(run_dir, pictures, tmp_path):
    assert run(run_dir, pictures, tmp_path, "--images=[0,1]") == 0
    folder = tmp_path / "maps"
    (folder / "mine.png").write_bytes(b"mine")
    assert run(run_dir, pictures, tmp_path, "--images=[1]", "--slots=[0]") == 0
    expected = {"maps.json", "grid.png", "mine.png", "image1_cls.png", "image1_slot00.png"}
    assert {path.name for path in folder.iterdir()} == expected


def test_images_are_spread_evenly_and_student_is_not_the_teacher(run_dir, pictures, tmp_path):
    found = {}
    for name in ("3.png", "4.png"):
        Image.new("RGB", (24, 24)).save(pictures / name)
    for which in ("teacher", "student"):
        assert run(run_dir, pictures, tmp_path / which, "--num_images=3", f"--which={which}") == 0
        content = json.loads((tmp_path / which / "maps" / "maps.json").read_text())
        assert content["which"] == which
        assert list(content["overlays"]) == ["0", "2", "4"]
        found[which] = read(tmp_path / which / "maps" / "image0_slot00.png")
    assert (found["teacher"] != found["student"]).any()


@pytest.mark.parametrize("options", [[], ["--short_side=32"]], ids=["center crop", "whole image"])
def test_images_smaller_than_a_patch_are_drawn(run_dir, pictures, tmp_path, options):
    Image.new("RGB", (1, 2)).save(pictures / "9.png")
    assert run(run_dir, pictures, tmp_path / "out", "--images=[0,3]", *options) == 0


@pytest.mark.parametrize("num_workers", [0, 1])
def test_images_too_long_to_be_drawn_whole(run_dir, pictures, tmp_path, capsys, num_workers):
    Image.new("RGB", (200, 8)).save(pictures / "9.png")
    given = ("--images=[0,3]", "--short_side=32")
    assert run(run_dir, pictures, tmp_path / "out", *given, num_workers=num_workers) == 2
    shown = capsys.readouterr().err
    assert "at most 16 times the short side" in shown and "9.png" in shown and "Traceback" not in shown


def test_image_that_cannot_be_read(run_dir, pictures, tmp_path, capsys):
    (pictures / "1.png").write_bytes(b"not a picture")
    assert run(run_dir, pictures, tmp_path / "out") == 2
    shown = capsys.readouterr().err
    assert "1.png" in shown and "cannot be read" in shown and "Traceback" not in shown
