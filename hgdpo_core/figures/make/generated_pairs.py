"""Pairs of images that a target generated, to teach a judge what a target's images look like.

What a target really generated is unknown, but it can be steered: half of the pairs are rendered, one correct and one
broken, and passed through the target's image-to-image pipeline; the other half are generated from two captions, of
which only one is asked for. Where the target repairs a defect or makes one of its own, the pair is wrong; most are
right, and that is what training needs.
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
from .sampling import generate, load_pipeline

REFINED = ("missing_limb", "detached_limb", "extra_limb", "no_head", "two_heads")
# Strengths of image-to-image: with more, the target repairs the defect.
STRENGTHS = (0.25, 0.35, 0.45)
STEPS, GUIDANCE = 10, 1.5
BATCH = 32
BASES = {"train": 2**43, "validation": 2**44, "test": 2**45}


def make_generated_pairs(target: Path, count: int, *, split: str, seed: int) -> Pairs:
    """`count` pairs from captions of a split; attributes, counts and parts are UNKNOWN or empty."""
    rng = np.random.default_rng([seed, 55])
    figures = sample_figures(split, count, rng)
    names = [REFINED[i // 2 % len(REFINED)] if i % 2 else "wrong_caption" for i in range(count)]
    images = np.empty((count, 2, 64, 64, 3), dtype=np.uint8)
    pipeline = load_pipeline(target)
    images[1::2] = refine_pairs(pipeline, figures[1::2], names[1::2], rng, split)
    images[::2] = generate_two_captions(pipeline, figures[::2], rng)
    tensor = torch.from_numpy(images)
    return Pairs(captions=[caption(figure) for figure in figures], clean=tensor, decoded=tensor.clone(),
                 kinds=torch.tensor([KINDS.index(name) for name in names]),
                 attributes=torch.full((count, 2, 6), UNKNOWN), counts=torch.full((count, 2, 5), UNKNOWN),
                 parts=torch.zeros((count, 2, 8, 8, 4), dtype=torch.uint8))


def refine_pairs(pipeline: Any, figures: list[Figure], defects: list[str], rng: np.random.Generator,
                 split: str) -> np.ndarray:
    """uint8 `[N,2,64,64,3]`: correct and broken renderings of each figure, noised and denoised by the target."""
    image_to_image: Any = StableDiffusionImg2ImgPipeline.from_pipe(pipeline, requires_safety_checker=False)
    image_to_image.set_progress_bar_config(disable=True)
    refined = []
    for part in in_batches(len(figures), BATCH // 2, "judge: refine"):
        shown = figures[part]
        pairs = [draw_pair(figure, kind, rng, BASES[split]) for figure, kind in zip(shown, defects[part], strict=True)]
        twice = [figure for figure in shown for _ in (0, 1)]
        seeds, broken = zip(*(image for pair in pairs for image in pair), strict=True)
        images = torch.from_numpy(render_batch(twice, seeds, broken)[0]).permute(0, 3, 1, 2).float() / 255
        strength = float(rng.choice(STRENGTHS))
        result = image_to_image([caption(figure) for figure in twice], image=images, strength=strength,
                                num_inference_steps=round(STEPS / strength), guidance_scale=GUIDANCE,
                                generator=torch.Generator().manual_seed(int(rng.integers(2**62))), output_type="np")
        refined.append((result.images * 255).round().astype(np.uint8).reshape(len(shown), 2, 64, 64, 3))
    return np.concatenate(refined)


def generate_two_captions(pipeline: Any, figures: list[Figure], rng: np.random.Generator) -> np.ndarray:
    """uint8 `[N,2,64,64,3]`: images for each figure's caption, and for one with some attributes changed."""
    others = [change_attributes(figure, rng) for figure in figures]
    seeds = rng.integers(2**62, size=(2, len(figures))).tolist()
    sides = [generate(pipeline, [caption(figure) for figure in shown], steps=STEPS, guidance=GUIDANCE, seeds=own)
             for shown, own in zip((figures, others), seeds, strict=True)]
    return np.stack(sides, axis=1)
