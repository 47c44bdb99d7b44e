"""Schedules against the official ones, in float64."""

import numpy as np
import pytest

from dino_sparo.recipe.files import named_recipe, recipes
from dino_sparo.training.schedules import cosine_schedule, teacher_temp_schedule
from dino_sparo.training.setup import build_schedules
from tests.tiny import tiny_options


def test_golden_schedules(golden):
    arrays = golden("schedules")
    lr = cosine_schedule(0.001, 1e-6, 12 * 7, warmup_steps=3 * 7)
    np.testing.assert_allclose(lr, arrays["lr"], rtol=1e-12)
    np.testing.assert_allclose(cosine_schedule(0.04, 0.4, 12 * 7), arrays["weight_decay"], rtol=1e-12)
    np.testing.assert_allclose(cosine_schedule(0.996, 1.0, 12 * 7), arrays["momentum"], rtol=1e-12)
    np.testing.assert_allclose(teacher_temp_schedule(0.04, 0.07, 5, 12), arrays["teacher_temp"], rtol=1e-12)


def test_warm_up_longer_than_the_run():
    with pytest.raises(ValueError, match="warmup_steps is 11, expected 0 to total_steps = 10"):
        cosine_schedule(1.0, 0.0, 10, warmup_steps=11)
    with pytest.raises(ValueError, match="warmup_epochs is 3, expected 0 to epochs = 2"):
        teacher_temp_schedule(0.04, 0.07, 3, 2)


def test_whole_run_may_be_warm_up():
    np.testing.assert_allclose(cosine_schedule(1.0, 0.0, 3, warmup_steps=3), [0, 0.5, 1])


def test_schedules_of_a_run_follow_the_recipe():
    changes = {"loss__warmup_teacher_temp_epochs": 2, "loss__teacher_temp": 0.07}
    options = tiny_options("data", "run", **changes)
    schedules = build_schedules(options.optim, options.loss, steps_per_epoch=10)
    peak = options.optim.lr_per_256 * options.optim.global_batch_size / 256
    at = {step: schedules.at(step) for step in (0, 9, 10, 29)}
    assert at[0].lr == 0 and at[9].lr == at[10].lr == pytest.approx(peak) and at[29].lr < 0.02 * peak
    assert [hyper.teacher_temp for hyper in at.values()] == pytest.approx([0.04, 0.04, 0.07, 0.07])
    assert [hyper.freeze_last_layer for hyper in at.values()] == [True, True, False, False]
    assert at[0].momentum == options.optim.teacher_momentum
    assert at[29].weight_decay == pytest.approx(0.4, abs=0.002)


@pytest.mark.parametrize("name", recipes())
def test_a_run_takes_the_numbers_of_the_arrays_bit_for_bit(name):
    recipe, steps_per_epoch = named_recipe(name, {"data.path": "x"}), 37
    optim, loss, total = recipe.optim, recipe.loss, recipe.optim.epochs * steps_per_epoch
    schedules = build_schedules(optim, loss, steps_per_epoch)
    peak = optim.lr_per_256 * optim.global_batch_size / 256
    temps = (loss.warmup_teacher_temp, loss.teacher_temp, loss.warmup_teacher_temp_epochs, optim.epochs)
    expected = {
        "lr": cosine_schedule(peak, optim.final_lr, total, optim.warmup_epochs * steps_per_epoch),
        "weight_decay": cosine_schedule(optim.weight_decay, optim.final_weight_decay, total),
        "momentum": cosine_schedule(optim.teacher_momentum, 1.0, total),
        "teacher_temp": teacher_temp_schedule(*temps).repeat(steps_per_epoch),
    }
    at = [schedules.at(step) for step in range(total)]
    for field, numbers in expected.items():
        assert np.array_equal(numbers, [getattr(hyper, field) for hyper in at])


def test_schedules_are_those_of_numpy_bit_for_bit():
    rng = np.random.default_rng(0)
    for total, warmup in [(0, 0), (1, 0), (1, 1), (2, 1), (3, 2), (500, 1), (500, 2), (499, 499), (700, 33)]:
        for base, final, start in [(0.0, 0.0, 0.0), (1.0, 1.0, 1.0), *rng.uniform(0, 2, (4, 3)).tolist()]:
            progress = np.arange(total - warmup) / max(1, total - warmup)
            half_cosine = final + 0.5 * (base - final) * (1 + np.cos(np.pi * progress))
            expected = [*np.linspace(start, base, warmup), *half_cosine]
            assert np.array_equal(cosine_schedule(base, final, total, warmup, start), expected)
            expected = [*np.linspace(base, final, warmup), *[final] * (total - warmup)]
            assert np.array_equal(teacher_temp_schedule(base, final, warmup, total), expected)


def test_a_long_run_takes_no_memory_for_its_schedules():
    optim = named_recipe("photos_sparo", {"data.path": "x", "optim.epochs": 100_000}).optim
    schedules = build_schedules(optim, named_recipe("photos_sparo", {"data.path": "x"}).loss, 10**9)
    assert schedules.at(10**14 - 1).momentum == 1.0 == pytest.approx(schedules.at(10**13).momentum, abs=0.1)
