"""The drift numbers on rankings worked out by hand."""

import json
import math

import numpy as np
import pytest

from hgdpo_core.errors import InputError
from hgdpo_core.rescore.drift import ranking_drift

NAN = float("nan")
BEFORE = np.array([[1.0, 2, 3, 4]] * 6)
NOW = np.array([
    [10.0, 20, 30, 40],     # the same ranking on another scale
    [1.0, 2, 4, 3],         # one of six pairs reversed: tau = (5 - 1) / 6; another winner
    [4.0, 3, 2, 1],         # reversed: another winner, another loser
    [1.0, 1, 2, 3],         # one pair tied: tau-b = 5 / sqrt(6 * 5); the loser stays, ties go to the lower index
    [5.0, 5, 5, 5],         # no ranking, no pair
    [1.0, NAN, 3, 4],       # no pair
])


def test_known_permutations():
    drift = ranking_drift(BEFORE, NOW)
    assert drift.taus == pytest.approx([1, 4 / 6, -1, 5 / math.sqrt(30), NAN, NAN], nan_ok=True)
    assert drift.winners.tolist() == [[3, 3], [3, 2], [3, 0], [3, 3], [3, -1], [3, -1]]
    assert drift.losers.tolist() == [[0, 0], [0, 0], [0, 3], [0, 0], [0, -1], [0, -1]]
    assert drift.winner_flipped.tolist() == [False, True, True, False, False, False]
    assert drift.loser_flipped.tolist() == [False, False, True, False, False, False]


def test_fractions_are_of_pools_with_a_pair_both_times():
    summary = ranking_drift(BEFORE, NOW).summary()
    assert (summary["prompts"], summary["pairs_compared"]) == (6, 4)
    assert (summary["pairs_lost"], summary["pairs_gained"]) == (2, 0)
    assert summary["winner_flipped"] == {"prompts": 2, "share": 0.5}
    assert summary["loser_flipped"] == {"prompts": 1, "share": 0.25}
    assert summary["winner_or_loser_flipped"] == {"prompts": 2, "share": 0.5}
    taus = [1, 4 / 6, -1, 5 / math.sqrt(30)]
    assert summary["tau"]["mean"] == pytest.approx(sum(taus) / 4)
    assert summary["tau"]["median"] == pytest.approx((4 / 6 + 5 / math.sqrt(30)) / 2)
    assert summary["tau"]["min"] == -1 and summary["tau"]["undefined"] == 2
    assert summary["tau"]["histogram"] == [1, 0, 0, 0, 0, 0, 0, 0, 1, 2]    # 0.2 each: -1; 0.67; 0.91 and 1
    assert ranking_drift(NOW, BEFORE).summary()["pairs_gained"] == 2


def test_undefined_values_are_null():
    summary = ranking_drift(BEFORE[4:], NOW[4:]).summary()
    assert summary["tau"]["mean"] is None and summary["tau"]["min"] is None
    assert summary["winner_flipped"] == {"prompts": 0, "share": None}
    json.dumps(summary, allow_nan=False)


@pytest.mark.parametrize(("before", "now"), [((2, 4), (2, 3)), ((2, 4), (3, 4)), ((5,), (5,)), ((5, 1), (5, 1))])
def test_only_rankings_of_the_same_pools_compare(before, now):
    with pytest.raises(InputError, match="N >= 2"):
        ranking_drift(np.zeros(before), np.zeros(now))


def test_two_images_per_prompt_have_a_tau():
    """SciPy divides by n - 2 for a p-value that is not used."""
    before, now = np.array([[1.0, 2], [1, 2], [1, 2]]), np.array([[3.0, 4], [4, 3], [3, 3]])
    assert ranking_drift(before, now).taus == pytest.approx([1, -1, NAN], nan_ok=True)
