"""How good the foreign generator and the labeller are, on captions and seeds that no training image had."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from ..dataset import HELD_OUT_SEED, to_model_range, to_pixels
from ..foreign.prompts import foreign_prompts, parse_scene, sample_scenes
from ..foreign.renderer import render_scenes
from ..labeller import TIE_BAND, load_labeller, prefer_first
from ..people import Figure
from .evaluation import GUIDANCE, STEPS
from .labeller_data import KINDS, VIEWS, held_out_pairs
from .loop import in_batches
from .sampling import generate, load_pipeline
from .vae import decode, encode, psnr


def evaluate_labeller(folder: Path, vae: AutoencoderKL, count: int) -> dict:
    """The rate of errors over `count` pairs of the test split, by what they show and by defect, as rendered and through
    the VAE; and how often it is sure and wrong."""
    labeller, pairs = load_labeller(folder), held_out_pairs(vae, count)
    errors, by_kind = {}, {}
    for view in ("clean", "decoded"):
        images = getattr(pairs, view).numpy()
        probability = prefer_first(labeller, pairs.captions, images[:, 0], images[:, 1])
        wrong = (probability < 0.5).float()
        errors[view] = rates(wrong, pairs.views, VIEWS)
        by_kind[view] = rates(wrong, pairs.kinds, KINDS)
        near = (probability - 0.5).abs() < TIE_BAND
        errors[view]["near_half"] = round(float(near.float().mean()), 3)
        errors[view]["wrong_elsewhere"] = round(float(wrong[~near].mean()), 3)
    return {"pairs": count, "tie_band": TIE_BAND, "errors": errors, "errors_by_kind": by_kind}


def rates(wrong: Tensor, groups: Tensor, names: tuple[str, ...]) -> dict[str, float]:
    """The mean of `wrong` over each group that occurs, and over all."""
    found = {name: round(float(wrong[groups == i].mean()), 3) for i, name in enumerate(names)
             if bool((groups == i).any())}
    return {**found, "all": round(float(wrong.mean()), 3)}


def evaluate_foreign(folder: Path, vae: AutoencoderKL, labeller_folder: Path, count: int) -> dict:
    """How the target's VAE draws the foreign style, and how the labeller sees generated images beside correct drawings
    of the same captions, for the people and the still lives of validation prompts."""
    scenes = sample_scenes("test", count, np.random.default_rng(HELD_OUT_SEED))
    rendered = render_scenes(scenes, range(HELD_OUT_SEED, HELD_OUT_SEED + count))
    images, decoded = to_model_range(rendered), to_model_range(draw_again(vae, rendered))
    texts = foreign_prompts("validation", count, seed=0)
    generated = generate(load_pipeline(folder, vae), texts, steps=STEPS, guidance=GUIDANCE, seeds=list(range(count)))
    right = draw_again(vae, render_scenes([parse_scene(text) for text in texts], range(count)))
    labeller = load_labeller(labeller_folder)
    people = torch.tensor([isinstance(parse_scene(text), Figure) for text in texts])
    won = (prefer_first(labeller, texts, generated, right) > 0.5).float()
    groups, names = (~people).long(), ("people", "still lives")
    return {"images": count, "psnr_db": round(psnr(images, decoded, torch.ones(count, 1, 64, 64)), 2),
            "prompts": count, "without_people": round(float((~people).float().mean()), 3), "steps": STEPS,
            "guidance": GUIDANCE, "preferred_to_right_picture": rates(won, groups, names)}


def draw_again(vae: AutoencoderKL, images: np.ndarray) -> np.ndarray:
    """uint8 `[B,64,64,3]` through the VAE and back."""
    latents = encode(vae, images, name="foreign: encode")
    parts = in_batches(len(images), 64, "foreign: decode")
    return np.concatenate([to_pixels(decode(vae, latents[part])) for part in parts])
