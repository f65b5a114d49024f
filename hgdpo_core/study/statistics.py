"""Win rates by people, with intervals that count people and prompts as clusters. Pure functions of arrays.

People differ, and so do prompts: the votes of one person, and those on one prompt, are not independent. The variance is
that of two-way clusters (Cameron, Gelbach and Miller 2011). It has the expectation that Owen's pigeonhole bootstrap
(2007) aims at, who resamples people and prompts and multiplies their counts; his draws count the noise of a single vote
three times, which makes them up to 1.7 times too wide, and too narrow for few people of great differences. For few
clusters: Student's t with one degree less than the fewer of both, and G / (G - 1). docs/STUDY_STATISTICS.md has
coverage and width of both by simulation.
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

TAIL = (1 + CONFIDENCE) / 2
MAX_GROWTH = 10_000
"""A study that would need to grow by more than this is not planned."""
NEWTON_STEPS, CONVERGED = 100, 1e-10


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
        return float(t.ppf(TAIL, self.degrees))


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


def rate_interval(rate: float, spread: Spread, decided: int) -> tuple[float, float]:
    """Both ends, on the scale of log odds, so that they stay within 0..1.

    Where all votes agree nothing varies: then the exact interval of as many votes as the few clusters are worth, the
    convention of Korn and Graubard (1998) for surveys.
    """
    if rate in (0.0, 1.0):
        effective = decided * (float(norm.ppf(TAIL)) / spread.quantile) ** 2
        other = float(beta.ppf(1 - TAIL, effective, 1))
        return (other, 1.0) if rate else (0.0, 1 - other)
    half = spread.quantile * math.sqrt(float(spread.variance[0])) / (rate * (1 - rate))
    return float(expit(logit(rate) - half)), float(expit(logit(rate) + half))


# -- how many more answers


@dataclass(frozen=True)
class MoreAnswers:
    """How many more decided votes make the interval's half width as wanted; None where that cannot be reached."""

    half_width: float
    """Wanted: half of the interval's length, in 0..1."""
    now: float
    same_prompts: int | None
    """Votes by further people on the same prompts."""
    new_prompts: int | None
    """Votes by further people on further prompts, each person and each prompt with as many votes as now."""


def check_half_width(half_width: float) -> None:
    """InputError for one that no interval of win rates can have."""
    if not 0 < half_width < 0.5:
        raise InputError(f"the half width of an interval of win rates is between 0 and 0.5, got {half_width:g}: give "
                         "for example 0.05 for 5 points")


def more_answers(won: np.ndarray, people: Sequence[str], prompts: Sequence[str],
                 half_width: float) -> MoreAnswers | None:
    """How many more votes a wanted half width (0..0.5) needs, if further people and prompts differ as these do.

    None without an interval, and where all votes agree, which says nothing about differences. Arguments as
    `win_rate_of_votes` has them.
    """
    check_half_width(half_width)
    if len(won) == 0 or won.all() or not won.any():
        return None
    persons, asked, votes = Clusters.of(people), Clusters.of(prompts), len(won)
    spread = two_way_spread(rate_influence(won), persons, asked)
    if spread is None:
        return None
    parts = _components(spread, persons.effective, asked.effective, votes)
    low, high = rate_interval(float(won.mean()), spread, votes)

    def needed(grow_prompts: bool) -> int | None:
        def reached(growth: float) -> bool:
            more_people, more_prompts = persons.effective * growth, asked.effective * (growth if grow_prompts else 1)
            variance = parts[0] / more_people + parts[1] / more_prompts + parts[2] / (votes * growth)
            degrees = max(1.0, min(more_people, more_prompts) - 1)
            return float(t.ppf(TAIL, degrees)) * math.sqrt(variance) <= half_width

        growth = _smallest(reached)
        return None if growth is None else math.ceil(votes * (growth - 1))

    if (high - low) / 2 <= half_width:
        return MoreAnswers(half_width, (high - low) / 2, 0, 0)
    return MoreAnswers(half_width, (high - low) / 2, needed(False), needed(True))


