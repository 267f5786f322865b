"""Key points of the learning-rate schedules, and what they refuse."""

import numpy as np
import pytest

from training.schedule import ScheduleConfig, make_schedule


def values(total_steps=100, **fields):
    schedule = make_schedule(ScheduleConfig(peak_lr=2.0, **fields), total_steps)
    return np.array([float(schedule(step)) for step in range(total_steps + 20)])


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_warm_up_is_linear_and_learns_from_the_first_step(kind):
    lr = values(kind=kind, warmup_steps=9)
    np.testing.assert_allclose(lr[:10], 2.0 * np.arange(1, 11) / 10, rtol=1e-6)


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_no_warm_up_starts_at_the_peak(kind):
    assert values(kind=kind, warmup_steps=0)[0] == 2.0


def test_cosine_halves_midway_and_ends_at_its_fraction():
    lr = values(kind="cosine", warmup_steps=20, final_lr_fraction=0.1)
    np.testing.assert_allclose(lr[60], (2.0 + 0.2) / 2, rtol=1e-5)
    np.testing.assert_allclose(lr[100:], 0.2, rtol=1e-5)
    assert (np.diff(lr[20:101]) < 0).all()


def test_wsd_holds_then_falls_linearly():
    lr = values(kind="wsd", warmup_steps=10, decay_fraction=0.25, final_lr_fraction=0.0)
    np.testing.assert_allclose(lr[10:76], 2.0, rtol=1e-6)
    np.testing.assert_allclose(lr[75:101], 2.0 * np.arange(25, -1, -1) / 25, rtol=1e-5, atol=1e-7)
    assert lr[99] > 0
    np.testing.assert_array_equal(lr[100:], 0)


def test_wsd_may_decay_from_the_end_of_the_warm_up():
    lr = values(kind="wsd", warmup_steps=20, decay_fraction=0.8, final_lr_fraction=0.5)
    np.testing.assert_allclose(lr[[20, 60, 100]], [2.0, 1.5, 1.0], rtol=1e-6)


def test_constant_stays():
    np.testing.assert_array_equal(values(kind="constant", warmup_steps=3)[3:], 2.0)


@pytest.mark.parametrize(
    "field", [{"peak_lr": 0.0}, {"warmup_steps": -1}, {"decay_fraction": 0.0}, {"final_lr_fraction": 1.5}]
)
def test_impossible_settings_are_named(field):
    with pytest.raises(ValueError, match=rf"optimizer\.schedule\.{next(iter(field))}="):
        ScheduleConfig(**field)


def test_warm_up_longer_than_the_run_is_an_error():
    with pytest.raises(ValueError, match=r"optimizer\.schedule\.warmup_steps=50 must be below the 50 steps"):
        make_schedule(ScheduleConfig(warmup_steps=50), 50)


def test_warm_up_and_decay_longer_than_the_run_are_an_error():
    with pytest.raises(ValueError, match=r"warmup_steps=60 and the 50 steps of optimizer\.schedule\.decay_fraction"):
        make_schedule(ScheduleConfig(kind="wsd", warmup_steps=60, decay_fraction=0.5), 100)
