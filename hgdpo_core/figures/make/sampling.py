"""Images by a target, through plain diffusers: what the training and its evaluation need."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline

from .loop import in_batches

BATCH = 32


def load_pipeline(folder: Path, vae: AutoencoderKL | None = None) -> StableDiffusionPipeline:
    """The pipeline in `folder`, with `vae` where the folder holds none."""
    given = {} if vae is None else {"vae": vae}
    pipeline = StableDiffusionPipeline.from_pretrained(folder, **given)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline: Any, texts: list[str], *, steps: int, guidance: float, seeds: list[int]) -> np.ndarray:
    """One image per caption, uint8 `[B,64,64,3]`, each from its own seed."""
    images = []
    for part in in_batches(len(texts), BATCH, "target: generate"):
        generated = pipeline(texts[part], num_inference_steps=steps, guidance_scale=guidance, height=64, width=64,
                             generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]], output_type="np")
        images.append((generated.images * 255).round().astype(np.uint8))
    return np.concatenate(images)
