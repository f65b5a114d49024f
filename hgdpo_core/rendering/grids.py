"""Grids of images: pairs side by side, and ranked pools (arXiv:2405.20216v1, Figure 6).

PIL only, with its built-in scalable font, which covers Latin scripts; other letters are shown as boxes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from hgdpo_core.errors import InputError

PAPER, INK, FAINT = (255, 255, 255), (24, 26, 32), (112, 117, 128)
ACCENT, LOSS = (22, 101, 192), (190, 73, 16)  # winner and loser, which are also labelled
MARGIN, GAP, OUTLINE = 32, 12, 4
PAIR_TILE_PX, POOL_TILE_PX = 288, 160
MAX_ENLARGEMENT = 3
PROMPT_SIZE, LABEL_SIZE = 16, 14
PROMPT_LINES = 4


@dataclass(frozen=True)
class PairSample:
    """Images of one prompt by both models from one seed, with their scores by one scorer, and the person's own image.
    """

    prompt: str
    target: Image.Image
    tuned: Image.Image
    target_score: float
    tuned_score: float
    concept: Image.Image | None = None


@dataclass(frozen=True)
class PoolSample:
    """One prompt's candidates in pool order; `winner` and `loser` index them, both -1 without a pair."""

    prompt: str
    images: list[Image.Image]
    scores: list[float]
    winner: int
    loser: int


def rank_pool(pool: PoolSample) -> list[int]:
    """Indices of the candidates from best to worst, scores that are not finite last.

    Among equal scores the winner leads and higher indices go first, so that a loser selected by rank is at its rank.
    InputError when images and scores differ in number or winner or loser is not a candidate.
    """
    count = len(pool.images)
    if count == 0 or len(pool.scores) != count:
        raise InputError(f"a pool needs as many scores as images, got {len(pool.scores)} scores "
                         f"and {count} images for {pool.prompt!r}")
    if not all(-1 <= index < count for index in (pool.winner, pool.loser)):
        raise InputError(f"winner and loser must be indices of {count} candidates, or -1, "
                         f"got {pool.winner} and {pool.loser} for {pool.prompt!r}")
    badness = [-score if math.isfinite(score) else math.inf for score in pool.scores]
    return sorted(range(count), key=lambda i: (badness[i], i != pool.winner, -i))


def format_score(score: float) -> str:
    """A score in the format of all grids and reports."""
    return f"{score:.3f}" if math.isfinite(score) else "no score"


