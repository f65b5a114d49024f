"""Means over prompts and training seeds with 95 % intervals: both are resampled, and arms in pairs. Pure functions.

All arms have the same prompts and the same seeds, so the draws are the same for all arms of one shape, and differences
between two arms are paired. With few seeds the variance between trainings is known only roughly; with one seed the
interval does not contain it.
"""

import functools
from collections.abc import Callable

import numpy as np

from hgdpo_core.metrics import WinRate
from hgdpo_core.statistics.intervals import PERCENTILES, Estimate

RESAMPLES = 4_000  # a tail of 2.5 % is then known to 0.25 percentage points
Statistic = Callable[[np.ndarray], np.ndarray]
"""Means [..., K] -> value [...]."""


def resampled_means(values: np.ndarray) -> np.ndarray:
    """Means over resampled seeds and prompts, float64 [R, K], of values [S, P, K]; the same draws for one S and P."""
    seed_weights, prompt_weights = _draws(*values.shape[:2])
    by_prompt = np.einsum("rp,spk->rsk", prompt_weights, values, optimize=True)
    return np.einsum("rs,rsk->rk", seed_weights, by_prompt)


@functools.lru_cache(maxsize=4)
def _draws(seeds: int, prompts: int) -> tuple[np.ndarray, np.ndarray]:
    """The weight of each seed [R, S] and of each prompt [R, P] in each draw."""
    rng = np.random.default_rng(0)
    prompt_counts = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=RESAMPLES)
    return rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES) / seeds, prompt_counts / prompts


def estimate(values: np.ndarray, statistic: Statistic) -> Estimate:
    """`statistic` of the means over seeds and prompts of values [S, P, K], with its interval."""
    return _interval(statistic(values.mean(axis=(0, 1))), statistic(resampled_means(values)))


def difference(values: np.ndarray, others: np.ndarray, statistic: Statistic) -> Estimate:
    """`statistic` of `values` minus that of `others`, both [S, P, K] with the same prompts and seeds, in pairs."""
    both = [(statistic(side.mean(axis=(0, 1))), statistic(resampled_means(side))) for side in (values, others)]
    return _interval(both[0][0] - both[1][0], both[0][1] - both[1][1])


def _interval(value: np.ndarray, draws: np.ndarray) -> Estimate:
    draws = draws[np.isfinite(draws)]
    if not np.isfinite(value) or len(draws) == 0:
        return Estimate(None, None, None)
    low, high = np.percentile(draws, PERCENTILES)
    return Estimate(float(value), float(low), float(high))


def outcomes(gains: np.ndarray) -> np.ndarray:
    """Won and lost, float64 [S, P, 2], of score gains [S, P] of tuned over target; a tie is neither."""
    return np.stack([gains > 0, gains < 0], axis=-1).astype(np.float64)


def rate(means: np.ndarray) -> np.ndarray:
    """Wins / (wins + losses) in 0..1 of mean `outcomes` [..., 2]; nan without wins and losses."""
    decided = means.sum(axis=-1)
    return np.divide(means[..., 0], decided, out=np.full(decided.shape, np.nan), where=decided > 0)


def win_rate_estimate(gains: np.ndarray) -> Estimate:
    """Win rate over all seeds of score gains [S, P].

    Where all decided prompts have the same outcome, resampling gives an interval of width 0: then the exact interval
    over the prompts is returned, as if there were one seed.
    """
    result = estimate(outcomes(gains), rate)
    if result.value in (0.0, 1.0):
        decided = int((gains != 0).any(axis=0).sum())
        exact = WinRate.from_counts(*((decided, 0, 0) if result.value else (0, decided, 0)))
        return Estimate(result.value, exact.ci_low, exact.ci_high)
    return result


def first(means: np.ndarray) -> np.ndarray:
    """The mean itself, of values [S, P, 1]."""
    return means[..., 0]
