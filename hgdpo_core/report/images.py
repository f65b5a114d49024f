"""Sections of images: both models side by side, foreign pairs, and ranked pools (arXiv:2405.20216v1, Figure 6)."""

from collections.abc import Sequence
from html import escape

from hgdpo_core.progress import count_of
from hgdpo_core.rendering.grids import PairSample, PoolSample, format_score, rank_pool
from hgdpo_core.rendering.parts import ImageEncoder, image_tag, section
from hgdpo_core.report.data import ForeignPairs

OPEN_PAIRS = 12
"""The page opens with so many; the others unfold."""


def pairs(title: str, intro: str, samples: Sequence[PairSample], encode: ImageEncoder) -> str:
    """One card per prompt: target left, tuned right, scores below, the higher one marked."""
    cards = [f"<li>{_card(pair, encode)}</li>" for pair in samples]
    body = f'<ul class="cards">{"".join(cards[:OPEN_PAIRS])}</ul>'
    if len(cards) > OPEN_PAIRS:
        body += (f"<details><summary>{count_of(len(cards) - OPEN_PAIRS, 'more pair')}</summary>"
                 f'<ul class="cards">{"".join(cards[OPEN_PAIRS:])}</ul></details>')
    return section(title, intro, body) if samples else ""


def first_pair(samples: Sequence[PairSample], encode: ImageEncoder) -> str:
    """The first of a random sample, for the top of the page."""
    return _card(samples[0], encode) if samples else ""


def _card(pair: PairSample, encode: ImageEncoder) -> str:
    sides = (("target", pair.target, pair.target_score, pair.tuned_score),
             ("tuned", pair.tuned, pair.tuned_score, pair.target_score))
    images, kind = "", "pair"
    if pair.concept is not None:
        kind, alt = "pair personal", f"the person of: {pair.prompt}"
        images = f"<figure>{image_tag(pair.concept, alt, encode)}<figcaption>concept</figcaption></figure>"
    for name, image, score, other in sides:
        style, word = (' class="higher"', " <i>higher</i>") if score > other else ("", "")
        images += (f"<figure{style}>{image_tag(image, f'{name} model: {pair.prompt}', encode)}"
                   f"<figcaption>{name} <b>{format_score(score)}</b>{word}</figcaption></figure>")
    return f'<div class="{kind}">{images}</div><p class="prompt">{escape(pair.prompt)}</p>'


def pools(samples: Sequence[PoolSample], encode: ImageEncoder) -> str:
    """All images of a few prompts, best first."""
    blocks = []
    for pool in samples:
        roles = {pool.winner: "winner", pool.loser: "loser"}
        tiles = []
        for rank, i in enumerate(rank_pool(pool), start=1):
            role = roles.get(i, "")
            alt = f"rank {rank} of {len(pool.images)} {role}".strip()
            tiles.append(f'<li class="{role}"><figure>{image_tag(pool.images[i], alt, encode)}<figcaption>'
                         f"{rank}. <b>{format_score(pool.scores[i])}</b> <i>{role}</i></figcaption></figure></li>")
        verdict = " <small>(no pair: not used)</small>" if pool.winner < 0 or pool.loser < 0 else ""
        heading = f'<h3 class="prompt">{escape(pool.prompt)}{verdict}</h3>'
        blocks.append(f'{heading}<ol class="pool">{"".join(tiles)}</ol>')
    intro = "All images of a prompt, best first. Winner and loser, outlined, form a training triplet."
    return section("Ranked pools", intro, "".join(blocks)) if samples else ""


def foreign_pairs(data: ForeignPairs | None, encode: ImageEncoder) -> str:
    """The first few pairs that others labelled, and what became of all."""
    if data is None:
        return ""
    cards = []
    for prompt, winner, loser in data.samples:
        sides = "".join(f"<figure{style}>{image_tag(image, f'{name}: {prompt}', encode)}"
                        f"<figcaption>{name}</figcaption></figure>"
                        for name, image, style in (("winner", winner, ' class="higher"'), ("loser", loser, "")))
        cards.append(f'<li><div class="pair">{sides}</div><p class="prompt">{escape(prompt)}</p></li>')
    dropped = "; ".join(f"{reason}: {count:,}" for reason, count in data.reasons.items())
    intro = (f"The LoRA was trained on pairs that others made and labelled, not on images of its own target: "
             f"{data.source}. {f'Not used: {dropped}.' if dropped else 'All that were read are used.'}")
    return section("Foreign pairs", intro, f'<ul class="cards">{"".join(cards)}</ul>')
