"""How new scores of the same images change rankings, winners and losers.

Pure functions of arrays. Undefined values, such as the tau of a pool whose scores are all equal, are nan in arrays and
None in summaries (null in JSON).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau

from hgdpo_core.errors import InputError
from hgdpo_core.selection import select_pair

TAU_BINS = 10  # of 0.2 each, from -1 to 1
TAU_STATISTICS = {"mean": np.mean, "median": np.median, "min": np.min}


@dataclass(frozen=True)
class RankingDrift:
    """How the ranking of each pool changed, in the order of the input rows.

    `taus`: Kendall's tau-b between the scores before and now, float64 [P] in -1..1: 1 for the same ranking, -1 for
    the reversed one, nan where a score is not finite or one side's scores are all equal. `winners`, `losers`:
    int64 [P, 2], the index before and now, -1 for a pool without a pair.
    """

    taus: np.ndarray
    winners: np.ndarray
    losers: np.ndarray

    @property
    def paired(self) -> np.ndarray:
        """bool [P]: pools with a winner and a loser before and now; only of these can one flip."""
        return np.all(self.winners >= 0, axis=1)

    @property
    def winner_flipped(self) -> np.ndarray:
        """bool [P]: the best image changed."""
        return self.paired & (self.winners[:, 0] != self.winners[:, 1])

    @property
    def loser_flipped(self) -> np.ndarray:
        """bool [P]: the worst image changed."""
        return self.paired & (self.losers[:, 0] != self.losers[:, 1])

    def summary(self) -> dict[str, Any]:
        """JSON values: tau over the prompts; flips as counts and as fractions of the pools with a pair both times."""
        taus, paired = self.taus[np.isfinite(self.taus)], int(self.paired.sum())
        had, has = self.winners[:, 0] >= 0, self.winners[:, 1] >= 0
        flips = {"winner_flipped": self.winner_flipped, "loser_flipped": self.loser_flipped,
                 "winner_or_loser_flipped": self.winner_flipped | self.loser_flipped}
        return {
            "prompts": len(self.taus),
            "tau": {**{name: float(value(taus)) if taus.size else None for name, value in TAU_STATISTICS.items()},
                    "undefined": len(self.taus) - len(taus),
                    "histogram": np.histogram(taus, bins=TAU_BINS, range=(-1, 1))[0].tolist()},
            "pairs_compared": paired, "pairs_lost": int((had & ~has).sum()), "pairs_gained": int((has & ~had).sum()),
            **{name: {"prompts": int(flipped.sum()), "share": int(flipped.sum()) / paired if paired else None}
               for name, flipped in flips.items()}}


def ranking_drift(before: np.ndarray, now: np.ndarray) -> RankingDrift:
    """Compare old and new scores of the same candidates, both [P, N], N >= 2; winner and loser as in Eq. 6.

    InputError when the shapes differ or a pool has a single candidate, which has no ranking.
    """
    if before.shape != now.shape or before.ndim != 2 or before.shape[1] < 2:
        raise InputError("ranking_drift needs two score arrays of one shape [P, N] with N >= 2, "
                         f"got {list(before.shape)} and {list(now.shape)}: compare scores of the same pools")
    pairs = [select_pair(torch.from_numpy(np.ascontiguousarray(scores))) for scores in (before, now)]
    winners, losers = (np.stack([pair[role].numpy() for pair in pairs], axis=1) for role in (0, 1))
    taus = np.array([_tau(*rows) for rows in zip(before, now, strict=True)], dtype=np.float64)
    return RankingDrift(taus, winners, losers)


def _tau(before: np.ndarray, now: np.ndarray) -> float:
    if not (np.isfinite(before).all() and np.isfinite(now).all()):
        return float("nan")
    if len(before) == 2:  # SciPy's asymptotic p-value, which is unused, divides by n - 2
        product = float(np.sign(np.diff(before) * np.diff(now))[0])
        return product if product else float("nan")  # a tie has no order
    # "asymptotic" saves the time of the exact p-value, which is unused.
    return float(kendalltau(before, now, variant="b", method="asymptotic").statistic)  # pyright: ignore
