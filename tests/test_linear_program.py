"""The linear probe as a program: what its options train, and what it refuses."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dino_sparo.data.sources import open_labelled
from dino_sparo.data.views import sample_order
from dino_sparo.errors import UserError
from dino_sparo.evaluation.probe_training import ProbeTraining, check_batch_size
from dino_sparo.evaluation.results import read_results
from dino_sparo.evaluation.transfer import balanced_fraction
from dino_sparo.interop import load
from dino_sparo.interop.load import load_encoder
from dino_sparo.runs.checkpoint import load_latest
from tests.probing import (
    NUM_TRAIN,
    NUM_VAL,
    OFFICIAL,
    linear,
    pretrained_run,
    weights,
    write_colours,
    write_data,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    return pretrained_run(tmp_path_factory.mktemp("pretrained"))


@pytest.fixture(scope="module")
def uninterrupted(pretrained, data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("linear") / "out"
    linear(pretrained, data, out, learning_rates=[0.001, 1.0])
    return out


def test_other_settings_in_the_same_folder_are_refused(pretrained, data, uninterrupted):
    for changes, message in (
        ({"epochs": 4}, "epochs was 3, now 4"),
        ({"seed": 1}, "seed was 0, now 1"),
        ({"learning_rates": [0.1]}, "probes was "),
    ):
        given = {"learning_rates": [0.001, 1.0]} | changes
        with pytest.raises(UserError, match=rf"holds other probes \({message}.*give another --out"):
            linear(pretrained, data, uninterrupted, **given)


def test_cached_probes_are_not_called_official(pretrained, data, tmp_path, capsys):
    out = tmp_path / "out"
    results = linear(pretrained, data, out, cached="true", learning_rates=[30.0], epochs=40)
    assert [(result.protocol, result.headline) for result in results] == [("linear-cached", False)]
    assert results[0].top1 == 100  # the colours are easy, if anything is learned
    assert "not the official protocol" in capsys.readouterr().out
    results = linear(pretrained, data, out)
    assert {result.protocol for result in results} == {"linear", "linear-cached"}
    assert sorted(path.name for path in out.iterdir()) == ["linear", "linear-cached", "results.json"]


def test_a_sweep_holds_the_official_probe_as_it_is_alone(pretrained, data, uninterrupted, tmp_path):
    results = linear(pretrained, data, tmp_path / "out", sweep="true")
    names = [result.name for result in results]
    assert len(names) == 12 and names.count(OFFICIAL) == 1
    assert [result.name for result in results if result.headline] == [OFFICIAL]
    assert torch.equal(weights(tmp_path / "out" / "linear-sweep")[0], weights(uninterrupted / "linear")[0])


def test_a_fraction_is_balanced_seeded_and_nested(data, tmp_path):
    train, _ = open_labelled(str(data))  # 8, 7 and 7 images
    least, half = (balanced_fraction(train, fraction, seed=0) for fraction in (0.01, 0.5))
    assert np.bincount(least.labels).tolist() == [1, 1, 1]
    assert np.bincount(half.labels).tolist() == [4, 4, 4]
    names = [half.name(i) for i in range(len(half))]
    assert {least.name(i) for i in range(3)} < set(names)
    other = balanced_fraction(train, 0.5, seed=1)
    assert names != [other.name(i) for i in range(len(other))]
    write_colours(tmp_path / "train", 2, ("red", "blue"))
    write_colours(tmp_path / "train", 9, ("green",))
    few, _ = open_labelled(str(tmp_path))  # no val folder: some are held out
    assert np.bincount(balanced_fraction(few, 1.0, seed=0).labels, minlength=3).min() == 1


def test_few_shot(pretrained, data, tmp_path):
    results = linear(pretrained, data, tmp_path / "out", train_fraction=0.5, batch_size=12)
    assert results[0].train_fraction == 0.5 and results[0].details["num_train"] == 12
    assert (tmp_path / "out" / "linear-fraction-0.5").is_dir()
    with pytest.raises(UserError, match=r"train_fraction is 1\.5; expected above 0 and at most 1"):
        linear(pretrained, data, tmp_path / "out", train_fraction=1.5)


def test_a_saved_classifier_is_scored_as_it_was(pretrained, data, uninterrupted, tmp_path):
    file = uninterrupted / "linear" / "classifiers" / "3_blocks_both_lr_1.safetensors"
    again = linear(pretrained, data, tmp_path / "out", evaluate=file)[0]
    before = read_results(uninterrupted)[1]
    np.testing.assert_array_equal(again.correct, before.correct)
    assert (again.name, again.top1, again.top5) == (before.name, before.top1, before.top5)
    assert again.details == before.details
    assert not (tmp_path / "out" / "linear").exists()
    with pytest.raises(UserError, match="was trained on an encoder with other weights"):
        linear(pretrained, data, tmp_path / "out", evaluate=file, untrained="true")
    with pytest.raises(UserError, match="and sweep, num_blocks would train others; leave these out"):
        linear(pretrained, data, tmp_path / "out", evaluate=file, sweep="true", num_blocks=[1])
    write_colours(tmp_path / "two" / "train", 6, ("red", "blue"))
    with pytest.raises(UserError, match="'green' is in one of them only"):
        linear(pretrained, tmp_path / "two", tmp_path / "out", evaluate=file)


def test_damaged_weights_are_told_before_training(pretrained, data, tmp_path, monkeypatch):
    encoder = load_encoder(pretrained)
    encoder.backbone.norm.weight.data[3] = torch.nan
    monkeypatch.setattr(load, "load_encoder", lambda *_, **__: encoder)
    with pytest.raises(UserError, match="not finite"):
        linear(pretrained, data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_features_that_are_not_finite_end_the_run_before_a_checkpoint(
    pretrained, data, tmp_path, monkeypatch
):
    original = ProbeTraining.state

    def damage(self):
        state = original(self)
        encoders[0].backbone.norm.weight.data[3] = torch.nan
        return state

    encoders = [load_encoder(pretrained)]
    monkeypatch.setattr(load, "load_encoder", lambda *_, **__: encoders[0])
    monkeypatch.setattr(ProbeTraining, "state", damage)
    with pytest.raises(UserError, match="features of training images are not finite in epoch 2"):
        linear(pretrained, data, tmp_path / "out")
    assert load_latest(tmp_path / "out" / "linear")["epochs_done"] == 1


def test_an_unreadable_image_is_named_and_costs_nothing(pretrained, tmp_path):
    write_colours(tmp_path / "data" / "train", NUM_TRAIN)
    write_colours(tmp_path / "data" / "val", NUM_VAL)
    first, second = (sample_order(seed=0, epoch=epoch, num_samples=NUM_TRAIN) for epoch in (0, 1))
    bad = next(sample for sample in second[:16] if sample in first[16:])  # epoch 1 drops it
    train, _ = open_labelled(str(tmp_path / "data"))
    path = Path(train.name(int(bad)))
    whole = path.read_bytes()
    path.write_bytes(b"no picture")
    with pytest.raises(UserError, match=f"{path.name}: the image cannot be read"):
        linear(pretrained, tmp_path / "data", tmp_path / "out", learning_rates=[0.001, 1.0])
    assert load_latest(tmp_path / "out" / "linear")["epochs_done"] == 1
    path.write_bytes(whole)
    linear(pretrained, tmp_path / "data", tmp_path / "out", learning_rates=[0.001, 1.0])


def test_a_class_of_val_that_train_lacks_is_named(pretrained, tmp_path):
    write_colours(tmp_path / "data" / "train", 8, ("red", "green"))
    write_colours(tmp_path / "data" / "val", 3)
    with pytest.raises(UserError, match="class folder 'blue' does not exist in"):
        linear(pretrained, tmp_path / "data", tmp_path / "out")


@pytest.mark.parametrize(
    ("batch_size", "processes", "message"),
    [
        (1024, 1, "batch_size is 1024, but there are only 22 train images; give --batch_size 22 or less"),
        (1024, 4, "give --batch_size 20 or less"),
        (9, 2, "batch_size is 9, not divisible by 2 processes; give a multiple, such as 8"),
    ],
)
def test_a_batch_that_does_not_fit(batch_size, processes, message):
    with pytest.raises(UserError, match=message):
        check_batch_size(batch_size, 22, processes)
