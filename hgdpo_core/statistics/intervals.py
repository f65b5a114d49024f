"""95 % intervals over prompts, and a sign test. Pure functions of arrays.

The prompt is the unit: images of one prompt are not independent of each other, and both models generate them from the
same seeds. So whole prompts are resampled, with both models together (a paired bootstrap). Undefined values are None
(null in JSON); a single prompt has no interval.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy.stats import binomtest, t

from hgdpo_core.errors import InputError
from hgdpo_core.metrics import CONFIDENCE, Scores, paired_scores

if TYPE_CHECKING:
    from hgdpo_core.statistics.clusters import Crossed

RESAMPLES = 10_000  # a tail of 2.5 % is then known to 0.16 percentage points
CHUNK_ENTRIES = 2**22  # prompts x resamples in memory at a time
PERCENTILES = (50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE))


class Interval(NamedTuple):
    """Both ends of a 95 % interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float | None
    ci_low: float | None
    ci_high: float | None

    @classmethod
    def of(cls, value: float | None, interval: Interval | None) -> "Estimate":
        low, high = interval or (None, None)
        return cls(value, low, high)

    def scaled(self, factor: float) -> "Estimate":
        """The same number in another unit."""
        return Estimate(*(None if part is None else factor * part for part in (self.value, self.ci_low, self.ci_high)))

    def shifted(self, by: float) -> "Estimate":
        """The same number, counted from another zero."""
        return Estimate(*(None if part is None else part + by for part in (self.value, self.ci_low, self.ci_high)))

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values under the field names."""
        return asdict(self)


@dataclass(frozen=True)
class ScoreChange:
    """Mean score of A minus that of B, in the scorer's own units, with its interval.

    `sign_test_p` is the two-sided exact p-value of wins against losses, without ties.
    """

    mean: float
    ci_low: float | None
    ci_high: float | None
    sign_test_p: float
    mean_a: float
    mean_b: float
    n: int

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values as `summary.json` holds them: A is the tuned model, B the target."""
        return {"mean": self.mean, "ci_low": self.ci_low, "ci_high": self.ci_high, "sign_test_p": self.sign_test_p,
                "tuned_mean": self.mean_a, "target_mean": self.mean_b, "n": self.n}


@dataclass(frozen=True)
class DefectChange:
    """Fractions of defective images of target and tuned model, their difference, and its interval."""

    below: float
    target: float
    tuned: float
    difference: float
    ci_low: float | None
    ci_high: float | None
    n: int
    """Prompts."""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values under the field names."""
        return asdict(self)


def score_change(scores_a: Scores, scores_b: Scores, clusters: "Crossed | None" = None) -> ScoreChange:
    """How much higher A scores than B on average: a paired Student interval over prompts, and the exact sign test.

    With `clusters` the interval is over people and prompts.

    Scores as `win_rate` takes them: finite [P], or [P, K] averaged over K first; InputError otherwise and for P = 0.
    """
    a, b = (side.mean(axis=1) for side in paired_scores("score_change", scores_a, scores_b))
    if not len(a):
        raise InputError("score_change needs the scores of at least one prompt, got none")
    difference = a - b
    mean, prompts = float(difference.mean()), len(difference)
    low = high = None
    if clusters is not None:
        low, high = clusters.interval(mean, (difference - mean) / prompts) or (None, None)
    elif prompts > 1:
        half = float(t.ppf((1 + CONFIDENCE) / 2, prompts - 1) * difference.std(ddof=1) / np.sqrt(prompts))
        low, high = mean - half, mean + half
    p = sign_test(int((a > b).sum()), int((a < b).sum()))
    return ScoreChange(mean, low, high, p, float(a.mean()), float(b.mean()), prompts)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p-value of the sign test; 1 without wins and losses."""
    return float(binomtest(wins, wins + losses, 0.5).pvalue) if wins + losses else 1.0


def win_rate_interval(scores_a: Scores, scores_b: Scores) -> Interval | None:
    """Bootstrap interval, over prompts, of the rate that `win_rate` returns; None for one prompt or no decided one.

    The headline is the exact interval of `win_rate`: if every prompt is won, resampling gives a width of 0.
    """
    a, b = (side.mean(axis=1) for side in paired_scores("win_rate_interval", scores_a, scores_b))
    won, lost = (a > b), (a < b)
    if len(a) < 2 or not (won | lost).any():
        return None
    sums = resample_sums(np.stack([won, lost], axis=1).astype(np.float64))
    decided = sums.sum(axis=1)
    draws = np.divide(sums[:, 0], decided, out=np.full(len(sums), np.nan), where=decided > 0)
    return percentile_interval(draws, unknown=(0.0, 1.0))


def defect_change(tuned_scores: Scores, target_scores: Scores, below: float,
                  clusters: "Crossed | None" = None) -> DefectChange:
    """Fraction of images that score under `below`, tuned minus target, with a paired bootstrap interval over prompts.

    With `clusters` the interval is over people and prompts.

    Scores as `win_rate` takes them; with K images per prompt every image counts. An interval of width 0 means that no
    prompt distinguished the models, not that none would.
    """
    tuned, target = ((side < below).mean(axis=1)
                     for side in paired_scores("defect_change", tuned_scores, target_scores))
    if not len(tuned):
        raise InputError("defect_change needs the scores of at least one prompt, got none")
    difference = tuned - target
    mean = float(difference.mean())
    low, high = (mean_interval(difference) if clusters is None else
                 clusters.interval(mean, (difference - mean) / len(difference))) or (None, None)
    return DefectChange(below, float(target.mean()), float(tuned.mean()), mean, low, high, len(difference))


def mean_interval(values: np.ndarray) -> Interval | None:
    """Bootstrap interval of the mean of one value per prompt, float [P]; None for one prompt."""
    if len(values) < 2:
        return None
    return percentile_interval(resample_sums(np.asarray(values, dtype=np.float64)[:, None])[:, 0] / len(values))


def resample_sums(values: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Sums over P prompts drawn with replacement, for 10 000 draws: float64 [R, K] of values [P, K].

    All columns have the same draws, so functions of several columns are paired. The same seed gives the same draws.
    """
    if values.ndim != 2 or len(values) == 0:
        raise InputError(f"resample_sums needs values [P, K] of at least one prompt, got {list(values.shape)}")
    rng = np.random.default_rng(seed)
    return np.concatenate([counts @ values for counts in _draw_counts(rng, len(values))])


def _draw_counts(rng: np.random.Generator, prompts: int) -> Iterator[np.ndarray]:
    """How often each prompt is drawn: float64 [r, P] until there are 10 000 rows."""
    rows = max(1, min(RESAMPLES, CHUNK_ENTRIES // prompts))
    for first in range(0, RESAMPLES, rows):
        r = min(rows, RESAMPLES - first)
        drawn = rng.integers(prompts, size=(r, prompts)) + prompts * np.arange(r)[:, None]
        yield np.bincount(drawn.ravel(), minlength=r * prompts).reshape(r, prompts).astype(np.float64)


def percentile_interval(draws: np.ndarray, *, unknown: tuple[float, float] = (np.nan, np.nan)) -> Interval | None:
    """The middle 95 % of the draws [R]. NaN counts as `unknown[0]` at the lower end and as `unknown[1]` at the upper
    end; by default it makes the interval None."""
    undefined = np.isnan(draws)
    ends = [float(np.percentile(np.where(undefined, end, draws), percentile))
            for end, percentile in zip(unknown, PERCENTILES, strict=True)]
    return None if np.isnan(ends).any() else Interval(*ends)
