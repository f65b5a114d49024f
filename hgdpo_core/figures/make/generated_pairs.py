"""Pairs of pictures that a target made, to teach a judge what a target's pictures look like.

Nobody can say what a target really drew, but it can be led: half of the pairs are drawings, one right and one broken,
made noisy and painted over by the target; half are drawn from two captions, of which only one is asked for. Where the
target repairs or fails by itself, the pair is wrong; most are right, and that is what training needs.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionImg2ImgPipeline

from ..dataset import render_batch, sample_figures
from ..people import Figure, caption, change_attributes
from .judge_data import KINDS, UNKNOWN, Pairs, draw_pair
from .loop import in_batches
from .sampling import draw_samples, load_pipeline

PAINTED_OVER = ("missing_limb", "detached_limb", "extra_limb", "no_head", "two_heads")
# How much of the way from noise the target paints: more, and it repairs the defect.
STRENGTHS = (0.25, 0.35, 0.45)
STEPS, GUIDANCE = 10, 1.5
BATCH = 32
BASES = {"train": 2**43, "validation": 2**44, "test": 2**45}


def make_generated_pairs(target: Path, count: int, *, split: str, seed: int) -> Pairs:
    """`count` pairs from captions of a split; attributes, counts and parts are UNKNOWN or empty."""
    rng = np.random.default_rng([seed, 55])
    figures = sample_figures(split, count, rng)
    names = [PAINTED_OVER[i // 2 % len(PAINTED_OVER)] if i % 2 else "wrong_caption" for i in range(count)]
    painted = [i for i in range(count) if i % 2]
    asked = [i for i in range(count) if not i % 2]
    pictures = np.empty((count, 2, 64, 64, 3), dtype=np.uint8)
    pipeline = load_pipeline(target)
    pictures[painted] = paint_over(pipeline, [figures[i] for i in painted], [names[i] for i in painted], rng, split)
    pictures[asked] = draw_two_captions(pipeline, [figures[i] for i in asked], rng)
    tensor = torch.from_numpy(pictures)
    return Pairs(
        captions=[caption(figure) for figure in figures],
        clean=tensor,
        decoded=tensor.clone(),
        kinds=torch.tensor([KINDS.index(name) for name in names]),
        attributes=torch.full((count, 2, 6), UNKNOWN),
        counts=torch.full((count, 2, 5), UNKNOWN),
        parts=torch.zeros((count, 2, 8, 8, 4), dtype=torch.uint8),
    )


def paint_over(
    pipeline: Any, figures: list[Figure], defects: list[str], rng: np.random.Generator, split: str
) -> np.ndarray:
    """uint8 `[N,2,64,64,3]`: right and broken drawings of each figure, made noisy and denoised by the target."""
    painter: Any = StableDiffusionImg2ImgPipeline.from_pipe(pipeline, requires_safety_checker=False)
    painter.set_progress_bar_config(disable=True)
    made = []
    for part in in_batches(len(figures), BATCH // 2, "judge: paint over"):
        shown, kinds = figures[part], defects[part]
        drawn = [draw_pair(figure, kind, rng, BASES[split]) for figure, kind in zip(shown, kinds, strict=True)]
        twice = [figure for figure in shown for _ in (0, 1)]
        seeds, broken = zip(*(picture for pair in drawn for picture in pair), strict=True)
        images = torch.from_numpy(render_batch(twice, seeds, broken)[0]).permute(0, 3, 1, 2).float() / 255
        strength = float(rng.choice(STRENGTHS))
        result = painter(
            [caption(figure) for figure in twice],
            image=images,
            strength=strength,
            num_inference_steps=round(STEPS / strength),
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(int(rng.integers(2**62))),
            output_type="np",
        ).images
        made.append((result * 255).round().astype(np.uint8).reshape(len(shown), 2, 64, 64, 3))
    return np.concatenate(made)


def draw_two_captions(pipeline: Any, figures: list[Figure], rng: np.random.Generator) -> np.ndarray:
    """uint8 `[N,2,64,64,3]`: pictures for each figure's caption, and for one with some attributes changed."""
    others = [change_attributes(figure, rng) for figure in figures]
    seeds = rng.integers(2**62, size=(2, len(figures))).tolist()
    sides = [
        draw_samples(pipeline, [caption(figure) for figure in wanted], steps=STEPS, guidance=GUIDANCE, seeds=own)
        for wanted, own in zip((figures, others), seeds, strict=True)
    ]
    return np.stack(sides, axis=1)
