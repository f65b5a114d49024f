"""Identity distances compared: wins, faces that are missing, and what counts as no change."""

import numpy as np
import pytest
from scipy.stats import norm, t

from hgdpo_core.errors import InputError
from hgdpo_core.statistics.clusters import win_rate_of_votes
from hgdpo_core.statistics.identity import Distances, equivalence, equivalence_power, identity_change


def distances(values, faces=1):
    array = np.asarray(values, dtype=float)
    return Distances(array, np.where(np.isnan(array), 0, faces))


def crossed(people, prompts):
    grid = np.indices((people, prompts)).reshape(2, -1)
    return [f"person {row}" for row in grid[0]], [f"prompt {row}" for row in grid[1]]


def test_wins_losses_ties_and_missing_faces_by_hand():
    gap = np.nan
    target = distances([[0.5, 0.3], [0.4, gap], [0.2, 0.2], [gap, gap], [0.3, 0.3], [0.6, 0.2]])
    tuned = Distances(np.array([[0.2, 0.2], [0.5, 0.5], [0.2, 0.2], [0.1, 0.1], [gap, gap], [0.3, 0.3]]),
                      np.array([[1, 2], [1, 1], [3, 1], [1, 1], [0, 0], [1, 1]]))
    change = identity_change(target, tuned, *crossed(3, 2), margin=0.1)
    rate = change.win_rate
    assert (rate.wins, rate.losses, rate.ties, rate.n, rate.rate) == (2, 1, 1, 4, 2 / 3)
    assert change.faceless == {"target": 3, "tuned": 2} and change.several == {"target": 0, "tuned": 2}
    assert change.left_out == 2 and change.images == 12
    assert change.target_distance == pytest.approx((0.4 + 0.4 + 0.2 + 0.4) / 4)
    assert change.tuned_distance == pytest.approx((0.2 + 0.5 + 0.2 + 0.3) / 4)


def test_the_intervals_are_those_of_people_and_prompts():
    rng = np.random.default_rng(0)
    people, prompts = crossed(20, 20)
    before, after = rng.uniform(0.2, 0.8, (2, 400, 1))
    change = identity_change(distances(before), distances(after), people, prompts, margin=0.075)
    won = (after < before)[:, 0]
    votes = win_rate_of_votes(won, people, prompts)
    assert change.win_rate == votes
    logit = [np.log(end / (1 - end)) for end in (votes.ci_low, votes.ci_high, change.low, change.high)]
    ratio = (logit[3] - logit[2]) / (logit[1] - logit[0])
    assert ratio == pytest.approx(t.ppf(0.95, 19) / t.ppf(0.975, 19))


def test_power_is_that_of_the_method():
    assert equivalence_power(400, 0.075) == pytest.approx(0.82, abs=0.005)
    assert equivalence_power(177, 0.075) == pytest.approx(0.27, abs=0.005)
    assert equivalence_power(0, 0.075) == equivalence_power(20, 0.075) == 0
    rng = np.random.default_rng(1)
    rates = rng.binomial(400, 0.5, 20_000) / 400
    half = norm.ppf(0.95) * 0.5 / 20
    assert np.mean((rates - half >= 0.425) & (rates + half <= 0.575)) == pytest.approx(0.82, abs=0.02)


@pytest.mark.parametrize(("low", "high", "verdict"), [
    (0.43, 0.57, "kept"), (0.42, 0.55, "open"), (0.2, 0.42, "changed"), (0.58, 0.7, "changed"), (0.1, 0.9, "open"),
    (0.51, 0.57, "kept"), (None, None, "open")])
def test_verdicts(low, high, verdict):
    assert equivalence(low, high, 0.075) == verdict


def test_no_interval_with_one_person_and_none_without_faces():
    one = identity_change(distances([[0.3], [0.4]]), distances([[0.2], [0.5]]), ["a", "a"], ["p", "q"], 0.075)
    assert one.win_rate.rate == 0.5 and one.low is None and one.verdict == "open"
    none = identity_change(distances([[np.nan]] * 2), distances([[0.2], [0.5]]), ["a", "b"], ["p", "q"], 0.075)
    assert none.win_rate.rate is None and none.target_distance is None and none.left_out == 2
    with pytest.raises(InputError, match=r"for each sample, got \[2, 2, 1, 2\]"):
        identity_change(distances([[0.3], [0.4]]), distances([[0.2], [0.5]]), ["a"], ["p", "q"], 0.075)


def test_many_people_who_lose_themselves_are_found():
    rng = np.random.default_rng(2)
    people, prompts = crossed(20, 20)
    before = rng.uniform(0.2, 0.6, (400, 1))
    worse = before + rng.normal(0.05, 0.1, (400, 1))
    assert identity_change(distances(before), distances(worse), people, prompts, 0.075).verdict == "changed"