def _components(spread: Spread, people: float, prompts: float, votes: int) -> tuple[float, float, float]:
    """Variances of a vote that come from its person, from its prompt and from neither, by the method of moments.

    With clusters of people alone the variance is A / people + (B + E) / votes, alike for prompts; of votes alone it is
    (A + B + E) / votes.
    """
    of_vote = float(spread.votes[0])
    person = max(0.0, (float(spread.people[0]) - of_vote) / (1 / people - 1 / votes)) if people < votes else 0.0
    prompt = max(0.0, (float(spread.prompts[0]) - of_vote) / (1 / prompts - 1 / votes)) if prompts < votes else 0.0
    return person, prompt, max(0.0, votes * of_vote - person - prompt)


def _smallest(reached: Callable[[float], bool]) -> float | None:
    """The smallest growth from 1 on with which a condition holds that larger growth only helps."""
    if not reached(MAX_GROWTH):
        return None
    low, high = 0.0, math.log(MAX_GROWTH)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if reached(math.exp(middle)) else (middle, high)
    return math.exp(high)


# -- several models


@dataclass(frozen=True)
class Strength:
    """A model's strength by Bradley and Terry: log odds against a model of average strength, with its interval."""

    model: str
    strength: float | None
    """None where no finite one is best: some models never lost to the others, or were never compared with them."""
    ci_low: float | None
    ci_high: float | None


def bradley_terry(winners: Sequence[str], losers: Sequence[str], people: Sequence[str],
                  prompts: Sequence[str]) -> list[Strength]:
    """Strengths of all models from decided votes [V], the strongest first; their sum is 0.

    Bradley and Terry (1952) by maximum likelihood; intervals as those of win rates, over people and prompts.
    """
    names = sorted({*winners, *losers})
    numbers = {name: number for number, name in enumerate(names)}
    won, lost = (np.array([numbers[name] for name in side], dtype=int) for side in (winners, losers))
    if not names or not _is_connected(won, lost, len(names)):
        return [Strength(name, None, None, None) for name in names]
    design = np.zeros((len(won), len(names)))
    design[np.arange(len(won)), won] = 1
    design[np.arange(len(won)), lost] = -1
    strengths, influence = _fit(design)
    spread = two_way_spread(influence, Clusters.of(people), Clusters.of(prompts))
    half = [None] * len(names) if spread is None else (spread.quantile * np.sqrt(spread.variance)).tolist()
    fitted = [Strength(name, value, *((None, None) if width is None else (value - width, value + width)))
              for name, value, width in zip(names, strengths.tolist(), half, strict=True)]
    return sorted(fitted, key=lambda one: -(one.strength or 0.0))


def _fit(design: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Strengths [M], and how much each vote moves them [V, M], from rows of +1 for the winner and -1 for the loser."""
    strengths = np.zeros(design.shape[1])
    for _ in range(NEWTON_STEPS):
        chance = expit(design @ strengths)
        residual = 1 - chance
        inverse = np.linalg.pinv((design * (chance * residual)[:, None]).T @ design, hermitian=True)
        step = inverse @ (design.T @ residual)
        strengths += step / max(1.0, np.abs(step).max())  # the whole step may overshoot where a model hardly loses
        if np.abs(step).max() < CONVERGED:
            break
    return strengths - strengths.mean(), design * residual[:, None] @ inverse


def _is_connected(won: np.ndarray, lost: np.ndarray, models: int) -> bool:
    """Whether finite strengths exist: in each division in two, each part won a vote against the other (Ford 1957)."""
    reach = np.eye(models, dtype=bool)
    reach[won, lost] = True
    for _ in range(models):
        reach = (reach.astype(int) @ reach.astype(int)) > 0
    return bool(reach.all())
