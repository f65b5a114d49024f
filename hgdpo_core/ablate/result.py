"""The results of an ablation, from which tables, plots and pages are made: means with 95 % intervals.

Prompts and training seeds are both resampled. All arms have the same prompts and the same seeds, so the draws are the
same for all arms of one shape, and differences between two arms are paired. With few seeds the variance between
trainings is known only roughly; with one seed the interval does not contain it.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hgdpo_core.ablate.arms import Arm, PlannedTable
from hgdpo_core.ablate.measure import ArmRecord, Diversity
from hgdpo_core.ablate.program import Ablation
from hgdpo_core.ablate.settings import World
from hgdpo_core.metrics import WinRate
from hgdpo_core.statistics.intervals import PERCENTILES, Estimate

RESAMPLES = 4_000  # a tail of 2.5 % is then known to 0.25 percentage points
COLOURS = ("hue", "saturation", "value", "hue_degrees", "warmth", "distance")
"""Signed changes in percent of the target's mean; of the circular mean in degrees; of red minus blue, and the distance
of the mean colours in RGB, both in levels of 255."""
Statistic = Callable[[np.ndarray], np.ndarray]
"""Means [..., K] -> value [...]."""


@dataclass(frozen=True)
class Results:
    """Measured numbers, by arm and training seed."""

    ablation: Ablation
    records: Mapping[Arm, Sequence[ArmRecord]]
    """One per arm and seed, in the order of the seeds."""
    target_colours: np.ndarray
    """`channel_means` of the target's images, float64 [P, 8]."""
    target_diversity: Diversity | None
    diversity: Mapping[Arm, Sequence[Diversity]]
    distances: Mapping[World, np.ndarray]
    """Figure 5b: float64 [pools, N - 1, 2], see `measure_rank_distances`."""

    def scorers(self, planned: PlannedTable) -> list[str]:
        """Names of the scorers of a table's arms."""
        return list(self.records[planned.rows[0].arm][0].win_rate)

    def gains(self, arm: Arm, scorer: str) -> np.ndarray:
        """Score of the tuned model over the target, float64 [S, P]."""
        return np.array([record.gains[scorer] for record in self.records[arm]])

    def win_rate(self, arm: Arm, scorer: str) -> Estimate:
        """Over all seeds and prompts, in 0..1."""
        return win_rate_estimate(self.gains(arm, scorer))

    def win_rate_gap(self, arm: Arm, other: Arm, scorer: str) -> Estimate:
        """Win rate of `arm` minus that of `other`, in pairs of prompts and seeds."""
        return difference(outcomes(self.gains(arm, scorer)), outcomes(self.gains(other, scorer)), rate)

    def win_rate_against(self, arm: Arm, other: Arm, scorer: str) -> Estimate:
        """How often images of `arm` score above those of `other` for the same prompt and training seed, in 0..1."""
        return win_rate_estimate(self.gains(arm, scorer) - self.gains(other, scorer))

    def score_change(self, arm: Arm, scorer: str) -> Estimate:
        """Mean score of the tuned model minus the target's, in the scorer's units."""
        return estimate(self.gains(arm, scorer)[..., None], first)

    def defects(self, arm: Arm, scorer: str) -> Estimate | None:
        """Fraction of defective images, tuned minus target; None for a scorer without a limit for defects."""
        if scorer not in self.records[arm][0].defects:
            return None
        return estimate(np.array([record.defects[scorer] for record in self.records[arm]])[..., None], first)

    def colour(self, arm: Arm, name: str) -> Estimate:
        """One of COLOURS, of the arm relative to the target."""
        values = self._colours(arm)
        return estimate(values, colour_statistic(name, values))

    def colour_gap(self, arm: Arm, other: Arm, name: str) -> Estimate:
        """The absolute value of one of COLOURS for `arm` minus that for `other`."""
        statistics = [colour_statistic(name, self._colours(one)) for one in (arm, other)]
        return difference(self._colours(arm), self._colours(other), lambda means: np.abs(statistics[0](means)))

    def diversity_of(self, arm: Arm | None) -> Estimate | None:
        """Mean pairwise distance of a prompt's images; of the target for None. None if it was not measured."""
        records = self.diversity.get(arm, ()) if arm else [self.target_diversity] if self.target_diversity else ()
        if not records:
            return None
        return estimate(np.array([record.distances for record in records])[..., None], first)

    def _colours(self, arm: Arm) -> np.ndarray:
        """Tuned, then target, float64 [S, P, 16]."""
        tuned = np.array([record.colours for record in self.records[arm]])
        return np.concatenate([tuned, np.broadcast_to(self.target_colours, tuned.shape)], axis=-1)


def colour_statistic(name: str, values: np.ndarray) -> Statistic:
    """One of COLOURS as a function of means [..., 16]: `channel_means` of the tuned model's images, then the target's.

    Angles are wrapped around that of the means of `values`, so that their interval is not split at 180 degrees.
    """
    if name in ("hue", "saturation", "value"):
        channel = ("hue", "saturation", "value").index(name)
        return lambda means: 100 * (means[..., channel] / means[..., 8 + channel] - 1)
    if name == "warmth":
        return lambda means: (means[..., 5] - means[..., 7]) - (means[..., 13] - means[..., 15])
    if name == "distance":
        return lambda means: np.linalg.norm(means[..., 5:8] - means[..., 13:16], axis=-1)
    centre = _turn(values.mean(axis=(0, 1)))
    centre = 180 - (180 - centre) % 360
    return lambda means: centre + (180 - (180 - (_turn(means) - centre)) % 360)


def _turn(means: np.ndarray) -> np.ndarray:
    """Degrees between the circular mean hues, not wrapped."""
    return np.degrees(np.arctan2(means[..., 4], means[..., 3]) - np.arctan2(means[..., 12], means[..., 11]))


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
