"""When a step time changed: every change that is large enough, soon, and none where there is none."""

import itertools

import numpy as np
import pytest

from perf.change_point import LEAST, STRIDE, WINDOW, ChangeDetector, changes, find_change, rank_scores

NOISES = {
    "normal": lambda draw, count: 0.3 + 0.01 * draw.standard_normal(count),
    # Steps of up to a hundred times the usual length.
    "heavy tail": lambda draw, count: 0.3 + 0.005 * np.abs(draw.standard_cauchy(count)),
    "lognormal": lambda draw, count: 0.3 + 0.01 * draw.lognormal(0, 1.5, count),
    # One reading in ten comes late and makes the next interval short.
    "late readings": lambda draw, count: 0.3 + late(draw, count),
}


def late(draw: np.random.Generator, count: int) -> np.ndarray:
    shift = 0.1 * (draw.random(count) < 0.1)
    return shift - np.roll(shift, 1) + 0.002 * draw.standard_normal(count)


@pytest.mark.parametrize("noise", NOISES)
def test_steps_without_a_change_raise_no_alarm(noise):
    draws = (np.random.default_rng(seed) for seed in range(60))
    assert [changes(NOISES[noise](draw, 200)) for draw in draws] == [()] * 60


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("ratio", [0.9, 1.1])
def test_a_change_of_a_tenth_is_found_where_it_is(noise, ratio):
    for seed in range(20):
        values = NOISES[noise](np.random.default_rng(seed), 300)
        values[200:] *= ratio
        found = changes(values)
        assert len(found) == 1, (seed, found)
        # It is told on few values after it: of noise with such tails they say less.
        places, error = (15, 0.06) if noise == "lognormal" else (6, 0.04)
        assert abs(found[0].index - 200) <= places
        assert found[0].ratio == pytest.approx(ratio, abs=error)


def test_it_is_told_within_twenty_steps():
    for seed in range(20):
        values = NOISES["normal"](np.random.default_rng(seed), 300)
        values[200:] *= 1.1
        detector = ChangeDetector()
        told = next(number for number, value in enumerate(values) if detector.update(value) is not None)
        assert 200 < told < 220


def test_a_burst_has_a_beginning_and_an_end():
    values = NOISES["normal"](np.random.default_rng(0), 600)
    values[300:340] *= 1.2
    assert [round(found.ratio, 1) for found in changes(values)] == [1.2, 0.8]
    assert [abs(found.index - at) <= 2 for found, at in zip(changes(values), (300, 340), strict=True)] == [True] * 2


def test_a_change_below_the_threshold_is_not_told():
    values = np.concatenate([np.full(100, 0.3), np.full(100, 0.306)]) + np.linspace(0, 1e-6, 200)
    assert changes(values) == ()
    assert [round(found.ratio, 2) for found in changes(values, threshold=0.01)] == [1.02]


def test_equal_values_have_no_change():
    assert find_change(np.full(100, 0.3)) is None
    assert find_change(np.array([0.3] * 50 + [0.4] * 50)).index == 50


def test_the_rank_sum_is_that_of_all_pairs():
    # The statistic by its definition: how often a later value is larger than an earlier one.
    values = np.random.default_rng(1).integers(1, 40, 60).astype(float)
    values[37:] += 20
    for split, score in zip(range(LEAST, 61 - LEAST), rank_scores(values), strict=True):
        wins = sum((b > a) + 0.5 * (b == a) for a, b in itertools.product(values[:split], values[split:]))
        ties = np.unique(values, return_counts=True)[1]
        variance = split * (60 - split) / 12 * (61 - (ties**3 - ties).sum() / (60 * 59))
        assert score == pytest.approx(abs(wins - split * (60 - split) / 2) / np.sqrt(variance))


def test_the_window_is_bounded():
    detector = ChangeDetector()
    for value in 0.3 + 0.01 * np.random.default_rng(0).standard_normal(2000):
        detector.update(value)
    assert len(detector._window) <= WINDOW + STRIDE
