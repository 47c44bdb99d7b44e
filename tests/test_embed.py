"""`dino-sparo embed`: features of images as a file for numpy."""

import numpy as np
import pytest
import torch

from dino_sparo.__main__ import main
from dino_sparo.data.images import CenterCrops, normalize
from dino_sparo.data.sources import open_images
from dino_sparo.interop.load import load_encoder
from tests.tiny import write_pictures

MACHINE = ("--device=cpu", "--num_workers=0")


@pytest.fixture
def flat(tmp_path):
    write_pictures(tmp_path / "pictures", 5)
    return tmp_path / "pictures" / "train" / "class0"


@torch.no_grad()
def test_features_are_those_of_the_encoder_in_the_order_of_names(run_dir, flat, tmp_path, capsys, caplog):
    caplog.set_level("INFO", logger="dino_sparo")
    encoder, source = load_encoder(run_dir), open_images(str(flat))
    crops = CenterCrops(source, encoder.image_size)
    images = normalize(torch.stack([crops[number] for number in range(5)]))
    tokens = encoder.tokens(images)
    expected = {
        "encoding": encoder(images),
        "slots": encoder(images).view(5, 2, 4),
        "cls": tokens[:, 0],
        "tokens": tokens,
    }
    for what, features in expected.items():
        out = tmp_path / f"{what}.npz"
        arguments = [str(run_dir), f"--data.path={flat}", f"--out={out}", f"--what={what}"]
        assert main(["embed", *arguments, *MACHINE]) == 0
        found = np.load(out)
        assert found["features"].dtype == np.float32
        np.testing.assert_allclose(found["features"], features, atol=1e-5)
        assert found["names"].tolist() == [source.name(number) for number in range(5)]
    assert f"features (5, 5, 16) and names of their images: {out}" in capsys.readouterr().out
    assert "train: 5 images without classes" in caplog.text
    assert main(["embed", *arguments, *MACHINE]) == 2
    assert f"out: {out} already exists; give another path or remove it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("run", "options", "message"),
    [
        ("cls", ["--what=slots", "--out=a.npz"], "the encoder has none (read-out cls)"),
        ("sparo", ["--out=a.npy"], "out is 'a.npy', expected NAME.npz"),
        ("sparo", ["--out=nowhere/a.npz"], "expected NAME.npz in a folder that exists"),
    ],
)
def test_mistakes_are_one_sentence(slot_runs, flat, tmp_path, monkeypatch, capsys, run, options, message):
    monkeypatch.chdir(tmp_path)
    assert main(["embed", str(slot_runs[run]), f"--data.path={flat}", *options, *MACHINE]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "a.npz").exists()