def scale_to_tile(image: Image.Image, side_px: int) -> Image.Image:
    """`image` as RGB with its longer side at most `side_px`, its aspect kept.

    Small images are enlarged by a whole factor up to 3 with hard pixels; large ones are resampled smoothly.
    """
    longer = max(image.size)
    factor = min(MAX_ENLARGEMENT, side_px // longer)
    scale = factor or side_px / longer
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    resampling = Image.Resampling.NEAREST if factor else Image.Resampling.LANCZOS
    return image.convert("RGB").resize(size, resampling)


def pair_grid(pairs: Sequence[PairSample], columns: int = 3) -> Image.Image:
    """Pairs as target and tuned side by side, scores and prompt below, the higher score marked; personalised ones with
    the person's own image first."""
    if not pairs or columns < 1:
        raise InputError(f"pair_grid needs at least one pair and one column, got {len(pairs)} and {columns}")
    people = [[pair.concept] if pair.concept else [] for pair in pairs]
    tiles, tile_width, tile_height = _scale([(pair.target, pair.tuned, *own) for pair, own in
                                             zip(pairs, people, strict=True)], PAIR_TILE_PX)
    first = max(map(len, people))
    cell_width = (2 + first) * (tile_width + GAP) - GAP
    prompts = [_wrap(pair.prompt, _font(PROMPT_SIZE), cell_width) for pair in pairs]
    rows = [range(start, min(start + columns, len(pairs))) for start in range(0, len(pairs), columns)]
    prompt_heights = [_text_height(max(len(prompts[i]) for i in row), PROMPT_SIZE) for row in rows]
    image_and_label = tile_height + GAP + _text_height(1, LABEL_SIZE) + GAP

    width = MARGIN + min(columns, len(pairs)) * (cell_width + MARGIN)
    height = MARGIN + sum(image_and_label + prompt_height + MARGIN for prompt_height in prompt_heights)
    canvas, draw = _canvas(width, height)
    top = MARGIN
    for row, prompt_height in zip(rows, prompt_heights, strict=True):
        for column, i in enumerate(row):
            left = MARGIN + column * (cell_width + MARGIN)
            names = (("target", pairs[i].target_score, pairs[i].tuned_score),
                     ("tuned", pairs[i].tuned_score, pairs[i].target_score))
            for side, (name, score, other) in enumerate(names):
                box = (left + (first + side) * (tile_width + GAP), top, tile_width, tile_height)
                mark = ACCENT if score > other else None
                _draw_tile(canvas, draw, tiles[i][side], box, f"{name}  {format_score(score)}", mark)
            for tile in tiles[i][2:]:
                _draw_tile(canvas, draw, tile, (left, top, tile_width, tile_height), "concept", None)
            _draw_lines(draw, (left, top + image_and_label), prompts[i], PROMPT_SIZE, INK)
        top += image_and_label + prompt_height + MARGIN
    return canvas


def pool_grid(pools: Sequence[PoolSample]) -> Image.Image:
    """One row per pool, best image left, winner and loser outlined (paper Figure 6)."""
    if not pools:
        raise InputError("pool_grid needs at least one pool, got none")
    rankings = [rank_pool(pool) for pool in pools]
    images = [[pool.images[i] for i in ranking] for pool, ranking in zip(pools, rankings, strict=True)]
    tiles, tile_width, tile_height = _scale(images, POOL_TILE_PX)
    tile_width = max(tile_width, math.ceil(_font(LABEL_SIZE).getlength("winner 00.000")))
    row_width = max(len(row) for row in tiles) * (tile_width + GAP) - GAP
    prompts = [_wrap(pool.prompt, _font(PROMPT_SIZE), row_width) for pool in pools]
    label_height = GAP + _text_height(1, LABEL_SIZE)
    heights = [_text_height(len(lines), PROMPT_SIZE) + GAP + tile_height + label_height for lines in prompts]

    canvas, draw = _canvas(row_width + 2 * MARGIN, MARGIN + sum(height + MARGIN for height in heights))
    top = MARGIN
    for pool, ranking, row, lines, height in zip(pools, rankings, tiles, prompts, heights, strict=True):
        _draw_lines(draw, (MARGIN, top), lines, PROMPT_SIZE, INK)
        tile_top = top + _text_height(len(lines), PROMPT_SIZE) + GAP
        roles = {pool.winner: ("winner ", ACCENT), pool.loser: ("loser ", LOSS)}
        for column, (i, tile) in enumerate(zip(ranking, row, strict=True)):
            box = (MARGIN + column * (tile_width + GAP), tile_top, tile_width, tile_height)
            role, mark = roles.get(i, ("", None))
            _draw_tile(canvas, draw, tile, box, role + format_score(pool.scores[i]), mark)
        top += height + MARGIN
    return canvas


def row_grid(heading: str, rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """Labelled rows of images under one heading, such as one prompt at several LoRA weights (paper Figure 8)."""
    if not rows or not all(images for _, images in rows):
        raise InputError(f"row_grid needs at least one image in every row, got {[len(images) for _, images in rows]}")
    tiles, tile_width, tile_height = _scale([images for _, images in rows], POOL_TILE_PX)
    row_width = max(len(row) for row in tiles) * (tile_width + GAP) - GAP
    lines = _wrap(heading, _font(PROMPT_SIZE), row_width)
    label_height, row_height = _text_height(1, LABEL_SIZE), _text_height(1, LABEL_SIZE) + tile_height + MARGIN // 2
    top = MARGIN + _text_height(len(lines), PROMPT_SIZE) + GAP
    canvas, draw = _canvas(row_width + 2 * MARGIN, top + len(rows) * row_height + MARGIN // 2)
    _draw_lines(draw, (MARGIN, MARGIN), lines, PROMPT_SIZE, INK)
    for (label, _), row in zip(rows, tiles, strict=True):
        _draw_lines(draw, (MARGIN, top), [label], LABEL_SIZE, FAINT)
        for column, tile in enumerate(row):
            canvas.paste(tile, (MARGIN + column * (tile_width + GAP), top + label_height))
        top += row_height
    return canvas


def _scale(rows: Sequence[Sequence[Image.Image]], side_px: int) -> tuple[list[list[Image.Image]], int, int]:
    """The tiles of all rows, and the width and height that hold each of them."""
    tiles = [[scale_to_tile(image, side_px) for image in row] for row in rows]
    flat = [tile for row in tiles for tile in row]
    return tiles, max(tile.width for tile in flat), max(tile.height for tile in flat)


def _canvas(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    canvas = Image.new("RGB", (width, height), PAPER)
    return canvas, ImageDraw.Draw(canvas)


def _draw_tile(canvas: Image.Image, draw: ImageDraw.ImageDraw, tile: Image.Image,
               box: tuple[int, int, int, int], label: str, mark: tuple[int, int, int] | None) -> None:
    """The tile centred in box (left, top, width, height) with its label below; a mark colours both."""
    left, top, width, height = box
    x, y = left + (width - tile.width) // 2, top + (height - tile.height) // 2
    if mark:
        right, bottom = x + tile.width + OUTLINE - 1, y + tile.height + OUTLINE - 1
        draw.rectangle((x - OUTLINE, y - OUTLINE, right, bottom), fill=mark)
    canvas.paste(tile, (x, y))
    middle, label_top = left + width / 2, top + height + GAP
    draw.text((middle, label_top), label, fill=mark or FAINT, font=_font(LABEL_SIZE), anchor="ma")
    if mark:
        half, under = _font(LABEL_SIZE).getlength(label) / 2, label_top + LABEL_SIZE + 3
        draw.line((middle - half, under, middle + half, under), fill=mark, width=2)


def _draw_lines(draw: ImageDraw.ImageDraw, at: tuple[int, int], lines: list[str], size: int,
                colour: tuple[int, int, int]) -> None:
    for number, line in enumerate(lines):
        draw.text((at[0], at[1] + number * _line_height(size)), line, fill=colour, font=_font(size))


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """`text` in at most PROMPT_LINES lines that fit `width` pixels, with an ellipsis where it is cut."""
    lines, words = [""], _breakable_words(text, font, width)
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > PROMPT_LINES:
        lines, last = lines[:PROMPT_LINES], lines[PROMPT_LINES - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines[-1] = last.rstrip(" ,") + "…"
    return lines


def _breakable_words(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """The words of `text`, those too long for a line cut into pieces that fit."""
    words = []
    for word in text.split():
        piece = ""
        for letter in word:
            if piece and font.getlength(piece + letter) > width:
                words.append(piece)
                piece = ""
            piece += letter
        words.append(piece)
    return words


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise InputError("Pillow was built without FreeType and cannot write labels: install its own wheel")
    return font


def _line_height(size: int) -> int:
    return round(1.35 * size)


def _text_height(lines: int, size: int) -> int:
    return lines * _line_height(size)
