"""Means over prompts and seeds: values, intervals over both, paired differences."""

import numpy as np
import pytest

from hgdpo_core.ablate.result import colour_statistic, difference, estimate, first, outcomes, rate, win_rate_estimate
from hgdpo_core.statistics.intervals import Estimate


def ends(estimate: Estimate) -> tuple[float, float]:
    assert estimate.ci_low is not None and estimate.ci_high is not None
    return estimate.ci_low, estimate.ci_high


def test_a_win_rate_counts_decided_prompts_of_all_seeds():
    gains = np.array([[1.0, -1.0, 0.0, 2.0], [1.0, 1.0, 0.0, -2.0]])
    result = win_rate_estimate(gains)
    assert result.value == pytest.approx(4 / 6)
    assert 0 <= result.ci_low < 4 / 6 < result.ci_high <= 1


def test_the_interval_is_as_wide_as_the_exact_one_and_seeds_widen_it():
    """One seed, 400 prompts at 70 %: near the normal interval of a proportion, +-4.5 points."""
    rng = np.random.default_rng(0)
    one = np.where(rng.random((1, 400)) < 0.7, 1.0, -1.0)
    low, high = ends(win_rate_estimate(one))
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.7 * 0.3 / 400), rel=0.1)
    same = np.repeat(one, 3, axis=0)  # three equal seeds do not narrow the interval
    assert np.ptp(ends(win_rate_estimate(same))) == pytest.approx(high - low, rel=0.1)
    differing = np.stack([np.where(rng.random(400) < chance, 1.0, -1.0) for chance in (0.5, 0.7, 0.9)])
    assert np.ptp(ends(win_rate_estimate(differing))) > 2 * (high - low)


def test_where_all_prompts_are_won_the_exact_interval_remains():
    high_side = win_rate_estimate(np.ones((2, 10)))
    assert (high_side.value, high_side.ci_low, high_side.ci_high) == (1.0, pytest.approx(0.6915, abs=1e-4), 1.0)
    low_side = win_rate_estimate(-np.ones((2, 10)))
    assert (low_side.value, low_side.ci_low) == (0.0, 0.0) and low_side.ci_high == pytest.approx(0.3085, abs=1e-4)


def test_a_win_rate_without_wins_and_losses_is_undefined():
    assert win_rate_estimate(np.zeros((2, 5))) == Estimate(None, None, None)


def test_a_difference_is_taken_in_pairs():
    """Two arms that share their noise differ by exactly their shift; an arm differs from itself by nothing."""
    rng = np.random.default_rng(1)
    values = rng.normal(size=(3, 200, 1))
    assert difference(values, values, first) == Estimate(0.0, 0.0, 0.0)
    shifted = difference(values + 0.1, values, first)
    assert (shifted.value, *ends(shifted)) == pytest.approx((0.1, 0.1, 0.1))
    alone = estimate(values, first)
    assert alone.ci_high - alone.ci_low > 0.2


def test_win_rates_of_two_arms_in_pairs():
    gains = np.array([[1.0] * 60 + [-1.0] * 40])
    better = np.array([[1.0] * 70 + [-1.0] * 30])
    gap = difference(outcomes(better), outcomes(gains), rate)
    assert gap.value == pytest.approx(0.1) and gap.ci_low > 0


def test_colours_are_signed_changes_and_angles_are_not_split():
    def channels(hue, saturation, value, degrees, rgb):
        return [hue, saturation, value, np.cos(np.radians(degrees)), np.sin(np.radians(degrees)), *rgb]

    values = np.array([[channels(0.6, 0.5, 0.4, 175, (110, 100, 90)) + channels(0.5, 0.5, 0.5, -175, (100, 100, 100))]])
    means = values.mean(axis=(0, 1))
    expected = {"hue": 20.0, "saturation": 0.0, "value": -20.0, "hue_degrees": -10.0, "warmth": 20.0,
                "distance": np.sqrt(200)}
    for name, number in expected.items():
        assert colour_statistic(name, values)(means) == pytest.approx(number), name
    half_turn = np.array([[channels(0.5, 0.5, 0.5, 179, (1, 1, 1)) + channels(0.5, 0.5, 0.5, 0, (1, 1, 1))]])
    statistic = colour_statistic("hue_degrees", half_turn)
    beyond = half_turn.copy()
    beyond[..., 3:5] = [np.cos(np.radians(181)), np.sin(np.radians(181))]
    assert statistic(beyond.mean(axis=(0, 1))) == pytest.approx(181)  # beside 179, not at -179
