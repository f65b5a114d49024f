"""Which candidates become winner and loser, ties and rejected pools included."""

import math

import pytest
import torch

from hgdpo_core.errors import ConfigError, InputError
from hgdpo_core.selection import select_pair


def pair(scores: list[float], rank: int | None = None) -> tuple[int, int]:
    winner, loser = select_pair(torch.tensor([scores]), loser_rank=rank)
    return int(winner), int(loser)


def test_best_and_worst_of_each_pool():
    winner, loser = select_pair(torch.tensor([[0.1, 0.9, 0.5], [3.0, 2.0, 1.0]]))
    assert winner.tolist() == [1, 0] and loser.tolist() == [0, 2]
    assert winner.dtype == loser.dtype == torch.int64


def test_ties_go_to_the_lower_index():
    assert pair([1.0, 5.0, 5.0, 1.0]) == (1, 0)


@pytest.mark.parametrize(("rank", "loser"), [(2, 3), (3, 0), (4, 2)])
def test_loser_rank_counts_from_the_best(rank, loser):
    assert pair([2.0, 4.0, 1.0, 3.0], rank) == (1, loser)


@pytest.mark.parametrize(("rank", "loser"), [(2, 3), (3, 2), (4, 1)])
def test_equal_losers_rank_the_higher_index_first(rank, loser):
    assert pair([9.0, 5.0, 5.0, 5.0], rank) == (0, loser)


def test_the_last_rank_is_the_default():
    torch.manual_seed(0)
    scores = torch.randint(0, 6, (500, 8)).float()  # plenty of ties
    default, ranked = select_pair(scores), select_pair(scores, loser_rank=8)
    assert torch.equal(default[0], ranked[0]) and torch.equal(default[1], ranked[1])
    for row, winner, loser in zip(scores.tolist(), *map(torch.Tensor.tolist, default), strict=True):
        assert (winner, loser) == (row.index(max(row)), row.index(min(row)))


@pytest.mark.parametrize("scores", [[1.0, math.nan, 0.0], [1.0, math.inf, 0.0], [1.0, -math.inf, 0.0], [2.0, 2.0, 2.0]])
def test_pools_without_a_pair(scores):
    assert pair(scores) == (-1, -1)


def test_a_loser_that_ties_with_the_winner_is_no_pair():
    assert pair([5.0, 5.0, 3.0], 2) == (-1, -1)
    assert pair([5.0, 5.0, 3.0], 3) == (0, 2)


def test_one_bad_pool_leaves_the_others_alone():
    winner, loser = select_pair(torch.tensor([[math.nan, 1.0], [0.0, 1.0]]))
    assert winner.tolist() == [-1, 1] and loser.tolist() == [-1, 0]


@pytest.mark.parametrize("scores", [torch.rand(4), torch.rand(2, 1), torch.rand(2, 2, 2), torch.ones(2, 2) > 0])
def test_unfit_scores_are_refused(scores):
    with pytest.raises(InputError, match="expected"):
        select_pair(scores)


@pytest.mark.parametrize("rank", [0, 1, 4, -1])
def test_ranks_outside_the_pool_are_refused(rank):
    with pytest.raises(ConfigError, match="from 2 to 3"):
        select_pair(torch.rand(1, 3), loser_rank=rank)
