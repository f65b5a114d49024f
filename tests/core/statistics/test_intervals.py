"""Intervals against scipy, closed forms and cases worked by hand: ties, all wins, one prompt, images of one prompt."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from hgdpo_core.errors import InputError
from hgdpo_core.statistics.intervals import (
    RESAMPLES,
    Estimate,
    Interval,
    defect_change,
    mean_interval,
    percentile_interval,
    resample_sums,
    score_change,
    sign_test,
    win_rate_interval,
)

RNG = np.random.default_rng(0)


# --- score change


def test_change_is_the_paired_t_interval_and_the_sign_test():
    a, b = RNG.normal(0.3, 1, 60), RNG.normal(0, 1, 60)
    change = score_change(a, b)
    expected = stats.ttest_rel(a, b).confidence_interval()
    assert (change.ci_low, change.ci_high) == pytest.approx((expected.low, expected.high))
    assert change.mean == pytest.approx(np.mean(a - b)) == pytest.approx(change.mean_a - change.mean_b)
    assert change.sign_test_p == pytest.approx(stats.binomtest(int((a > b).sum()), 60).pvalue)
    assert change.as_dict()["tuned_mean"] == pytest.approx(a.mean())


def test_pairing_counts():
    """What both models share cancels: a small gain on very different prompts is sure."""
    b = RNG.normal(0, 100, 50)
    change = score_change(torch.from_numpy(b + 1 + RNG.normal(0, 0.1, 50)), b)
    assert change.ci_low is not None and 0.9 < change.ci_low < change.mean < 1.1


def test_several_images_are_averaged_first():
    assert score_change([[0.0, 4.0], [1.0, 1.0]], [[1.0, 1.0], [0.0, 0.0]]).mean == 1.0
    one, many = score_change([2.0, 3.0], [1.0, 5.0]), score_change([[1.0, 3.0], [3.0, 3.0]], [[1.0, 1.0], [4.0, 6.0]])
    assert one == many


def test_one_prompt_has_a_mean_and_no_interval():
    change = score_change([2.0], [1.5])
    assert (change.mean, change.ci_low, change.ci_high, change.sign_test_p) == (0.5, None, None, 1.0)


def test_sign_test_by_hand():
    assert sign_test(5, 0) == sign_test(0, 5) == pytest.approx(2 / 2**5)
    assert sign_test(4, 1) == pytest.approx(2 * (1 + 5) / 2**5)
    assert sign_test(3, 3) == 1.0
    assert sign_test(0, 0) == 1.0
    assert score_change([1.0, 1, 1, 1, 2], [1.0, 1, 1, 1, 1]).sign_test_p == 1.0  # four ties and one win


# --- resampling


def test_resampled_sums_are_sums_of_prompts_drawn_with_replacement():
    values = np.array([[1.0, 10.0], [100.0, 1000.0]])
    sums = resample_sums(values)
    assert sums.shape == (RESAMPLES, 2)
    assert {tuple(row) for row in sums} == {(2.0, 20.0), (101.0, 1010.0), (200.0, 2000.0)}
    assert np.mean(sums[:, 0] == 101.0) == pytest.approx(0.5, abs=0.02)
    np.testing.assert_array_equal(sums, resample_sums(values))
    assert not np.array_equal(sums, resample_sums(values, seed=1))


def test_many_prompts_are_resampled_in_chunks(monkeypatch):
    monkeypatch.setattr("hgdpo_core.statistics.intervals.CHUNK_ENTRIES", 3_000)
    sums = resample_sums(np.ones((1_000, 1)))
    assert sums.shape == (RESAMPLES, 1) and np.all(sums == 1_000)


def test_bootstrap_of_a_mean_is_what_scipy_makes_of_it():
    values = RNG.exponential(1, 80)
    ours = mean_interval(values)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=RESAMPLES, method="percentile",
                             rng=np.random.default_rng(5)).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.02)
    assert mean_interval(values[:1]) is None


def test_draws_that_tell_nothing_widen_the_interval():
    draws = np.concatenate([np.full(90, 1.0), np.full(10, np.nan)])
    assert percentile_interval(draws, unknown=(0.0, 2.0)) == Interval(0.0, 2.0)
    assert percentile_interval(draws) is None
    assert percentile_interval(draws[:90]) == Interval(1.0, 1.0)
    assert Estimate.of(1.0, None).as_dict() == {"value": 1.0, "ci_low": None, "ci_high": None}


# --- win rate


def test_win_rate_bootstrap_agrees_with_the_exact_interval_where_both_hold():
    a = (RNG.random(400) < 0.6).astype(float)
    interval = win_rate_interval(a, 1 - a)
    assert interval is not None
    expected = stats.binomtest(int(a.sum()), 400).proportion_ci(method="wilson")
    assert tuple(interval) == pytest.approx((expected.low, expected.high), abs=0.01)


def test_win_rate_bootstrap_of_ties_wins_and_one_prompt():
    assert win_rate_interval([1.0, 2.0], [1.0, 2.0]) is None  # nothing was decided
    assert win_rate_interval([2.0], [1.0]) is None
    assert win_rate_interval([2.0, 3.0, 4.0], [1.0, 1.0, 1.0]) == (1.0, 1.0)  # why the exact one is the headline
    # One win among nine ties: a resample without it (0.9^10 = 35 %) knows nothing.
    assert win_rate_interval([1.0] + [0.0] * 9, [0.0] * 10) == (0.0, 1.0)


# --- defects


def test_defects_by_hand():
    target = [[-1.0, 1.0], [-1.0, -2.0], [3.0, 4.0], [0.0, 1.0]]  # 1, 2, 0, 0 of 2 below 0; 0 itself is not below
    tuned = [[1.0, 1.0], [-1.0, 2.0], [3.0, 4.0], [1.0, 1.0]]  # 0, 1, 0, 0
    change = defect_change(tuned, target, below=0.0)
    assert (change.target, change.tuned, change.difference, change.n) == (3 / 8, 1 / 8, -1 / 4, 4)
    # Two of four prompts fell by 1/2. Resampled, the sum is binomial(4, 1/2) halves: P(0) = P(4) = 1/16 > 0.025.
    assert (change.ci_low, change.ci_high) == (-0.5, 0.0)
    assert list(change.as_dict()) == ["below", "target", "tuned", "difference", "ci_low", "ci_high", "n"]


def test_images_of_a_prompt_do_not_count_as_independent():
    """Four images that always go together say as much as one: the interval must not shrink."""
    single = RNG.normal(size=(2, 200, 1))
    repeated = np.repeat(single, 4, axis=2)
    assert defect_change(*repeated, below=0.0) == defect_change(*single, below=0.0)


def test_defect_interval_covers(monkeypatch):
    """200 evaluations whose true difference is -0.1: about 95 % of the intervals hold it."""
    monkeypatch.setattr("hgdpo_core.statistics.intervals.RESAMPLES", 1_000)
    held = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        target = np.where(rng.random(150) < 0.4, -1.0, 1.0)
        tuned = np.where((target < 0) & (rng.random(150) < 0.25), 1.0, target)
        change = defect_change(tuned, target, below=0.0)
        assert change.ci_low is not None and change.ci_high is not None
        held += change.ci_low <= -0.1 <= change.ci_high
    assert 180 <= held <= 199


def test_one_prompt_has_no_defect_interval():
    change = defect_change([[-1.0, 1.0]], [[1.0, 1.0]], below=0.0)
    assert (change.difference, change.ci_low, change.ci_high) == (0.5, None, None)


@pytest.mark.parametrize("function", [score_change, lambda a, b: defect_change(a, b, 0.0), win_rate_interval])
def test_scores_that_cannot_be_compared_are_refused(function):
    with pytest.raises(InputError, match="1 of 2 scores of A"):
        function([math.nan, 1.0], [0.0, 1.0])
    with pytest.raises(InputError, match="one shape"):
        function([1.0], [1.0, 2.0])


def test_nothing_to_resample_is_refused():
    with pytest.raises(InputError, match="at least one prompt"):
        resample_sums(np.zeros((0, 2)))
    for function in (score_change, lambda a, b: defect_change(a, b, 0.0)):
        with pytest.raises(InputError, match="at least one prompt"):
            function([], [])
