"""Monitored numbers mean what their names say."""

import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

from dino_sparo.cli.pretraining import pretrain
from dino_sparo.errors import UserError
from dino_sparo.models import build_encoder
from dino_sparo.training import pretrain as program
from dino_sparo.training.monitor import (
    ALARM_ENTRIES,
    ALARM_STEPS,
    CollapseAlarm,
    TeacherStatistics,
    evaluate_teacher,
    open_knn_images,
)
from tests.tiny import tiny_options, write_pictures

K = 8


def metrics(teacher_logits, encodings=None, parts=1):
    statistics = TeacherStatistics()
    encodings = torch.randn(len(teacher_logits), 4) if encodings is None else encodings
    for rows, features in zip(teacher_logits.softmax(-1).chunk(parts), encodings.chunk(parts), strict=True):
        statistics.add(rows, features)
    return {name: value.item() for name, value in statistics.metrics().items()}


def test_uniform_and_one_hot_teachers():
    log_k = pytest.approx(math.log(K))
    uniform, spread = metrics(torch.zeros(K, K)), metrics(1000 * torch.eye(K))
    one_answer = metrics(1000 * torch.eye(K)[:1].repeat(K, 1))
    assert uniform["entropy_teacher"] == uniform["entropy_mean"] == spread["entropy_mean"] == log_k
    assert spread["entropy_teacher"] == pytest.approx(0)
    assert one_answer["entropy_mean"] == pytest.approx(0)


def test_micro_batches_make_the_numbers_of_the_whole_batch():
    logits, encodings = 3 * torch.randn(12, K), torch.randn(12, 5)
    whole = metrics(logits, encodings)
    directions = encodings / encodings.norm(dim=-1, keepdim=True)
    assert whole["feature_std"] == pytest.approx(directions.std(dim=0).mean().item() * math.sqrt(5))
    for parts in (2, 6):
        assert metrics(logits, encodings, parts) == pytest.approx(whole)
    alone = metrics(logits[-2:], encodings[-2:])
    assert alone["entropy_mean"] != pytest.approx(whole["entropy_mean"], rel=0.01)


def test_feature_std_is_one_on_the_sphere_and_zero_when_collapsed():
    for encodings, expected, tolerance in ((torch.randn(4096, 64), 1, 0.02), (torch.ones(8, 64), 0, 1e-6)):
        found = metrics(torch.zeros(len(encodings), K), encodings)
        assert found["feature_std"] == pytest.approx(expected, abs=tolerance)


def test_monitor_needs_classes_and_says_what_is_missing(tmp_path, caplog):
    caplog.set_level("INFO", logger="dino_sparo")
    write_pictures(tmp_path / "one", 40)
    write_pictures(tmp_path / "few", 12, classes=2)
    missing = {"one/train/class0": "not in class folders", "few": "10 train and 2 test images"}
    for name, message in (missing | {"one": "only one class"}).items():
        caplog.clear()
        assert open_knn_images(None, str(tmp_path / name), None) is None
        assert message in caplog.text and "no k-NN during training" in caplog.text
    missing["nowhere"] = r"^monitor\.knn_path '.*nowhere' does not exist"
    for name, message in missing.items():
        with pytest.raises(UserError, match=message):
            open_knn_images(str(tmp_path / name), "anywhere", None)


def test_monitor_takes_so_many_a_class(tmp_path):
    write_pictures(tmp_path, 200, classes=2)
    for number, sizes in ((15, [30, 30]), (None, [160, 40])):
        assert [len(images) for images in open_knn_images(None, str(tmp_path), number)] == sizes


# --- Collapse

LOG_K = math.log(65536)
HEALTHY = (4.0, 8.0)
SICK = {
    "uniform": (0.995 * LOG_K, 0.999 * LOG_K),
    "one-hot": (0.005 * LOG_K, 6.0),
    "equal for all images": (4.0, 4.0 + 0.009 * LOG_K),
}


def alarms(entries, armed_from_step=0, log_every_steps=1):
    """Steps and words of the alarms of a run that has these answers at its steps 1, 2, ..."""
    alarm = CollapseAlarm(65536, armed_from_step)
    logged = [(s, entry) for s, entry in enumerate(entries, start=1) if s % log_every_steps == 0]
    said = [(step, alarm.check(step, *entry)) for step, entry in logged]
    return [(step, words) for step, words in said if words]


@pytest.mark.parametrize("sign", SICK)
def test_the_alarm_comes_once_and_says_what_to_try(sign):
    ((step, words),) = alarms([HEALTHY] * 5 + [SICK[sign]] * 90)
    assert step == 6 + ALARM_STEPS and sign in words and "\n" not in words
    for remedy in ("loss.teacher_temp", "optim.lr_per_256", "optim.global_batch_size"):
        assert remedy in words
    if sign != "uniform":
        assert "head.norm_last_layer" in words and "optim.freeze_last_layer_epochs" in words


