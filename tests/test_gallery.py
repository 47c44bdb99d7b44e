"""The gallery finds planted images and neighbors, independent of the chunk size."""

import json
import re
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino_sparo.__main__ import main
from dino_sparo.data.images import normalize
from dino_sparo.data.sources import open_images
from dino_sparo.interop.load import load_encoder
from dino_sparo.slots.attention import slot_attention
from dino_sparo.slots.drawing import SeenImages, as_picture, draw_attention, draw_grid
from dino_sparo.slots.gallery import neighbors, strongest
from tests.tiny import write_pictures

CPU = torch.device("cpu")


@pytest.mark.parametrize("chunk", [3, 7, 1000])
def test_planted_images_and_neighbors(chunk):
    features = torch.randn(40, 3 * 4) * 0.1 + 50  # a mean far from zero
    slot = features.view(40, 3, 4)[:, 1]
    slot[9] += torch.tensor([8.0, 0, 0, 0])
    slot[23] += torch.tensor([4.0, 0, 0, 0])
    slot[31] -= torch.tensor([6.0, 0, 0, 0])
    found = strongest(features.numpy(), 3, 3, device=CPU, chunk=chunk)
    assert found.images[1].tolist() == [9, 31, 23]
    lengths = (slot - slot.mean(0)).norm(dim=1)
    expected = lengths[[9, 31, 23]] / lengths.square().mean().sqrt()
    torch.testing.assert_close(found.responses[1].float(), expected, rtol=1e-4, atol=0)
    cosines, near = neighbors(features.numpy(), found, 2, device=CPU, chunk=chunk)
    assert near[1, 0, 0] == 23 and cosines[1, 0, 0] > 0.99
    assert near[1, 2, 0] == 9
    assert 31 not in near[1, 0]
    assert all(int(image) not in near[1, i] for i, image in enumerate(found.images[1]))


def test_slot_that_is_the_same_for_all_images_does_not_respond():
    features = torch.full((10, 8), 0.1)
    features[:, :4] = torch.randn(10, 4)
    found = strongest(features.numpy(), 2, 4, device=CPU)
    assert (found.responses[0] > 0).all()
    assert found.responses[1].tolist() == [0.0] * 4


