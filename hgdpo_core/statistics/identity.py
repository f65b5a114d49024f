"""Whether people stay themselves: identity distances of two models compared. Pure functions of arrays.

Distance = 1 - cosine of a judge's embeddings of image and concept. A model wins a sample where its image is nearer. No
difference is what is hoped for, and a win rate near 50 % is no proof of it: identity counts as kept only where the
whole 90 % interval lies within a margin around 50 % (two one-sided tests at 5 %; Schuirmann 1987). Our choice.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from scipy.stats import norm

from hgdpo_core.errors import InputError
from hgdpo_core.metrics import WinRate
from hgdpo_core.statistics.clusters import Clusters, rate_influence, rate_interval, two_way_spread, win_rate_of_votes

TAIL = 0.95  # of each of the two one-sided tests
Verdict = Literal["kept", "changed", "open"]


@dataclass(frozen=True)
class Distances:
    """A model's images as one judge sees them, P samples of K images."""

    distance: np.ndarray
    """float64 [P, K], in 0..2; NaN where the judge found no face."""
    faces: np.ndarray
    """int [P, K]: how many faces an image shows."""

    def per_sample(self) -> np.ndarray:
        """float64 [P]: mean over the images that show a face; NaN where none does."""
        found = np.isfinite(self.distance)
        sums, counts = np.where(found, self.distance, 0.0).sum(axis=1), found.sum(axis=1)
        return np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)


@dataclass(frozen=True)
class IdentityChange:
    """One judge's comparison of the tuned model with the target."""

    win_rate: WinRate
    """How often the tuned model's image is nearer to the person; 95 % interval over people and prompts. `n` counts
    samples with a face by both models."""
    low: float | None
    """Of the 90 % interval."""
    high: float | None
    margin: float
    verdict: Verdict
    """kept: the 90 % interval is within 0.5 +- margin; changed: all of it is outside; open: neither."""
    power: float
    """Chance to find "kept" with so many samples where nothing changes, if they were independent: an upper bound."""
    target_distance: float | None
    """Mean over the samples with a face by both models."""
    tuned_distance: float | None
    images: int
    """By each model."""
    faceless: dict[str, int]
    """Images without a face, by "target" and "tuned": neither win nor loss."""
    several: dict[str, int]
    """Images with several faces, of which the largest counts."""
    left_out: int
    """Samples of which a model has no image with a face."""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values under the field names."""
        return asdict(self)


def identity_change(target: Distances, tuned: Distances, people: Sequence[str], prompts: Sequence[str],
                    margin: float) -> IdentityChange:
    """Compare both models' distances; `people` and `prompts` name the person and the text of each of P samples."""
    if not len(target.distance) == len(tuned.distance) == len(people) == len(prompts):
        raise InputError(f"identity_change needs both models' distances, a person and a prompt for each sample, got "
                         f"{[len(each) for each in (target.distance, tuned.distance, people, prompts)]} of them")
    before, after = target.per_sample(), tuned.per_sample()
    seen = np.isfinite(before) & np.isfinite(after)
    won, lost = seen & (after < before), seen & (after > before)
    rate = clustered_win_rate(won, lost, int((seen & (after == before)).sum()), people, prompts)
    low, high = _equivalence_interval(won, lost, people, prompts)
    sides = {"target": target, "tuned": tuned}
    means = [float(side[seen].mean()) if seen.any() else None for side in (before, after)]
    return IdentityChange(
        rate, low, high, margin, equivalence(low, high, margin), equivalence_power(rate.wins + rate.losses, margin),
        *means, images=int(target.distance.size),
        faceless={name: int((~np.isfinite(side.distance)).sum()) for name, side in sides.items()},
        several={name: int((side.faces > 1).sum()) for name, side in sides.items()}, left_out=int((~seen).sum()))


def clustered_win_rate(won: np.ndarray, lost: np.ndarray, ties: int, people: Sequence[str],
                       prompts: Sequence[str]) -> WinRate:
    """The win rate of samples, bool [P], with its interval over people and prompts; none with one of either."""
    decided = won | lost
    return win_rate_of_votes(won[decided], np.asarray(people)[decided], np.asarray(prompts)[decided], ties)


def _equivalence_interval(won: np.ndarray, lost: np.ndarray, people: Sequence[str],
                          prompts: Sequence[str]) -> tuple[float | None, float | None]:
    decided = won | lost
    votes = won[decided]
    spread = two_way_spread(rate_influence(votes), Clusters.of(np.asarray(people)[decided]),
                            Clusters.of(np.asarray(prompts)[decided])) if len(votes) else None
    return (None, None) if spread is None else rate_interval(float(votes.mean()), spread, len(votes), TAIL)


def equivalence(low: float | None, high: float | None, margin: float) -> Verdict:
    """What a 90 % interval of a win rate shows."""
    if low is None or high is None:
        return "open"
    if 0.5 - margin <= low and high <= 0.5 + margin:
        return "kept"
    return "changed" if high < 0.5 - margin or low > 0.5 + margin else "open"


def equivalence_power(samples: int, margin: float) -> float:
    """Chance that the 90 % interval of a true 50 % lies within the margin, for independent samples; normal."""
    if samples == 0:
        return 0.0
    deviation = math.sqrt(0.25 / samples)
    return max(0.0, float(2 * norm.cdf(margin / deviation - norm.ppf(TAIL)) - 1))
