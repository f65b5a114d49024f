"""Win rates by people: closed forms, cases by hand, and whether the intervals cover the truth in simulated studies."""

import math

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit, logit

from benchmarks.study_intervals import SETTINGS, Design, coverage_designs, measure
from hgdpo_core.errors import InputError
from hgdpo_core.statistics.clusters import Clusters, rate_influence, two_way_spread, win_rate_of_votes
from hgdpo_core.study.statistics import bradley_terry, more_answers

T_975 = {3: 3.182446, 4: 2.776445, 9: 2.262157}
"""Student's t, by degrees of freedom, from a table."""


def crossed(won):
    """The votes of a table [people, prompts], where everybody answered everything."""
    people, prompts = np.indices(np.shape(won))
    return np.asarray(won, dtype=bool).ravel(), people.ravel(), prompts.ravel()


# --- clusters


def test_clusters_by_hand():
    clusters = Clusters.of(list("aabbbc"))
    assert clusters.count == 3 and clusters.effective == pytest.approx(36 / (4 + 9 + 1))
    influence = np.array([[1.0], [2.0], [-1.0], [-1.0], [-1.0], [0.5]])
    assert clusters.variance(influence) == pytest.approx([(9 + 9 + 0.25) * 3 / 2])
    assert Clusters.of([]).effective == 0


def test_equal_clusters_are_as_many_as_they_are():
    assert Clusters.of(list("abcd") * 7).effective == pytest.approx(4)


def test_people_alone_are_the_variance_of_their_means():
    """In a crossed table, clusters of people alone give the squared standard error of people's means."""
    rng = np.random.default_rng(0)
    table = rng.random((6, 9)) < 0.6
    won, people, prompts = crossed(table)
    spread = two_way_spread(rate_influence(won), Clusters.of(people), Clusters.of(prompts))
    assert spread.people[0] == pytest.approx(table.mean(axis=1).var(ddof=1) / 6)
    assert spread.prompts[0] == pytest.approx(table.mean(axis=0).var(ddof=1) / 9)
    assert spread.votes[0] == pytest.approx(table.var(ddof=1) / 54)
    assert spread.degrees == pytest.approx(5)


def test_both_are_added_less_what_they_share():
    rng = np.random.default_rng(1)
    table = rng.random((40, 40)) < expit(rng.normal(0, 1, (40, 1)) + rng.normal(0, 1, 40))
    won, people, prompts = crossed(table)
    spread = two_way_spread(rate_influence(won), Clusters.of(people), Clusters.of(prompts))
    assert spread.variance[0] == pytest.approx(spread.people[0] + spread.prompts[0] - spread.votes[0])


def test_never_less_than_people_or_prompts_alone():
    """Each person won half, each prompt too: the differences cancel more than chance would."""
    won, people, prompts = crossed([[1, 0], [0, 1]])
    spread = two_way_spread(rate_influence(won), Clusters.of(people), Clusters.of(prompts))
    assert spread.variance[0] == max(spread.people[0], spread.prompts[0]) == 0


# --- win rate


def test_a_rate_by_hand():
    """Four people, four prompts; people won 4, 3, 2, 1 of 4, prompts 4, 3, 2, 1."""
    won, people, prompts = crossed([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]])
    rate = win_rate_of_votes(won, people, prompts, ties=3)
    assert (rate.rate, rate.wins, rate.losses, rate.ties, rate.n) == (10 / 16, 10, 6, 3, 19)
    means = np.array([1, 0.75, 0.5, 0.25])
    one_way, of_votes = means.var(ddof=1) / 4, (10 / 16 * 6 / 16) / 15
    half = T_975[3] * math.sqrt(2 * one_way - of_votes) / (10 / 16 * 6 / 16)
    assert rate.ci_low == pytest.approx(expit(logit(10 / 16) - half), rel=1e-6)
    assert rate.ci_high == pytest.approx(expit(logit(10 / 16) + half), rel=1e-6)


def test_the_other_model_has_the_mirrored_interval():
    rng = np.random.default_rng(2)
    won, people, prompts = crossed(rng.random((5, 8)) < 0.7)
    one, other = win_rate_of_votes(won, people, prompts), win_rate_of_votes(~won, people, prompts)
    assert (other.ci_low, other.ci_high) == pytest.approx((1 - one.ci_high, 1 - one.ci_low))


def test_the_order_and_the_names_do_not_matter():
    rng = np.random.default_rng(3)
    won, people, prompts = crossed(rng.random((5, 8)) < 0.7)
    order = rng.permutation(len(won))
    named = win_rate_of_votes(won[order], [f"person {9 - who}" for who in people[order]],
                              [f"prompt {one}" for one in prompts[order]])
    plain = win_rate_of_votes(won, people, prompts)
    assert (named.ci_low, named.ci_high) == pytest.approx((plain.ci_low, plain.ci_high))


