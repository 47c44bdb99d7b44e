"""Schedules against the official ones, in float64."""

import numpy as np
import pytest

from dino_sparo.training.schedules import cosine_schedule, teacher_temp_schedule


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
