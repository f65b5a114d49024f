"""How many further answers a study needs, and strengths of several models. Pure functions of arrays.

Win rates of votes and their intervals are in `hgdpo_core/statistics/clusters.py`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit
from scipy.stats import t

from hgdpo_core.errors import InputError
from hgdpo_core.statistics.clusters import TAIL, Clusters, Spread, rate_influence, rate_interval, two_way_spread

MAX_GROWTH = 10_000
"""A study that would need to grow by more than this is not planned."""
NEWTON_STEPS, CONVERGED = 100, 1e-10


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