def test_all_votes_alike():
    """The exact interval of as many votes as 5 people are worth: 200 * (1.96 / 2.776) ^ 2 = 99.67."""
    rate = win_rate_of_votes(*crossed(np.ones((5, 40))))
    effective = 200 * (stats.norm.ppf(0.975) / T_975[4]) ** 2
    assert (rate.rate, rate.ci_high) == (1, 1) and rate.ci_low == pytest.approx(0.025 ** (1 / effective), rel=1e-6)
    none = win_rate_of_votes(*crossed(np.zeros((5, 40))))
    assert (none.ci_low, none.ci_high) == pytest.approx((0, 1 - rate.ci_low))


def test_one_loss_among_many_wins_is_not_better_than_none():
    table = np.ones((5, 40))
    table[2, 7] = 0
    one = win_rate_of_votes(*crossed(table))
    assert 0.9 < one.ci_low < win_rate_of_votes(*crossed(np.ones((5, 40)))).ci_low < one.rate < one.ci_high < 1


@pytest.mark.parametrize("shape", [(1, 10), (10, 1), (0, 0)])
def test_no_interval_for_one_person_or_one_prompt(shape):
    rate = win_rate_of_votes(*crossed(np.ones(shape)))
    assert (rate.ci_low, rate.ci_high) == (None, None)


def test_who_gives_most_of_the_votes_makes_the_interval_wide():
    """Two people who differ, one of them with nearly all votes: one degree of freedom at least."""
    won = np.array([True, False] * 50)
    rate = win_rate_of_votes(won, ["a"] * 98 + ["b"] * 2, [str(i % 10) for i in range(100)])
    assert rate.ci_high - rate.ci_low > 0.1


def test_lengths_that_differ_are_refused():
    with pytest.raises(InputError, match="each of 3 votes, got 2 and 3"):
        win_rate_of_votes(np.ones(3, dtype=bool), ["a", "b"], ["x", "y", "z"])


# --- more answers


def simulated(people, prompts, seed=0, **differences):
    won, seen = Design(people, prompts, prompts, **differences).simulate(np.random.default_rng(seed))
    who, asked = np.nonzero(seen)
    return won[seen], who, asked


def test_more_answers_come_to_the_wanted_precision():
    """A study of 20 x 20 says how many more it needs; studies of that size have this half width on average."""
    needed = [more_answers(*simulated(20, 20, seed), 0.05).new_prompts for seed in range(40)]
    growth = math.sqrt((400 + np.median(needed)) / 400)  # a crossed study grows with the square of people and prompts
    assert growth > 1
    won, people, prompts = simulated(20, 20)
    more = more_answers(won, people, prompts, 0.05)
    assert more.new_prompts < (more.same_prompts or math.inf)
    size = round(20 * (400 + np.median(needed)) / 400)
    half = [_half_width(*_grown(size, seed)) for seed in range(40)]
    assert np.mean(half) == pytest.approx(0.05, rel=0.15)


def _grown(size, seed):
    """As many more people and prompts, each person with 20 answers, each prompt with 20."""
    won, seen = Design(size, 20, size).simulate(np.random.default_rng(seed))
    people, prompts = np.nonzero(seen)
    return won[seen], people, prompts


def _half_width(won, people, prompts):
    rate = win_rate_of_votes(won, people, prompts)
    return (rate.ci_high - rate.ci_low) / 2


def test_people_alone_cannot_outweigh_prompts():
    """Four prompts that differ a lot: no number of people makes their mean sure."""
    won, people, prompts = simulated(30, 4, sd_prompts=2.0)
    more = more_answers(won, people, prompts, 0.03)
    assert more.same_prompts is None and more.new_prompts > 1000


def test_enough_is_none_more():
    won, people, prompts = simulated(20, 20)
    assert more_answers(won, people, prompts, 0.4).same_prompts == 0


def test_nothing_to_plan_from():
    assert more_answers(*crossed(np.ones((5, 5))), 0.05) is None
    assert more_answers(*crossed(np.array([[1, 0, 1]])), 0.05) is None
    assert more_answers(np.array([], dtype=bool), [], [], 0.05) is None
    with pytest.raises(InputError, match=r"between 0 and 0.5, got 5: give for example 0.05"):
        more_answers(*crossed(np.ones((5, 5))), 5)


# --- Bradley and Terry


def test_two_models_are_the_log_odds_of_their_win_rate():
    rng = np.random.default_rng(4)
    won, people, prompts = crossed(rng.random((6, 15)) < 0.7)
    winners, losers = np.where(won, "a", "b"), np.where(won, "b", "a")
    first, second = bradley_terry(winners, losers, people, prompts)
    rate = win_rate_of_votes(won, people, prompts)
    assert first.model == "a" and first.strength == pytest.approx(-second.strength) == pytest.approx(
        logit(rate.rate) / 2)
    assert (2 * first.ci_low, 2 * first.ci_high) == pytest.approx((logit(rate.ci_low), logit(rate.ci_high)))


