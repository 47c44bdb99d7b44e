"""Encoders exported as timm folders and loaded again; what the command refuses."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from dino_sparo import load_encoder
from dino_sparo.__main__ import main
from dino_sparo.data.images import evaluation_crop, normalize
from dino_sparo.errors import UserError
from dino_sparo.evaluation.features import hash_of
from dino_sparo.evaluation.results import Result, save_results
from tests.test_official import small_encoder
from tests.tiny import write_pictures


@pytest.fixture
def exported(run_dir, tmp_path):
    assert main(["export", str(run_dir), "--out", str(tmp_path / "exported")]) == 0
    return tmp_path / "exported"


@torch.no_grad()
def same(first, second, size=16):
    images = torch.randn(2, 3, size, size)
    assert torch.equal(first(images), second(images))


def test_exported_folder_and_its_file_load_as_the_run_does(run_dir, exported):
    assert {path.name for path in exported.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    for path in (exported, str(exported / "model.safetensors")):
        same(load_encoder(path), load_encoder(run_dir))
        same(load_encoder(path, untrained=True), load_encoder(run_dir, untrained=True))
    weights = load_file(exported / "model.safetensors")
    assert weights.keys() == load_encoder(run_dir).state_dict().keys()
    card = (exported / "README.md").read_text()
    assert "Measured" not in card and "- sparo\n" in card


def test_one_set_of_weights(run_dir, exported, tmp_path):
    with pytest.raises(UserError, match=r"contains only the teacher; use which='teacher'"):
        load_encoder(exported, "student")
    student = tmp_path / "student"
    assert main(["export", str(run_dir), "--out", str(student), "--which", "student"]) == 0
    same(load_encoder(student, "student"), load_encoder(run_dir, "student"))
    with pytest.raises(UserError, match=r"contains only the student"):
        load_encoder(student)


def test_renamed_weights_beside_the_description(run_dir, exported):
    best = exported / "best.safetensors"
    weights = load_encoder(run_dir, "student").state_dict()
    save_file(weights, best)
    same(load_encoder(best), load_encoder(run_dir, "student"))
    same(load_encoder(exported), load_encoder(run_dir))


def test_official_weights_are_exported_too(tmp_path):
    """Also parameters, not tensors, and such that share memory."""
    source = small_encoder()
    state = dict(source.backbone.named_parameters())
    bias = torch.cat((state["norm.bias"], state["blocks.0.norm1.bias"])).detach()
    torch.save(state | {"norm.bias": bias[:128], "blocks.0.norm1.bias": bias[128:]}, tmp_path / "dino.pth")
    assert main(["export", str(tmp_path / "dino.pth"), "--out", str(tmp_path / "out")]) == 0
    same(load_encoder(tmp_path / "out"), source, size=32)
    with pytest.raises(UserError, match=r"arch is 'vit_tiny' .* has width 128, depth 3 and 2 heads"):
        load_encoder(tmp_path / "out", arch="vit_tiny")


def test_folders_of_format_1_are_read(run_dir, exported, tmp_path):
    """They held what is now under our key, alone, and every name began with `backbone.`."""
    source = small_encoder()
    torch.save(source.backbone.state_dict(), tmp_path / "dino.pth")
    assert main(["export", str(tmp_path / "dino.pth"), "--out", str(tmp_path / "cls")]) == 0
    for folder, encoder, size in ((exported, load_encoder(run_dir), 16), (tmp_path / "cls", source, 32)):
        config = json.loads((folder / "config.json").read_text())["dino_sparo"]
        (folder / "config.json").write_text(json.dumps(config | {"format": 1}))
        save_file(encoder.state_dict(), folder / "model.safetensors")
        same(load_encoder(folder), encoder, size)


def test_weights_that_do_not_fit_are_not_exported(tmp_path, capsys):
    state = dict(small_encoder().backbone.state_dict())
    del state["norm.bias"]
    torch.save(state, tmp_path / "dino.pth")
    assert main(["export", str(tmp_path / "dino.pth"), "--out", str(tmp_path / "out")]) == 2
    assert "1 missing (backbone.norm.bias)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(run_dir, exported, capsys):
    before = (exported / "model.safetensors").read_bytes()
    assert main(["export", str(run_dir), "--out", str(exported), "--which", "student"]) == 2
    assert "exported is not empty; give another folder" in capsys.readouterr().err
    assert (exported / "model.safetensors").read_bytes() == before


def test_damaged_or_missing_files(exported):
    weights, config = exported / "model.safetensors", exported / "config.json"
    good = weights.read_bytes(), config.read_text()
    for content in (b"", good[0][:-100], b"x" * 100):
        weights.write_bytes(content)
        with pytest.raises(UserError, match=r"model.safetensors cannot be read as a safetensors file"):
            load_encoder(exported)
    weights.write_bytes(good[0])
    for text in ("", good[1][:-10], "[]", "{}", good[1].replace('"format": 2', '"format": 9')):
        config.write_text(text)
        with pytest.raises(UserError, match=r"config.json (cannot be read as|does not describe an)"):
            load_encoder(exported)
    config.unlink()
    with pytest.raises(FileNotFoundError, match=r"config.json does not exist; an exported encoder is"):
        load_encoder(weights)
    config.write_text(good[1])
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"model.safetensors does not exist"):
        load_encoder(exported)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("arch", "vit_small", "does not fit an encoder with width 384"),
        ("arch", {"width": 16}, "encoder of dino-sparo: missing: model.arch.depth, model.arch.num_heads"),
        ("num_slots", 4, "misshapen (readout.query (2, 4) instead of (4, 4)"),
    ],
)
def test_a_description_that_the_weights_do_not_fit(exported, key, value, message):
    config = json.loads((exported / "config.json").read_text())
    config["dino_sparo"]["encoder"][key] = value
    (exported / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        load_encoder(exported)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@torch.no_grad()
def test_the_card_tells_how_to_use_it_and_what_was_measured(run_dir, tmp_path):
    run = tmp_path / "my_run"
    shutil.copytree(run_dir, run)
    shown = Result(
        **{"protocol": "knn", "name": "20-NN", "headline": True, "weights": "teacher"},
        details={"encoder": hash_of(load_encoder(run))},
        **{"test_set": "val", "top1": 83.64, "top5": 90.0, "num_images": 4, "num_classes": 2},
        **{"images": "x", "correct": np.ones(4, bool)},
    )
    others = (
        {"name": "10-NN", "headline": False},
        {"weights": "student"},
        {"details": {"train_fraction": 0.1}},
        {"protocol": "linear", "details": {"encoder": "earlier weights of the run"}},
    )
    save_results(run, [shown, *(dataclasses.replace(shown, **change) for change in others)])
    out = tmp_path / "out"
    assert main(["export", str(run), "--out", str(out)]) == 0
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\n") and "\n# my_run\n" in card
    assert card.endswith("## Measured\n\n- 20-NN (knn) on val: 83.6 % top-1, 4 images of 2 classes\n")
    for line in (
        "encoding: 8 dimensions, 2 slots of 4 concatenated",
        "preprocessing: RGB, short side to 18 pixels (bicubic), center crop of 16 x 16, divided by 255",
        "data: data, 4 images",
        "epochs: 3",
        "license: not stated",
    ):
        assert f"- {line}" in card
    recipe = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert recipe.pop("init") is None and recipe == {key: config[key] for key in recipe}
    assert recipe.keys() == {"seed", "views", "model", "head", "loss", "optim"}
    licensed = tmp_path / "licensed"
    assert main(["export", str(run), "--out", str(licensed), "--license", "other: ask"]) == 0
    front = yaml.safe_load((licensed / "README.md").read_text().split("---\n")[1])
    assert front["license"] == "other: ask" and front["library_name"] == "timm"
    for file in ("README.md", "config.json"):
        assert str(tmp_path) not in (out / file).read_text()

    write_pictures(tmp_path / "data", 1)
    picture = str(tmp_path / "data" / "train" / "class0" / "000.png")
    code = card.split("```python\n")[1].split("```")[0].replace("FOLDER", str(out)).replace("IMAGE", picture)
    names: dict = {}
    exec(code, names)
    with Image.open(picture) as image:
        expected = load_encoder(run)(normalize(evaluation_crop(image, 16))[None])
    torch.testing.assert_close(names["encoding"], expected, atol=1e-5, rtol=0)
