"""Grids: their contents are where they should be; images are plain rectangles."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from hgdpo_core.errors import InputError
from hgdpo_core.rendering.grids import (
    ACCENT,
    LOSS,
    MARGIN,
    OUTLINE,
    PairSample,
    PoolSample,
    format_score,
    pair_grid,
    pool_grid,
    rank_pool,
    row_grid,
    scale_to_tile,
)

COLOURS = [(200, 40, 40), (40, 160, 40), (60, 60, 200), (220, 200, 60), (20, 140, 140)]


def plain(colour: tuple[int, int, int], size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, colour)


def pair(target_score: float, tuned_score: float, prompt: str = "a man", size=(64, 64)) -> PairSample:
    return PairSample(prompt, plain(COLOURS[0], size), plain(COLOURS[1], size), target_score, tuned_score)


def pool(scores: list[float], winner: int, loser: int) -> PoolSample:
    return PoolSample("a woman", [plain(COLOURS[i]) for i in range(len(scores))], scores, winner, loser)


def left_edge(grid: Image.Image, colour: tuple[int, int, int]) -> int | None:
    columns = np.flatnonzero((np.asarray(grid) == colour).all(axis=-1).any(axis=0))
    return int(columns[0]) if columns.size else None


@pytest.mark.parametrize(("size", "expected"), [
    ((64, 64), (192, 192)),  # at most three times
    ((128, 96), (256, 192)),  # a whole factor, not 2.25
    ((704, 1024), (198, 288)),
    ((288, 10), (288, 10)),
    ((5000, 2), (288, 1)),
])
def test_tiles_are_sensible_in_size(size, expected):
    assert scale_to_tile(plain(COLOURS[0], size), 288).size == expected


def test_small_images_keep_their_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    tile = np.asarray(scale_to_tile(Image.fromarray(pixels), 192))
    np.testing.assert_array_equal(tile, pixels.repeat(3, axis=0).repeat(3, axis=1))


def test_pair_grid_shows_the_person_left_of_a_personalised_pair():
    plain_grid = pair_grid([pair(1.0, 2.0)])
    grid = pair_grid([replace(pair(1.0, 2.0), concept=plain(COLOURS[2])), pair(1.0, 2.0)], columns=1)
    edges = [left_edge(grid, colour) for colour in (COLOURS[2], COLOURS[0], COLOURS[1])]
    assert edges[0] == MARGIN and edges == sorted(edges) and edges[1] - edges[0] == edges[2] - edges[1]
    assert left_edge(plain_grid, COLOURS[0]) == MARGIN and grid.width > plain_grid.width
    lower = grid.crop((0, grid.height // 2, grid.width, grid.height))
    assert left_edge(lower, COLOURS[2]) is None and left_edge(lower, COLOURS[0]) == edges[1]


def test_pair_grid_shows_the_target_left_and_marks_the_higher_score():
    for scores, marked in (((21.0, 22.0), COLOURS[1]), ((22.0, 21.0), COLOURS[0])):
        grid = pair_grid([pair(*scores)])
        target, tuned, mark = (left_edge(grid, colour) for colour in (COLOURS[0], COLOURS[1], ACCENT))
        assert target == MARGIN and tuned is not None and tuned > target + 192
        assert mark is not None and mark + OUTLINE == left_edge(grid, marked)
    assert left_edge(pair_grid([pair(21.0, 21.0)]), ACCENT) is None


def test_pair_grid_grows_by_columns_rows_and_prompt():
    one, two, three = (pair_grid([pair(1.0, 2.0)] * n, columns=2) for n in (1, 2, 3))
    assert one.height == two.height < three.height
    assert one.width < two.width == three.width
    wordy = pair_grid([pair(1.0, 2.0, "many words " * 20)])
    endless = pair_grid([pair(1.0, 2.0, "x" * 5_000)])
    assert one.height < wordy.height and endless.height == wordy.height  # both fill all prompt lines
    assert pair_grid([pair(1.0, 2.0, "")]).width == one.width
    assert pair_grid([pair(1.0, float("nan"), size=(704, 1024))]).height > one.height


def test_pool_grid_runs_from_best_to_worst_and_outlines_the_pair():
    grid = pool_grid([pool([3.0, 5.0, 1.0, 4.0, 2.0], winner=1, loser=2)])
    edges = [left_edge(grid, COLOURS[i]) for i in (1, 3, 0, 4, 2)]
    assert all(edge is not None for edge in edges) and edges == sorted(edges, key=lambda edge: edge or 0)
    assert left_edge(grid, ACCENT) == MARGIN - OUTLINE
    assert left_edge(grid, LOSS) == (edges[-1] or 0) - OUTLINE


def test_ranking_keeps_winner_first_and_loser_at_its_rank_among_ties():
    # select_pair gives ties to the lower index, for winner and loser alike.
    assert rank_pool(pool([2.0, 2.0, 1.0, 1.0], winner=0, loser=2)) == [0, 1, 3, 2]
    assert rank_pool(pool([float("nan"), 2.0, 3.0], winner=-1, loser=-1)) == [2, 1, 0]
    assert left_edge(pool_grid([pool([1.0, 1.0], winner=-1, loser=-1)]), ACCENT) is None


def test_unusable_samples_are_refused():
    for scores, winner, loser in (([], -1, -1), ([1.0, 2.0], 2, 0), ([1.0, 2.0], 1, -2)):
        with pytest.raises(InputError):
            pool_grid([pool(scores, winner, loser)])
    with pytest.raises(InputError, match="1 scores and 2 images"):
        rank_pool(PoolSample("a man", [plain(COLOURS[0])] * 2, [1.0], 0, 1))
    with pytest.raises(InputError, match="at least one pair"):
        pair_grid([])
    with pytest.raises(InputError, match="at least one pool"):
        pool_grid([])


def test_scores_print_alike_everywhere():
    assert format_score(21.34567) == "21.346"
    assert format_score(float("nan")) == "no score"


def test_rows_stand_below_each_other_in_the_order_given():
    grid = row_grid("a man", [("weight 0", [plain(COLOURS[0]), plain(COLOURS[1])]), ("weight 1", [plain(COLOURS[2])])])
    edges = [left_edge(grid, colour) for colour in COLOURS[:3]]
    assert edges[0] == edges[2] == MARGIN and edges[1] > edges[0]
    tops = [np.flatnonzero((np.asarray(grid) == colour).all(axis=-1).any(axis=1))[0] for colour in COLOURS[:3]]
    assert tops[0] == tops[1] < tops[2]
    with pytest.raises(InputError, match="at least one image in every row"):
        row_grid("a man", [("weight 0", [])])
