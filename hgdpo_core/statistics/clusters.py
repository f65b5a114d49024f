"""Intervals that count two kinds of clusters, people and prompts: of win rates and others. Pure functions of arrays.

People differ, and so do prompts: the votes of one person, and those on one prompt, are not independent. The variance is
that of two-way clusters (Cameron, Gelbach and Miller 2011). It has the expectation that Owen's pigeonhole bootstrap
(2007) aims at, who resamples people and prompts and multiplies their counts; his draws count the noise of a single vote
three times, which makes them up to 1.7 times too wide, and too narrow for few people of great differences. For few
clusters: Student's t with one degree less than the fewer of both, and G / (G - 1). docs/STUDY_STATISTICS.md has
coverage and width of both by simulation.

A study's people vote; a personalised comparison's people are shown, and a judge votes on each pair of images.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.special import expit, logit
from scipy.stats import beta, norm, t

from hgdpo_core.errors import InputError
from hgdpo_core.metrics import CONFIDENCE, WinRate
from hgdpo_core.statistics.intervals import Estimate, Interval

TAIL = (1 + CONFIDENCE) / 2


class Clusters(NamedTuple):
    """Which cluster each of V votes belongs to, as numbers from 0."""

    of_vote: np.ndarray
    """int [V]"""
    count: int

    @classmethod
    def of(cls, names: Sequence[str] | np.ndarray) -> "Clusters":
        """By names [V], such as those of participants or prompts."""
        known, numbers = np.unique(np.asarray(names), return_inverse=True)
        return cls(numbers.reshape(-1), len(known))

    @property
    def effective(self) -> float:
        """How many clusters of equal size would vary as much: fewer where a few hold most of the votes (Kish 1965)."""
        sizes = np.bincount(self.of_vote).astype(np.float64)
        return float(sizes.sum() ** 2 / (sizes**2).sum()) if len(sizes) else 0.0

    def variance(self, influence: np.ndarray) -> np.ndarray:
        """Sum of squares of the clusters' sums of influence [V, K], times G / (G - 1): float64 [K]."""
        sums = np.stack([np.bincount(self.of_vote, weights=one, minlength=self.count) for one in influence.T], axis=1)
        return (sums**2).sum(axis=0) * self.count / max(1, self.count - 1)


@dataclass(frozen=True)
class Spread:
    """Variance of an estimate [K], the degrees of freedom of its interval, and its parts."""

    variance: np.ndarray
    degrees: float
    people: np.ndarray
    """With people as the only clusters."""
    prompts: np.ndarray
    votes: np.ndarray
    """With votes (those of one person on one prompt together) as the only clusters."""

    @property
    def quantile(self) -> float:
        """Student's t of both ends of a 95 % interval."""
        return self.quantile_of(TAIL)

    def quantile_of(self, tail: float) -> float:
        """Student's t that leaves 1 - `tail` above it."""
        return float(t.ppf(tail, self.degrees))


def two_way_spread(influence: np.ndarray, people: Clusters, prompts: Clusters) -> Spread | None:
    """The spread of an estimate from how much each vote moves it, float64 [V, K]; None for one person or one prompt.

    Never less than with people alone or prompts alone: the difference of the three is an estimate too.
    """
    if min(people.count, prompts.count) < 2:
        return None
    by_people, by_prompts = people.variance(influence), prompts.variance(influence)
    by_votes = Clusters.of(people.of_vote * prompts.count + prompts.of_vote).variance(influence)
    both = np.maximum(by_people + by_prompts - by_votes, np.maximum(by_people, by_prompts))
    degrees = max(1.0, min(people.effective, prompts.effective) - 1)
    return Spread(both, degrees, by_people, by_prompts, by_votes)


class Crossed(NamedTuple):
    """Person and prompt of each of V samples: both are clusters of an interval."""

    people: Clusters
    prompts: Clusters

    @classmethod
    def of(cls, people: Sequence[str] | np.ndarray, prompts: Sequence[str] | np.ndarray) -> "Crossed":
        """By names [V] of both; InputError where one of them is for other samples."""
        if len(people) != len(prompts):
            raise InputError(f"expected a person and a prompt of each sample, got {len(people)} and {len(prompts)}")
        return cls(Clusters.of(people), Clusters.of(prompts))

    def interval(self, value: float, influence: np.ndarray) -> Interval | None:
        """The 95 % interval of an estimate from how much each sample moves it, float64 [V]; None for one person or one
        prompt."""
        spread = two_way_spread(influence[:, None], *self)
        if spread is None or not np.isfinite(spread.variance).all():
            return None
        half = spread.quantile * math.sqrt(float(spread.variance[0]))
        return Interval(value - half, value + half)

    def estimate(self, value: float | None, function: Callable[[np.ndarray], np.ndarray],
                 samples: np.ndarray) -> Estimate:
        """A value with its interval: the smooth `function`, float64 [R, K] to [R], of the sum of samples [V, K]."""
        if value is None:
            return Estimate(None, None, None)
        return Estimate.of(value, self.interval(value, influence_of(function, samples)))


def influence_of(function: Callable[[np.ndarray], np.ndarray], samples: np.ndarray) -> np.ndarray:
    """How much each sample [V, K] moves `function` of their sum, while their number stays: float64 [V].

    By differences of a thousandth of a sample: the infinitesimal jackknife.
    """
    total, step = samples.sum(axis=0), 1e-3
    moved = (function(total + step * samples) - function(total - step * samples)) / (2 * step)
    return moved - moved.mean()


# -- win rate


def win_rate_of_votes(won: np.ndarray, people: Sequence[str] | np.ndarray, prompts: Sequence[str] | np.ndarray,
                      ties: int = 0) -> WinRate:
    """Wins / (wins + losses) of decided votes, bool [V], with its interval over people and prompts; ties count apart.

    No interval with one person or one prompt. `people`, `prompts`: who voted, and on which prompt, [V].
    """
    wins, decided = int(won.sum()), len(won)
    if len(people) != decided or len(prompts) != decided:
        raise InputError(f"win_rate_of_votes needs person and prompt of each of {decided} votes, got {len(people)} and "
                         f"{len(prompts)}: pass one of each for every vote")
    rate = wins / decided if decided else None
    ends = (None, None)
    if rate is not None:
        spread = two_way_spread(rate_influence(won), Clusters.of(people), Clusters.of(prompts))
        ends = (None, None) if spread is None else rate_interval(rate, spread, decided)
    return WinRate(rate, wins, decided - wins, ties, decided + ties, *ends)


def rate_influence(won: np.ndarray) -> np.ndarray:
    """How much each vote moves the win rate: float64 [V, 1]."""
    return (won - won.mean())[:, None] / len(won)


def rate_interval(rate: float, spread: Spread, decided: int, tail: float = TAIL) -> tuple[float, float]:
    """Both ends, each left with a chance of 1 - `tail`, on the scale of log odds, so that they stay within 0..1.

    Where all votes agree nothing varies: then the exact interval of as many votes as the few clusters are worth, the
    convention of Korn and Graubard (1998) for surveys.
    """
    if rate in (0.0, 1.0):
        effective = decided * (float(norm.ppf(tail)) / spread.quantile_of(tail)) ** 2
        other = float(beta.ppf(1 - tail, effective, 1))
        return (other, 1.0) if rate else (0.0, 1 - other)
    half = spread.quantile_of(tail) * math.sqrt(float(spread.variance[0])) / (rate * (1 - rate))
    return float(expit(logit(rate) - half)), float(expit(logit(rate) + half))
