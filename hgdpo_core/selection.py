"""Scores of a pool -> which candidates become winner and loser (arXiv:2405.20216v1, Eq. 6 and Table 5)."""

import torch

from hgdpo_core.errors import ConfigError, InputError


def select_pair(scores: torch.Tensor, *, loser_rank: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Winner and loser index of each pool: two int64 `[B]`, both -1 for a pool without a pair.

    `scores` `[B,N]`, N >= 2, real, higher is better, any scale. The winner has the highest score, ties going
    to the lower index. The loser has the lowest, ties going to the lower index; with `loser_rank=l` (1-based,
    2..N; ablation N-20-L-l) it has the l-th highest score, where among equal scores the HIGHER index ranks
    first, so that `loser_rank=N` equals the default. A pool has no pair when one of its scores is not finite
    or winner and loser score the same. InputError for wrong scores, ConfigError for a rank outside 2..N.
    """
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise InputError(f"scores have shape {list(scores.shape)}: expected [B,N], for each pool a row of at "
                         "least 2 scores")
    if scores.dtype == torch.bool or scores.is_complex():
        raise InputError(f"scores are {scores.dtype}: expected real numbers")
    candidates = scores.shape[1]
    if loser_rank is not None and not 2 <= loser_rank <= candidates:
        raise ConfigError(f"loser_rank is {loser_rank}, but a pool holds {candidates} images: "
                          f"choose a rank from 2 to {candidates}")
    # Both sorts are stable: equal scores keep their order, so ties fall as documented on every device.
    winner = scores.sort(dim=1, descending=True, stable=True).indices[:, 0]
    worst_first_BN = scores.sort(dim=1, stable=True).indices
    loser = worst_first_BN[:, candidates - (loser_rank or candidates)]

    rows = torch.arange(len(scores), device=scores.device)
    has_pair = scores.isfinite().all(dim=1) & (scores[rows, winner] != scores[rows, loser])
    return winner.where(has_pair, -1), loser.where(has_pair, -1)
