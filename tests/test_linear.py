"""The linear probe: the official protocol, resuming, one or several processes, and its options."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from dino_sparo.cli import evaluating
from dino_sparo.data import pil_views
from dino_sparo.data.images import normalize, to_tensor
from dino_sparo.data.sources import open_labeled
from dino_sparo.data.views import draw_view, sample_order
from dino_sparo.errors import UserError
from dino_sparo.evaluation import classifiers
from dino_sparo.evaluation import linear as module
from dino_sparo.evaluation.linear import fitting_batch_size, linear_probe
from dino_sparo.evaluation.probe_batches import training_crop
from dino_sparo.evaluation.probes import Probe, Probes
from dino_sparo.evaluation.results import read_results
from dino_sparo.evaluation.transfer import TestSet, balanced_fraction
from dino_sparo.interop import load
from dino_sparo.interop.load import load_encoder
from dino_sparo.runs.checkpoint import load_latest, save_checkpoint
from dino_sparo.runs.runlog import read_metrics
from tests.probing import (
    BATCH_SIZE,
    NUM_TRAIN,
    NUM_VAL,
    OFFICIAL,
    arguments,
    linear,
    options,
    pretrained_run,
    weights,
    write_colors,
    write_data,
)
from tests.running import PowerCutError
from tests.tiny import write_pictures


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


def reference(pretrained: Path, data: Path, learning_rate: float) -> torch.nn.Linear:
    """The official protocol as a simple loop."""
    encoder, (train, _) = load_encoder(pretrained), open_labeled(str(data))
    classifier = torch.nn.Linear(encoder.probe_features(torch.zeros(1, 3, 16, 16), 3).shape[1], 3)
    torch.nn.init.normal_(classifier.weight, 0.0, 0.01, generator=torch.Generator().manual_seed(0))
    torch.nn.init.zeros_(classifier.bias)
    optimizer = torch.optim.SGD(
        classifier.parameters(), learning_rate * BATCH_SIZE / 256, momentum=0.9, weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3, eta_min=0.0)
    for epoch in range(3):
        order = sample_order(seed=0, epoch=epoch, num_samples=NUM_TRAIN)
        for start in (0, BATCH_SIZE):
            batch = order[start : start + BATCH_SIZE].tolist()
            crops = []
            for sample in batch:
                image = train.load(sample)
                view = draw_view(
                    training_crop(16),
                    **{"seed": 0, "epoch": epoch, "sample": sample, "crop": 0},
                    image_width=image.width,
                    image_height=image.height,
                )
                box = (view.top, view.left, view.height, view.width)
                crop = TF.resized_crop(image, *box, [16, 16], InterpolationMode.BILINEAR)
                crops.append(normalize(to_tensor(TF.hflip(crop) if view.flip else crop)))
            with torch.no_grad():
                features = encoder.probe_features(torch.stack(crops), 3)
            optimizer.zero_grad()
            F.cross_entropy(classifier(features), torch.from_numpy(train.labels[batch])).backward()
            optimizer.step()
        schedule.step()
    return classifier


@pytest.mark.usefixtures("horizontal_first")
@pytest.mark.parametrize("learning_rate", [0.001, 1.0])
def test_training_is_the_official_protocol(learning_rate, pretrained, data, uninterrupted):
    expected = reference(pretrained, data, learning_rate)
    weight, bias = weights(uninterrupted / "linear", f"3 blocks both lr {learning_rate:g}")
    torch.testing.assert_close(weight, expected.weight.detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(bias, expected.bias.detach(), rtol=1e-5, atol=1e-7)
    initial = torch.empty_like(weight).normal_(0.0, 0.01, generator=torch.Generator().manual_seed(0))
    assert (weight - initial).abs().max() > 1e-5


def test_the_training_crop_is_torchvisions_default():
    areas, flips = [], 0
    for sample in range(400):
        place = {"seed": 0, "epoch": 0, "sample": sample, "crop": 0}
        view = draw_view(training_crop(16), **place, image_width=80, image_height=60)
        areas.append(view.height * view.width / 4800)
        flips += view.flip
    assert 0.07 < min(areas) < 0.12 and 0.9 < max(areas) <= 1 and 160 < flips < 240


def test_results(pretrained, data, uninterrupted, capsys):
    results = {result.name: result for result in read_results(uninterrupted)}
    assert list(results) == [OFFICIAL, "3 blocks both lr 1"]
    official = results[OFFICIAL]
    assert (official.protocol, official.test_set, official.weights) == ("linear", "val", "teacher")
    assert official.headline and not results["3 blocks both lr 1"].headline
    assert (official.num_images, official.num_classes) == (NUM_VAL, 3)
    encoder, (_, val) = load_encoder(pretrained), open_labeled(str(data))
    for name, result in results.items():
        weight, bias = weights(uninterrupted / "linear", name)
        crops = torch.stack([to_tensor(pil_views.center_crop(val.load(i), 16)) for i in range(NUM_VAL)])
        with torch.no_grad():
            logits = F.linear(encoder.probe_features(normalize(crops), 3), weight, bias)
        right = (logits.argmax(dim=1) == torch.from_numpy(val.labels)).numpy()
        np.testing.assert_array_equal(result.correct, right)
        assert result.top1 == pytest.approx(100 * right.mean()) and result.top5 == 100
        logged = [e[f"{name} top1"] for e in read_metrics(uninterrupted / "linear") if f"{name} top1" in e]
        assert len(logged) == 3 and logged[-1] == result.top1
        assert result.details["best_val_top1"] == max(logged)
        assert result.details["best_val_epoch"] == 1 + logged.index(max(logged))
    losses = [entry["loss"] for entry in read_metrics(uninterrupted / "linear") if "loss" in entry]
    assert len(losses) == 3 and losses[-1] < losses[0]


def test_a_prediction_is_a_class_of_the_test_set(data, monkeypatch):
    monkeypatch.setattr(classifiers, "ROWS_AT_ONCE", 2)
    _, val = open_labeled(str(data))
    probes = Probes([Probe("cls", 1, 0.1)], width=3, embed_dim=1, num_classes=3)
    probes.load_state_dict({"classifiers.0.weight": torch.eye(3), "classifiers.0.bias": torch.zeros(3)})
    features = {"blocks": np.array([[3, 2, 1]] * 5, np.float16), "encoding": np.zeros((5, 1), np.float16)}
    labels = np.array([1, 2, 1, 1, 2])
    for classes, right in (([0, 1, 2], [False] * 5), ([1, 2], labels == 1)):
        test_set = TestSet("x", val, labels, np.array(classes), (), ())
        found = classifiers.score(probes, test_set, features)
        assert found[:, 0].tolist() == [[top1, True] for top1 in right]


step_of_probes = Probes.step


def run_until(step: int, options: evaluating.LinearOptions, monkeypatch) -> None:
    """Run, and fail in the step after `step` steps of this start."""
    calls = []

    def breaking(*args):
        calls.append(1)
        if len(calls) > step:
            raise PowerCutError
        return step_of_probes(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Probes, "step", breaking)
        with pytest.raises(PowerCutError):
            evaluating.linear(options)


def assert_same_probes(ours: dict, theirs: dict) -> None:
    assert ours["best"] == theirs["best"]
    for name, value in theirs["probes"].items():
        assert torch.equal(ours["probes"][name], value)


def test_cached_probes_go_on_bit_for_bit_from_every_tenth_epoch(pretrained, data, tmp_path, monkeypatch):
    outs = tmp_path / "whole", tmp_path / "out"
    whole, broken = (options(pretrained, data, out, cached="true", epochs=23, batch_size=11) for out in outs)
    evaluating.linear(whole)
    run_until(12 * (NUM_TRAIN // 11) + 1, broken, monkeypatch)
    assert load_latest(outs[1] / "linear-cached")["epochs_done"] == 10
    evaluating.linear(broken)
    theirs, ours = (load_latest(out / "linear-cached") for out in outs)
    assert ours["epochs_done"] == theirs["epochs_done"] == 23
    assert_same_probes(ours, theirs)
    whole_log, our_log = ([e for e in read_metrics(o / "linear-cached") if "loss" not in e] for o in outs)
    assert our_log == whole_log and len(our_log) == 23


@pytest.mark.parametrize(("step", "workers"), [(1, 0), (3, 2), (5, 2)])
def test_interrupted_in_any_epoch(step, workers, pretrained, data, uninterrupted, tmp_path, monkeypatch):
    out = tmp_path / "out"
    given = options(pretrained, data, out, num_workers=workers, learning_rates=[0.001, 1.0])
    run_until(step, given, monkeypatch)
    interrupted = load_latest(out / "linear")
    assert (0 if interrupted is None else interrupted["epochs_done"]) == step // 2
    evaluating.linear(given)
    ours, theirs = load_latest(out / "linear"), load_latest(uninterrupted / "linear")
    assert_same_probes(ours, theirs)
    for number, state in theirs["optimizer"]["state"].items():
        assert torch.equal(ours["optimizer"]["state"][number]["momentum_buffer"], state["momentum_buffer"])
    for name in ("epochs_done", "config", "schedule", "step"):
        assert ours[name] == theirs[name]
    assert logged_values(out) == logged_values(uninterrupted)
    for name in (OFFICIAL, "3 blocks both lr 1"):
        assert torch.equal(weights(out / "linear", name)[0], weights(uninterrupted / "linear", name)[0])


def logged_values(out: Path) -> list[dict]:
    clock = ("seconds", "images_per_second", "data_wait_share", "log_share")
    return [{k: v for k, v in entry.items() if k not in clock} for entry in read_metrics(out / "linear")]


def test_a_complete_run_is_only_scored(pretrained, data, uninterrupted, tmp_path, monkeypatch):
    monkeypatch.setattr(Probes, "step", None)
    before = (uninterrupted / "results.json").read_text()
    half = tmp_path / "half"
    write_colors(half, 4, ("red", "blue"))
    write_colors(half, 5, ("green",))
    (half / "green").rename(half / "violet")
    results = linear(
        pretrained, data, uninterrupted, learning_rates=[0.001, 1.0], test=json.dumps([f"half={half}"])
    )
    assert [result.test_set for result in results] == ["val", "val", "half", "half"]
    assert (results[2].num_images, results[2].num_classes, results[2].top5) == (4, 2, 100)
    assert "violet" in results[2].details["remark"]
    (uninterrupted / "results.json").write_text(before)


@pytest.mark.long
def test_three_processes_are_the_same_probe_and_resume_bit_for_bit(pretrained, data, tmp_path):
    """The order of summation must not depend on the step at which a start resumed."""
    out, alone = tmp_path / "out", tmp_path / "alone"
    given = {"learning_rates": [0.001, 1.0], "batch_size": 9}
    command = [sys.executable, "-m", "dino_sparo", "linear", *arguments(pretrained, data, out, **given)]
    run = partial(subprocess.run, [*command, "--nproc=3"], capture_output=True, text=True, check=True)
    assert run().stdout.count(OFFICIAL) == 1
    whole, results = load_latest(out / "linear"), read_results(out)
    for one, other in zip(results, linear(pretrained, data, alone, **given), strict=True):
        assert (one.name, one.top1, one.num_images) == (other.name, other.top1, NUM_VAL)
        np.testing.assert_array_equal(one.correct, other.correct)
        ours, theirs = (weights(place / "linear", one.name) for place in (out, alone))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    last = out / "linear" / "checkpoints" / "step_000000006.pt"
    last.unlink()  # as if it had been killed in the third epoch
    run()
    assert last.exists()
    assert_same_probes(load_latest(out / "linear"), whole)
    assert len(logged_values(out)) == 6


# --- What options train, and what is refused


def test_curves_for_tensorboard_are_written_only_where_asked(pretrained, data, uninterrupted, tmp_path):
    assert not [*uninterrupted.rglob("*tfevents*")]
    linear(pretrained, data, tmp_path / "out", cached=True, tensorboard=str(tmp_path / "probes"))
    assert not [*(tmp_path / "out").rglob("*tfevents*")]
    tags = EventAccumulator(str(tmp_path / "probes")).Reload().Tags()["scalars"]
    assert "probe/loss" in tags and {tag.partition("/")[0] for tag in tags} == {"probe"}
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt is a file; give a folder"):
        linear(pretrained, data, tmp_path / "out", cached=True, tensorboard=str(tmp_path / "notes.txt"))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_in_a_notebook(pretrained, data, uninterrupted, tmp_path):
    """Calling the function without options or a cache trains the same probe."""
    train, val = open_labeled(str(data))
    found = linear_probe(load_encoder(pretrained), train, val, tmp_path, epochs=3, batch_size=BATCH_SIZE)
    expected = read_results(uninterrupted)[0]
    assert [(one.name, one.top1) for one in found] == [(OFFICIAL, expected.top1)]
    np.testing.assert_array_equal(found[0].correct, expected.correct)
    found, expected = (weights(folder / "linear")[0] for folder in (tmp_path, uninterrupted))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)  # there one of two in a product


@pytest.mark.parametrize(
    "changes",
    [{"config": {}}, {"epochs_done": "3"}, {"epochs_done": 10**9}, {"best": [[1.0, 0]] * 3}, {"probes": {}}],
)
def test_a_checkpoint_that_holds_no_probes_is_refused_by_its_folder(
    pretrained, data, uninterrupted, tmp_path, changes
):
    content = torch.load(next(uninterrupted.glob("linear/checkpoints/*6.pt")), weights_only=True)
    path = tmp_path / "linear" / "checkpoints" / "step_000000006.pt"
    path.parent.mkdir(parents=True)
    torch.save(content | changes, path)
    with pytest.raises(UserError, match=rf"{tmp_path}/linear has a checkpoint that holds no probes"):
        linear(pretrained, data, tmp_path, learning_rates=[0.001, 1.0], resume_unverified=True)


def test_other_settings_in_the_same_folder_are_refused(pretrained, data, uninterrupted):
    for changes, message in (
        ({"epochs": 4}, "epochs was 3, now 4"),
        ({"seed": 1}, "seed was 0, now 1"),
        ({"learning_rates": [0.1]}, "probes was "),
    ):
        given = {"learning_rates": [0.001, 1.0]} | changes
        with pytest.raises(UserError, match=rf"holds probes with other settings \({message}.*another --out"):
            linear(pretrained, data, uninterrupted, **given)


def test_other_images_of_the_same_names_are_told(pretrained, tmp_path, caplog):
    for side, told in ((16, False), (17, True)):
        write_pictures(tmp_path / "data", 30, classes=3, side=side)
        linear(pretrained, tmp_path / "data", tmp_path / "out", epochs=1)
        assert ("before these changed: train files and val files" in caplog.text) is told


def test_cached_probes_are_not_called_official(pretrained, data, tmp_path, capsys):
    out = tmp_path / "out"
    results = linear(pretrained, data, out, cached="true", learning_rates=[30.0], epochs=40)
    assert [(result.protocol, result.headline) for result in results] == [("linear-cached", False)]
    assert results[0].top1 == 100  # the colors are easy, if anything is learned
    assert "not the official protocol" in capsys.readouterr().out
    results = linear(pretrained, data, out)
    assert {result.protocol for result in results} == {"linear", "linear-cached"}
    assert sorted(path.name for path in out.glob("[!.]*")) == ["linear", "linear-cached", "results.json"]


def test_a_sweep_holds_the_official_probe_as_it_is_alone(pretrained, data, uninterrupted, tmp_path):
    results = linear(pretrained, data, tmp_path / "out", sweep="true")
    names = [result.name for result in results]
    assert len(names) == 12 and names.count(OFFICIAL) == 1
    assert [result.name for result in results if result.headline] == [OFFICIAL]
    found = weights(tmp_path / "out" / "linear-sweep")[0]
    torch.testing.assert_close(found, weights(uninterrupted / "linear")[0], rtol=1e-5, atol=1e-7)


def test_a_fraction_is_balanced_seeded_and_nested(data, tmp_path):
    train, _ = open_labeled(str(data))  # 8, 7 and 7 images
    least, half = (balanced_fraction(train, fraction, seed=0) for fraction in (0.01, 0.5))
    assert np.bincount(least.labels).tolist() == [1, 1, 1]
    assert np.bincount(half.labels).tolist() == [4, 4, 4]
    names = [half.name(i) for i in range(len(half))]
    assert {least.name(i) for i in range(3)} < set(names)
    other = balanced_fraction(train, 0.5, seed=1)
    assert names != [other.name(i) for i in range(len(other))]
    write_colors(tmp_path / "train", 2, ("red", "blue"))
    write_colors(tmp_path / "train", 9, ("green",))
    few, _ = open_labeled(str(tmp_path))  # no val folder: some are held out
    assert np.bincount(balanced_fraction(few, 1.0, seed=0).labels, minlength=3).min() == 1


def test_few_shot(pretrained, data, tmp_path):
    results = linear(pretrained, data, tmp_path / "out", train_fraction=0.5, batch_size=12)
    assert results[0].train_fraction == 0.5 and results[0].details["num_train"] == 12
    assert (tmp_path / "out" / "linear-fraction-0.5").is_dir()
    with pytest.raises(UserError, match=r"train_fraction is 1\.5; expected a number above 0 and at most 1"):
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
    def damage(*args, **options):
        save_checkpoint(*args, **options)
        encoder.backbone.norm.weight.data[3] = torch.nan

    encoder = load_encoder(pretrained)
    monkeypatch.setattr(load, "load_encoder", lambda *_, **__: encoder)
    monkeypatch.setattr(module, "save_checkpoint", damage)
    with pytest.raises(UserError, match="features of train images are not finite in epoch 2"):
        linear(pretrained, data, tmp_path / "out")
    assert load_latest(tmp_path / "out" / "linear")["epochs_done"] == 1


def test_an_unreadable_image_is_named_and_costs_nothing(pretrained, tmp_path):
    write_colors(tmp_path / "data" / "train", NUM_TRAIN)
    write_colors(tmp_path / "data" / "val", NUM_VAL)
    first, second = (sample_order(seed=0, epoch=epoch, num_samples=NUM_TRAIN) for epoch in (0, 1))
    bad = next(sample for sample in second[:16] if sample in first[16:])  # epoch 1 drops it
    train, _ = open_labeled(str(tmp_path / "data"))
    path = Path(train.name(int(bad)))
    whole = path.read_bytes()
    path.write_bytes(b"no picture")
    with pytest.raises(UserError, match=f"{path.name}: the image cannot be read"):
        linear(pretrained, tmp_path / "data", tmp_path / "out", learning_rates=[0.001, 1.0])
    assert load_latest(tmp_path / "out" / "linear")["epochs_done"] == 1
    path.write_bytes(whole)
    linear(pretrained, tmp_path / "data", tmp_path / "out", learning_rates=[0.001, 1.0])


def test_a_batch_that_does_not_fit(caplog):
    assert fitting_batch_size(1024, 22, processes=4) == 20
    assert "batch_size is 1024, but there are only 22 train images; using 20" in caplog.text
    assert fitting_batch_size(22, 22, processes=2) == 22
    with pytest.raises(UserError, match=r"batch_size is 9 .* not divisible by 2 processes; .* such as 8"):
        fitting_batch_size(9, 22, 2)
    with pytest.raises(UserError, match=r"3 train images for 4 processes; use fewer"):
        fitting_batch_size(8, 3, 4)
