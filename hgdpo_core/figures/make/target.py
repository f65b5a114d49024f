"""The target: a Stable Diffusion 1.5 in miniature, its UNet and text encoder trained together from scratch."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..dataset import render_batch, sample_figures
from ..people import caption
from .loop import Plan, in_batches, open_in_float32, save_tensors, train
from .tokenizer import TARGET_TOKENS, load_tokenizer, text_settings, tokenize
from .vae import LATENT_CHANNELS, encode

PLAN = Plan(steps=3000, batch=32, learning_rate=1e-3, warm_up=200)
IMAGES = 20000

# Without some empty captions the model never learns to generate without one, as classifier-free guidance needs.
EMPTY_CAPTIONS = 0.1


def new_scheduler() -> PNDMScheduler:
    """The scheduler configuration of Stable Diffusion 1.5."""
    scheduler = PNDMScheduler(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012,
                              beta_schedule="scaled_linear", prediction_type="epsilon", skip_prk_steps=True,
                              steps_offset=1, set_alpha_to_one=False)
    # PNDM does not read it, but a DDIM or DDPM scheduler made from this configuration would clip without it.
    scheduler.register_to_config(clip_sample=False)
    return scheduler


def new_unet() -> UNet2DConditionModel:
    """An untrained UNet with 4.3 million parameters, cross attention on both levels, for latents `[B,8,8,8]`."""
    # attention_head_dim is the number of heads: diffusers keeps the misnomer of SD 1.5's configuration.
    return UNet2DConditionModel(
        sample_size=8, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1, cross_attention_dim=128, attention_head_dim=4, norm_num_groups=16)


class TextToNoise(nn.Module):
    """Text encoder and UNet as one trainable module."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet

    def forward(self, noisy: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        """Predicted noise, float32 `[B,8,8,8]`, of noisy scaled latents at integer timesteps `[B]`."""
        states = self.text_encoder(input_ids=ids).last_hidden_state
        return self.unet(noisy, timesteps, states, return_dict=False)[0].float()


def render_latents(vae: AutoencoderKL, count: int, *, seed: int, path: Path) -> tuple[Tensor, list[str]]:
    """Scaled latents `[N,8,8,8]` of correct training images and their captions; cached in `path`."""
    rng = np.random.default_rng([seed, 88])
    figures = sample_figures("train", count, rng)
    seeds = rng.integers(2**32, size=count).tolist()
    if not path.exists():
        parts = in_batches(count, 256, "target: render")
        images = np.concatenate([render_batch(figures[p], seeds[p])[0] for p in parts])
        latents = encode(vae, images, name="target: encode") * float(vae.config["scaling_factor"])
        save_tensors(path, {"latents": latents})
    return load_file(path)["latents"], [caption(figure) for figure in figures]


def train_target(folder: Path, vae: AutoencoderKL, plan: Plan, *, images: int, seed: int, work: Path) -> None:
    """Train UNet and text encoder on cached latents, and complete `folder`, which holds tokenizer and VAE, to a
    StableDiffusionPipeline in fp16."""
    tokenizer = load_tokenizer(folder / "tokenizer")
    latents, captions = render_latents(vae, images, seed=seed, path=work / "target-latents.safetensors")
    torch.manual_seed(seed)
    text_encoder = CLIPTextModel(CLIPTextConfig(**text_settings(tokenizer, TARGET_TOKENS)))
    model = TextToNoise(text_encoder, new_unet())
    average = fit_to_latents(model, tokenizer, latents, captions, plan, name="target", seed=seed,
                             checkpoint=work / "checkpoint.pt")
    save_pipeline(folder, average, vae, folder / "tokenizer")


def fit_to_latents(model: TextToNoise, tokenizer: CLIPTokenizer, latents: Tensor, captions: list[str], plan: Plan, *,
                   name: str, seed: int, checkpoint: Path) -> TextToNoise:
    """Train to predict the noise on scaled latents `[N,8,8,8]` from their captions; returns the moving average."""
    ids, empty = tokenize(tokenizer, captions), tokenize(tokenizer, [""])
    scheduler = new_scheduler()
    # On a CPU the backward pass of torch's fused attention takes longer than all the rest together.
    model.text_encoder.set_attn_implementation("eager")
    model.unet.set_attn_processor(AttnProcessor())

    def loss_of(rng: np.random.Generator, generator: torch.Generator) -> Tensor:
        chosen = torch.from_numpy(rng.integers(len(latents), size=plan.batch))
        dropped = torch.from_numpy(rng.random(plan.batch) < EMPTY_CAPTIONS)[:, None]
        clean = latents[chosen]
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(0, 1000, (plan.batch,), generator=generator)
        noisy = scheduler.add_noise(clean, noise, timesteps)  # type: ignore[arg-type]
        return F.mse_loss(model(noisy, timesteps, torch.where(dropped, empty, ids[chosen])), noise)

    return train(model, loss_of, plan, name=name, seed=seed, checkpoint=checkpoint)


def save_pipeline(folder: Path, model: TextToNoise, vae: AutoencoderKL, tokenizer_folder: Path) -> None:
    """Write a whole StableDiffusionPipeline in fp16, with a VAE and a tokenizer made before."""
    parts: dict[str, Any] = dict(vae=vae, text_encoder=model.text_encoder, unet=model.unet, scheduler=new_scheduler(),
                                 tokenizer=load_tokenizer(tokenizer_folder), safety_checker=None,
                                 feature_extractor=None)
    pipeline = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
        nn.Module.half(part)
    pipeline.vae.register_to_config(_name_or_path=None)  # a path of this machine
    pipeline.save_pretrained(folder)
    open_in_float32(folder / "text_encoder")
