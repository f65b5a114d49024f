"""The foreign generator: a smaller Stable Diffusion 1.5 in miniature that draws foreign scenes with the target's VAE.

Its text encoder and UNet are its own, trained with a seed of their own. Its folder holds no weights of a VAE: who loads
it gives the target's, as `hgdpo_core/built_in.py` says.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from ..foreign.prompts import sample_scenes, scene_caption
from ..foreign.renderer import render_scenes
from .loop import Plan, in_batches, save_tensors
from .target import TextToNoise, fit_to_latents, save_pipeline
from .tokenizer import TARGET_TOKENS, load_tokenizer, text_settings
from .vae import LATENT_CHANNELS, encode

PLAN = Plan(steps=1400, batch=32, learning_rate=1.5e-3, warm_up=100)
IMAGES = 10000
SEED = 2000  # apart from those of all other networks
VAE_WEIGHTS = "vae/diffusion_pytorch_model.safetensors"


def new_unet() -> UNet2DConditionModel:
    """An untrained UNet with 2.4 million parameters, three quarters as wide as the target's."""
    return UNet2DConditionModel(
        sample_size=8, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, block_out_channels=(48, 96),
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1, cross_attention_dim=128, attention_head_dim=4, norm_num_groups=16)


def render_latents(vae: AutoencoderKL, count: int, *, seed: int, path: Path) -> tuple[Tensor, list[str]]:
    """Scaled latents `[N,8,8,8]` of correct foreign training images and their captions; cached in `path`."""
    rng = np.random.default_rng([seed, 88])
    scenes = sample_scenes("train", count, rng)
    seeds = rng.integers(2**32, size=count).tolist()
    if not path.exists():
        parts = in_batches(count, 256, "foreign: render")
        images = np.concatenate([render_scenes(scenes[p], seeds[p]) for p in parts])
        latents = encode(vae, images, name="foreign: encode") * float(vae.config["scaling_factor"])
        save_tensors(path, {"latents": latents})
    return load_file(path)["latents"], [scene_caption(scene) for scene in scenes]


def train_foreign(folder: Path, tokenizer_folder: Path, vae: AutoencoderKL, plan: Plan, *, images: int, seed: int,
                  work: Path) -> None:
    """Train UNet and text encoder on cached latents, and write all of a StableDiffusionPipeline but its VAE's weights,
    in fp16."""
    seed += SEED
    tokenizer = load_tokenizer(tokenizer_folder)
    latents, captions = render_latents(vae, images, seed=seed, path=work / "foreign-latents.safetensors")
    torch.manual_seed(seed)
    text_encoder = CLIPTextModel(CLIPTextConfig(**text_settings(tokenizer, TARGET_TOKENS)))
    model = TextToNoise(text_encoder, new_unet())
    average = fit_to_latents(model, tokenizer, latents, captions, plan, name="foreign", seed=seed,
                             checkpoint=work / "checkpoint.pt")
    save_pipeline(folder, average, vae, tokenizer_folder)
    (folder / VAE_WEIGHTS).unlink()
