"""How far people agree with each other, and each judge with people. Pure functions of arrays."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t

from hgdpo_core.errors import InputError
from hgdpo_core.metrics import WinRate
from hgdpo_core.statistics.clusters import (
    TAIL,
    Clusters,
    Spread,
    rate_influence,
    rate_interval,
    win_rate_of_votes,
)
from hgdpo_core.statistics.intervals import Estimate

# -- people with each other


def krippendorff_alpha(units: Sequence[str] | np.ndarray, values: Sequence[str] | np.ndarray) -> float | None:
    """Krippendorff's alpha, nominal, of ratings [V]: the unit that was rated, and the value it got.

    1: all agree; 0: as by chance. Units with one rating have nothing to compare and do not count, as in his definition
    (Computing Krippendorff's Alpha-Reliability, 2011). None where nothing can be compared, or all values are the same.
    """
    return _alpha(_count(Clusters.of(units), Clusters.of(values)))


def alpha_estimate(units: Sequence[str], values: Sequence[str], people: Sequence[str],
                   prompts: Sequence[str]) -> Estimate:
    """Krippendorff's alpha with its interval: jackknifes over people and over prompts, whose variances are added.

    No interval with one person or one prompt, or where leaving one out leaves nothing to compare.
    """
    if not len(units) == len(values) == len(people) == len(prompts):
        raise InputError(f"alpha_estimate needs unit, value, person and prompt of each rating, got {len(units)}, "
                         f"{len(values)}, {len(people)} and {len(prompts)}: pass one of each for every rating")
    unit, value = Clusters.of(units), Clusters.of(values)
    counts = _count(unit, value)
    alpha, clusterings = _alpha(counts), [Clusters.of(people), Clusters.of(prompts)]
    if alpha is None or min(clusters.count for clusters in clusterings) < 2:
        return Estimate(alpha, None, None)
    variance = 0.0
    for clusters in clusterings:
        left = [_alpha(rest) for rest in _without_each(counts, unit, value, clusters)]
        if None in left:
            return Estimate(alpha, None, None)
        deviations = np.array(left, dtype=np.float64) - np.mean(np.array(left, dtype=np.float64))
        variance += float((deviations**2).sum()) * (clusters.count - 1) / clusters.count
    degrees = max(1.0, min(clusters.effective for clusters in clusterings) - 1)
    half = float(t.ppf(TAIL, degrees)) * variance**0.5
    return Estimate(alpha, max(-1.0, alpha - half), min(1.0, alpha + half))


def _count(unit: Clusters, value: Clusters) -> np.ndarray:
    """How often each unit got each value: float64 [U, C]."""
    counts = np.zeros((unit.count, value.count))
    np.add.at(counts, (unit.of_vote, value.of_vote), 1)
    return counts


def _without_each(counts: np.ndarray, unit: Clusters, value: Clusters, clusters: Clusters) -> Iterator[np.ndarray]:
    """The counts without the ratings of each cluster."""
    for number in range(clusters.count):
        rows, rest = clusters.of_vote == number, counts.copy()
        np.add.at(rest, (unit.of_vote[rows], value.of_vote[rows]), -1)
        yield rest


def _alpha(counts: np.ndarray) -> float | None:
    counts = counts[counts.sum(axis=1) >= 2]
    ratings = counts.sum(axis=1)
    total, totals = ratings.sum(), counts.sum(axis=0)
    expected = total**2 - (totals**2).sum()
    if total == 0 or expected == 0:
        return None
    observed = ((ratings**2 - (counts**2).sum(axis=1)) / (ratings - 1)).sum()
    return float(1 - (total - 1) * observed / expected)


# -- judges with people


@dataclass(frozen=True)
class JudgeAgreement:
    """How often the image that a judge scores higher is the one that people chose.

    Wins are agreements; ties have no order: equal scores, and of votes "cannot tell", of pairs a split majority.
    """

    judge: str
    votes: WinRate
    """Over single votes; interval over people and prompts."""
    pairs: WinRate
    """Over pairs, with the majority of their votes; interval over prompts."""


def judge_agreement(judge: str, margins: np.ndarray, choices: np.ndarray, pairs: Sequence[str], people: Sequence[str],
                    prompts: Sequence[str]) -> JudgeAgreement:
    """A judge's agreement with people, from votes [V].

    `margins`: score of the second image minus that of the first, float; NaN where the judge has none: these votes do
    not count. `choices`: 1 for the second image, -1 for the first, 0 for neither.
    """
    known = ~np.isnan(margins)
    order, choices = np.sign(margins[known]), np.sign(choices[known])
    who, asked = np.asarray(people)[known], np.asarray(prompts)[known]
    decided = order * choices != 0
    votes = win_rate_of_votes((order == choices)[decided], who[decided], asked[decided], int((~decided).sum()))
    pair = Clusters.of(np.asarray(pairs)[known])
    first = np.unique(pair.of_vote, return_index=True)[1]
    majority = np.sign(np.bincount(pair.of_vote, weights=choices, minlength=pair.count))
    return JudgeAgreement(judge, votes, _rate_over_prompts(order[first] * majority, asked[first]))


def _rate_over_prompts(agreements: np.ndarray, prompts: np.ndarray) -> WinRate:
    """Of 1 for agreement, -1 for the opposite, 0 for a tie, with prompts as the only clusters."""
    decided = agreements != 0
    won, clusters = agreements[decided] > 0, Clusters.of(prompts[decided])
    wins, count, ties = int(won.sum()), len(won), int((~decided).sum())
    ends = (None, None)
    if clusters.count >= 2:
        variance = clusters.variance(rate_influence(won))
        spread = Spread(variance, max(1.0, clusters.effective - 1), variance, variance, variance)
        ends = rate_interval(wins / count, spread, count)
    return WinRate(wins / count if count else None, wins, count - wins, ties, count + ties, *ends)
