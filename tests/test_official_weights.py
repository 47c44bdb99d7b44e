"""Official linear weights: scored as by the official code, and refused if they do not fit."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch

from dino_sparo.data.images import normalize, to_tensor
from dino_sparo.data.pil_views import center_crop
from dino_sparo.data.sources import open_labeled
from dino_sparo.errors import UserError
from dino_sparo.interop.load import load_encoder
from tests.probing import linear, write_data
from tests.test_official import small_encoder

NUM_BLOCKS, WIDTH, NUM_CLASSES = 3, 128, 3


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("encoder") / "dino_pretrain.pth"
    torch.save(small_encoder().backbone.state_dict(), path)
    return path


def official(num_inputs: int = NUM_BLOCKS * WIDTH, num_classes: int = NUM_CLASSES) -> dict:
    """A file as the official `eval_linear.py` writes it."""
    torch.manual_seed(0)
    state = {"weight": torch.randn(num_classes, num_inputs), "bias": torch.randn(num_classes)}
    return {
        "epoch": 100,
        "state_dict": {f"module.linear.{name}": value for name, value in state.items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.0, "params": [0, 1]}]},
        "best_acc": 77.0,
        "args": argparse.Namespace(arch="vit_small"),
    }


def written(tmp_path, content) -> Path:
    torch.save(content, tmp_path / "linearweights.pth")
    return tmp_path / "linearweights.pth"


@torch.no_grad()
def test_weights_are_scored_and_nothing_is_trained(encoder, data, tmp_path, capsys):
    content = official()
    out = tmp_path / "out"
    results = linear(encoder, data, out, evaluate=written(tmp_path, content))
    _, val = open_labeled(str(data))
    pictures = [center_crop(val.load(number), 32) for number in range(len(val))]
    images = normalize(torch.stack([to_tensor(picture) for picture in pictures]))
    state = content["state_dict"]
    features = load_encoder(encoder).probe_features(images, NUM_BLOCKS)
    logits = features @ state["module.linear.weight"].T + state["module.linear.bias"]
    expected = logits.argmax(dim=1).numpy() == val.labels
    assert 0 < expected.sum() < len(expected)
    np.testing.assert_array_equal(results[0].correct, expected)
    assert len(results) == 1 and results[0].protocol == "linear-weights" and results[0].headline
    assert results[0].name == "3 blocks cls" and results[0].details["epochs"] == 100
    assert sorted(path.name for path in out.glob("[!.]*")) == ["results.json"]
    assert "linear probe of linearweights.pth, val: 7 test images, 3 classes" in capsys.readouterr().out
    compiled = {f"_orig_mod.{name}": value for name, value in state.items()}
    for alone in (state, compiled):
        (again,) = linear(encoder, data, out, evaluate=written(tmp_path, alone))
        np.testing.assert_array_equal(again.correct, expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (official(num_classes=4), "is for 4 classes, but data.path has 3"),
        (official(num_inputs=100), "has 100 inputs, .* have 128, 256, 384;"),
        (official(num_inputs=2 * WIDTH), "is ambiguous .* official ViT-B"),
        (
            {"state_dict": {"module.linear.weight": torch.zeros(3, 4)}},
            "linear classifier, but weight;",
        ),
        ({"weight": torch.zeros(3, 4), "bias": torch.zeros(2)}, "weight has 3 rows, the bias 2"),
        ([torch.zeros(1)], "linear classifier, but list"),
    ],
)
def test_what_does_not_fit_is_one_sentence(encoder, data, tmp_path, content, message):
    with pytest.raises(UserError, match=message) as caught:
        linear(encoder, data, tmp_path / "out", evaluate=written(tmp_path, content))
    assert "linearweights.pth" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"sweep": "true", "cached": "true"}, "sweep, cached would train others; leave these out"),
        ({"train_fraction": 0.5}, "train_fraction would train others; leave this out"),
    ],
)
def test_options_of_training_are_refused(encoder, data, tmp_path, changes, names):
    with pytest.raises(UserError, match=names):
        linear(encoder, data, tmp_path / "out", evaluate=written(tmp_path, official()), **changes)


def test_a_missing_file(encoder, data, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"evaluate .*none.pth' does not exist"):
        linear(encoder, data, tmp_path / "out", evaluate=tmp_path / "none.pth")
