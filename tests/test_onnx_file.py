"""Encoders as ONNX: the numbers of torch for any batch size, and nothing left when they are not."""

import json

import numpy as np
import pytest
import torch

from dino_sparo import load_encoder
from dino_sparo.__main__ import main
from dino_sparo.interop import onnx_file
from dino_sparo.interop.stored import StoredEncoder
from dino_sparo.models import build_encoder
from tests.test_timm_models import ARCH, OTHERS


def session_of(path):
    onnxruntime = pytest.importorskip("onnxruntime")
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.fixture
def needs_onnx():
    for name in onnx_file.NEEDED:
        pytest.importorskip(name)


@pytest.mark.long
@torch.no_grad()
def test_a_run_as_onnx(needs_onnx, run_dir, tmp_path, capsys):
    onnx = pytest.importorskip("onnx")
    out = tmp_path / "out"
    assert main(["export", str(run_dir), "--out", str(out), "--format", "onnx"]) == 0
    assert "largest difference from torch: " in capsys.readouterr().out
    assert [path.name for path in out.iterdir()] == ["model.onnx"]
    model = onnx.load(out / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [(x.domain, x.version) for x in model.opset_import] == [("", onnx_file.OPSET)]
    told = {one.key: one.value for one in model.metadata_props}
    assert told["preprocessing"].startswith("RGB, short side to 18 pixels (bicubic), center crop of 16 x 16")
    assert (told["slots"], told["data"], told["epochs"]) == ("2", "data, 4 images", "3")
    assert (told["accuracy"], told["license"]) == ("not measured", "not stated")
    assert json.loads(told["recipe"])["optim"]["epochs"] == 3
    session, encoder = session_of(out / "model.onnx"), load_encoder(run_dir)
    assert [x.name for x in session.get_inputs()] == ["images"]
    assert [x.name for x in session.get_outputs()] == ["encoding", "attention"]
    for batch_size in (1, 2, 5):
        images = torch.randn(batch_size, 3, 16, 16)
        encoding, attention = session.run(None, {"images": images.numpy()})
        np.testing.assert_allclose(encoding, encoder(images), atol=1e-4)
        np.testing.assert_allclose(attention, encoder.readout.attention(encoder.tokens(images)), atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(OTHERS.keys() - {"defaults", "patch 8"}))
def test_every_read_out(needs_onnx, tmp_path, name):
    arguments = {"arch": ARCH, "patch_size": 4, "image_size": 16} | OTHERS[name]
    encoder = build_encoder(**arguments)
    stored = StoredEncoder(tmp_path, arguments, 0, "teacher", dict(encoder.state_dict()))
    path, difference = onnx_file.write_onnx(stored, tmp_path)
    assert 0 <= difference <= onnx_file.TOLERANCE
    names = [x.name for x in session_of(path).get_outputs()]
    assert names == (["encoding", "attention"] if encoder.num_slots else ["encoding"])


@pytest.mark.long
@pytest.mark.parametrize("shift", [0.01, float("nan")])
def test_a_failed_check_leaves_nothing(needs_onnx, run_dir, tmp_path, monkeypatch, capsys, shift):
    right = onnx_file.to_onnx

    def other_weights(model, *more):
        bias = model.encoder.backbone.norm.bias.data
        model.encoder.backbone.norm.bias.data = bias + shift
        content = right(model, *more)
        model.encoder.backbone.norm.bias.data = bias
        return content

    monkeypatch.setattr(onnx_file, "to_onnx", other_weights)
    assert main(["export", str(run_dir), "--out", str(tmp_path / "out"), "--format", "onnx"]) == 2
    assert "as ONNX computes other numbers than torch (they differ by" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(needs_onnx, run_dir, tmp_path, capsys):
    (tmp_path / "model.onnx").write_text("mine")
    assert main(["export", str(run_dir), "--out", str(tmp_path), "--format", "onnx"]) == 2
    assert "model.onnx already exists; give another folder" in capsys.readouterr().err
    assert (tmp_path / "model.onnx").read_text() == "mine"


def test_without_the_extra(run_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(onnx_file, "NEEDED", ("onnx", "no_such_package"))
    monkeypatch.setattr(onnx_file, "find_spec", lambda name: None if name == "no_such_package" else name)
    assert main(["export", str(run_dir), "--out", str(tmp_path / "out"), "--format", "onnx"]) == 2
    message = capsys.readouterr().err
    assert "not installed; run pip install no_such_package" in message
    assert not (tmp_path / "out").exists()