def test_three_models_that_fit_exactly():
    """Odds of 2, 3 and 6: each pair's wins are those of strengths log 6, log 3 and 0."""
    wins = {("a", "b"): 20, ("b", "a"): 10, ("b", "c"): 30, ("c", "b"): 10, ("a", "c"): 60, ("c", "a"): 10}
    winners, losers = (np.repeat([pair[side] for pair in wins], list(wins.values())) for side in (0, 1))
    number = np.arange(len(winners))
    fitted = bradley_terry(winners, losers, (number % 7).astype(str), (number % 11).astype(str))
    expected = np.log([6, 3, 1]) - np.log([6, 3, 1]).mean()
    assert [one.model for one in fitted] == list("abc")
    assert [one.strength for one in fitted] == pytest.approx(expected.tolist())
    assert all(one.ci_low < one.strength < one.ci_high for one in fitted)


def test_a_hardly_beaten_model_converges():
    winners = ["a"] * 999 + ["b"] * 51 + ["c"] * 50
    losers = ["b"] * 500 + ["c"] * 499 + ["a"] + ["c"] * 50 + ["b"] * 50
    number = np.arange(len(winners))
    fitted = bradley_terry(winners, losers, number % 10, number % 30)
    assert fitted[0].model == "a" and fitted[0].strength == pytest.approx(-sum(one.strength for one in fitted[1:]))
    score = sum(winner == "a" for winner in winners) - sum(
        expit(fitted[0].strength - next(one.strength for one in fitted if one.model == other))
        for winner, loser in zip(winners, losers, strict=True) if "a" in (winner, loser)
        for other in ((loser,) if winner == "a" else (winner,)))
    assert score == pytest.approx(0, abs=1e-6)  # as many wins as the strengths expect


@pytest.mark.parametrize(("winners", "losers"), [("aab", "bcc"), ("abcd", "badc"), ("", "")])
def test_strengths_without_bound_are_none(winners, losers):
    fitted = bradley_terry(list(winners), list(losers), list("xyxy")[:len(winners)], list("pqpq")[:len(winners)])
    assert all(one.strength is None for one in fitted)


# --- coverage


@pytest.mark.parametrize(("people", "questions", "pairs"), SETTINGS)
@pytest.mark.parametrize("differences", [{}, {"sd_people": 0.0, "sd_prompts": 0.0}], ids=["differ", "alike"])
def test_intervals_cover_the_truth(people, questions, pairs, differences):
    """100 studies each: a coverage of 95 % falls below 88 % in one of 200 such tests."""
    found = measure(Design(people, questions, pairs, **differences), 100)["ours"]
    assert found.coverage >= 0.88


def test_votes_are_not_independent():
    """What the paper's own count of votes would claim: an interval that holds the truth every other time."""
    found = measure(Design(100, 12, 12), 50, methods=("ours", "binomial"))
    assert found["binomial"].coverage < 0.6 < 0.85 < found["ours"].coverage


@pytest.mark.slow
@pytest.mark.parametrize("design", list(coverage_designs()), ids=str)
def test_intervals_cover_in_1000_studies(design):
    assert measure(design, 1000)["ours"].coverage >= 0.93


@pytest.mark.slow
def test_strengths_cover_in_1000_studies():
    """Three models, 10 people, 30 prompts; people and prompts differ in how much they favour each model.

    The truth is that of a very large study: strengths of rates over people and prompts, not the mean log odds.
    """
    rng = np.random.default_rng(0)
    truth = {one.model: one.strength for one in _strengths(rng, 400, 400)}
    covered = []
    for _ in range(1000):
        fitted = _strengths(rng, 10, 30)
        covered += [one.ci_low <= truth[one.model] <= one.ci_high for one in fitted]
    assert np.mean(covered) >= 0.93


def _strengths(rng, people, prompts):
    means = np.array([0.5, 0.0, -0.5])
    liking = means + rng.normal(0, 0.35, (people, 1, 3)) + rng.normal(0, 0.55, (prompts, 3))
    first, second = ((np.indices((people, prompts)).sum(axis=0) + shift) % 3 for shift in (0, 1))
    gap = np.take_along_axis(liking, first[..., None], 2) - np.take_along_axis(liking, second[..., None], 2)
    won = rng.random((people, prompts)) < expit(gap[..., 0])
    who, asked = (axis.ravel() for axis in np.indices((people, prompts)))
    names = np.array(list("abc"))
    return bradley_terry(names[np.where(won, first, second)].ravel(), names[np.where(won, second, first)].ravel(), who,
                         asked)