@pytest.mark.parametrize("command", ["maps", "gallery"])
def test_a_full_disk_is_told_with_the_name_of_the_picture(run_dir, pictures, tmp_path, capsys, command):
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    arguments = [str(run_dir), f"--data.path={pictures}", f"--out={tmp_path / 'out'}", "--device=cpu"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, unlimited[1]))
    try:
        assert main(["slots", command, *arguments, "--num_workers=0"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert re.search(
        r"out/\w+/\w+\.png cannot be read or written \(File too large\)", capsys.readouterr().err
    )
    assert not [*(tmp_path / "out").rglob("*.png*")]


@pytest.fixture
def pictures(tmp_path):
    write_pictures(tmp_path / "pictures", 6, classes=2)
    return tmp_path / "pictures"


def run(run_dir: Path, pictures: Path, out: Path, *options: str) -> int:
    machine = ("--num_workers=0", "--device=cpu", "--cache_precision=float32", f"--cache={out / 'cache'}")
    arguments = [str(run_dir), f"--data.path={pictures}", f"--out={out}", *machine]
    return main(["slots", "gallery", *arguments, *options])


def read(out: Path) -> dict:
    return json.loads((out / "gallery" / "gallery.json").read_text())


@pytest.mark.long
def test_the_program_end_to_end(run_dir, pictures, tmp_path, capsys, monkeypatch):
    drawn = {}

    def draw(rows, titles, path, heading, **options):
        drawn[path.name] = rows, titles, heading
        draw_grid(rows, titles, path, heading, **options)

    monkeypatch.setattr("dino_sparo.slots.gallery.draw_grid", draw)
    assert run(run_dir, pictures, tmp_path, "--num_images=3", "--num_neighbors=2") == 0
    content = read(tmp_path)
    assert (content["run"], content["data"]) == (str(run_dir), str(pictures))
    source, encoder = open_images(str(pictures)), load_encoder(run_dir)
    names = [source.name(number) for number in range(len(source))]
    crops = SeenImages(source, 8, 16)
    seen = [crops[number] for number in range(len(source))]
    pixels = torch.stack([one.pixels for one in seen])
    maps, _ = slot_attention(encoder, normalize(pixels))
    with torch.no_grad():
        slots = encoder(normalize(pixels)).view(6, 2, 4).double()
    slots -= slots.mean(dim=0)
    responses = slots.norm(dim=2) / slots.square().sum(dim=2).mean(dim=0).sqrt()
    assert [entry["slot"] for entry in content["slots"]] == [0, 1]
    for slot, entry in enumerate(content["slots"]):
        rows, titles, heading = drawn[entry["picture"]]
        assert heading.startswith(f"Slot {slot}: ")
        strongest_three = responses[:, slot].argsort(descending=True)[:3].tolist()
        assert [top["image"] for top in entry["top"]] == [names[number] for number in strongest_three]
        for row, (number, top) in enumerate(zip(strongest_three, entry["top"], strict=True)):
            assert top["response"] == pytest.approx(float(responses[number, slot]), rel=1e-3)
            cosines = torch.cosine_similarity(slots[:, slot], slots[number, slot][None])
            cosines[number] = -2
            nearest = cosines.argsort(descending=True)[:2].tolist()
            assert [near["image"] for near in top["neighbors"]] == [names[other] for other in nearest]
            found = [near["cosine"] for near in top["neighbors"]]
            assert found == pytest.approx(cosines[nearest].tolist(), abs=1e-3)
            for column, other in enumerate((number, *nearest)):
                plain, drawn_over = np.split(rows[row][column][:, [*range(224), *range(-224, 0)]], 2, axis=1)
                assert (plain == as_picture(seen[other].picture)).all()
                expected = draw_attention(seen[other].picture, maps[other, slot]).astype(int)
                assert abs(drawn_over - expected).max() <= 1  # batches round differently
                name, text = titles[row][column].split("\n")
                assert name == Path(names[other]).name and text.endswith(f"class{other // 3}")
        assert f"response {entry['top'][0]['response']:.2f}" in titles[0][0]
        assert f"cosine {entry['top'][0]['neighbors'][0]['cosine']:.3f}" in titles[0][1]
        picture = np.asarray(Image.open(tmp_path / "gallery" / entry["picture"]).convert("RGB"))
        assert min(picture.shape[:2]) > 3 * 100 and picture.std() > 10  # three rows of three
    assert f"2 slots over 6 images: {tmp_path / 'gallery'}" in capsys.readouterr().out


@pytest.mark.long
def test_chosen_slots_and_pictures_of_an_earlier_run(run_dir, pictures, tmp_path):
    assert run(run_dir, pictures, tmp_path) == 0
    folder = tmp_path / "gallery"
    assert {path.name for path in folder.iterdir()} == {"gallery.json", "slot00.png", "slot01.png"}
    whole = read(tmp_path)["slots"]
    assert len(whole[0]["top"]) == 6 and len(whole[0]["top"][0]["neighbors"]) == 4
    assert run(run_dir, pictures, tmp_path, "--slots=[1]") == 0
    assert {path.name for path in folder.iterdir()} == {"gallery.json", "slot01.png"}
    assert read(tmp_path)["slots"] == [whole[1]]


def test_one_image_has_no_neighbors(run_dir, tmp_path):
    write_pictures(tmp_path / "pictures", 1)
    assert run(run_dir, tmp_path / "pictures" / "train" / "class0", tmp_path) == 0
    for entry in read(tmp_path)["slots"]:
        assert [(top["response"], top["neighbors"]) for top in entry["top"]] == [(0.0, [])]
        assert (tmp_path / "gallery" / entry["picture"]).exists()