@pytest.mark.parametrize("log_every_steps", range(1, 13))
def test_a_collapse_at_any_step_is_told_within_fifty(log_every_steps):
    for healthy in range(40, 40 + log_every_steps):
        run = [HEALTHY] * healthy + [SICK["equal for all images"]] * 90
        ((step, _),) = alarms(run, log_every_steps=log_every_steps)
        assert healthy + ALARM_STEPS <= step <= healthy + 50


def test_where_little_is_logged_three_entries_are_enough():
    run = [HEALTHY] * 100 + [SICK["equal for all images"]] * 300
    assert [step for step, _ in alarms(run, log_every_steps=50)] == [100 + 50 * ALARM_ENTRIES]


def test_a_collapse_may_change_its_sign():
    run = [entry for entry in (SICK.values()) for _ in range(ALARM_STEPS // 2)]
    ((step, words),) = alarms(run)
    assert step == 1 + ALARM_STEPS and [*SICK][2] in words


def test_no_alarm_for_what_does_not_last_or_just_stays_within_bounds():
    sick = SICK["one-hot"]
    assert not alarms(([sick] * ALARM_STEPS + [HEALTHY]) * 5)
    assert not alarms(([sick] * 100 + [HEALTHY] * 50) * 3, log_every_steps=50)  # two entries each
    within = [(0.985 * LOG_K, LOG_K), (0.015 * LOG_K, 1.0), (4.0, 4.0 + 0.011 * LOG_K)]
    assert not alarms([entry for entry in within for _ in range(2 * ALARM_STEPS)])


def test_alarm_is_armed_after_warm_up_and_comes_again_after_recovery():
    sick = SICK["equal for all images"]
    assert [step for step, _ in alarms([sick] * 90, armed_from_step=20)] == [21 + ALARM_STEPS]
    again = [sick] * 40 + [HEALTHY] + [sick] * 40
    assert [step for step, _ in alarms(again)] == [1 + ALARM_STEPS, 42 + ALARM_STEPS]


def constant(logits):
    return 10 * torch.eye(logits.shape[1])[0].expand_as(logits)  # the center will take it up


INJECTED_AT, NUM_STEPS = 31, 81


@pytest.mark.parametrize(
    ("collapsed", "log_every_steps"),
    [
        pytest.param(None, 1, marks=pytest.mark.long),
        (constant, 1),
        pytest.param(torch.zeros_like, 10, marks=pytest.mark.long),
    ],
)
def test_a_run_is_warned_of_a_collapse_and_only_then(
    tmp_path, monkeypatch, capsys, collapsed, log_every_steps
):
    cells = np.random.default_rng(0).integers(0, 256, (8, 3, 3, 3), dtype=np.uint8)
    for number, cell in enumerate(cells):  # pictures that even a tiny network tells apart
        Image.fromarray(cell).resize((24, 24), Image.Resampling.NEAREST).save(tmp_path / f"{number}.png")
    changes = {"global_batch_size": 8, "epochs": NUM_STEPS, "warmup_epochs": 20, "lr_per_256": 1e-4}
    options = {f"optim__{name}": value for name, value in changes.items()}
    options |= {"model__drop_path_rate": 0, "head__hidden_dim": 32, "head__bottleneck_dim": 16}
    options |= {"views__num_local_crops": 0, "views__jitter_probability": 0}
    train_step, done = program.train_step, 0

    def train_step_with_collapse(state, *args, **kwargs):
        nonlocal done
        done += 1
        if collapsed and done == INJECTED_AT:
            healthy = state.teacher.forward

            def answer(crop_groups):
                logits, encodings = healthy(crop_groups)
                return collapsed(logits), encodings

            monkeypatch.setattr(state.teacher, "forward", answer)
        return train_step(state, *args, **kwargs)

    monkeypatch.setattr(program, "train_step", train_step_with_collapse)
    pretrain(tiny_options(tmp_path, tmp_path / "run", log__log_every_steps=log_every_steps, **options))
    assert done == NUM_STEPS == INJECTED_AT + 50
    warned_at = re.findall(r"WARNING: step (\d+): collapse: ", capsys.readouterr().err)
    assert len(warned_at) == (1 if collapsed else 0)
    assert all(int(step) >= INJECTED_AT + ALARM_STEPS for step in warned_at)


def test_an_encoder_that_answers_with_zeros_ends_the_run_in_words(tmp_path):
    write_pictures(tmp_path, 60, classes=2)
    encoder = build_encoder({"width": 16, "depth": 2, "num_heads": 2}, 8, 16, readout="cls").eval()
    with torch.no_grad():
        encoder.backbone.norm.weight.zero_()
        encoder.backbone.norm.bias.zero_()
    with pytest.raises(UserError, match="k-NN during training: the feature of test image 0 is zero"):
        evaluate_teacher(encoder, open_knn_images(None, str(tmp_path), None), image_size=16)
