"""Sampling with per-image seeds and classifier-free guidance: tensors in, tensors out.

| paper D.4                    | here                                   |
|------------------------------|----------------------------------------|
| DPMSolverMultistepScheduler  | `make_scheduler(target's own config)`  |
| r_ij, the seed of a candidate| `initial_noise([seed, ...])`           |
| Eq. 7, LAN                   | `match_statistics`, with a `reference` |

The loop does what diffusers' StableDiffusionPipeline does, so that plain diffusers reproduces an image from its seed.
It is written out because latent adaptive normalisation and speed work act between two steps.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

from hgdpo_core.models.backbone import Conditioning

Denoise = Callable[[torch.Tensor, torch.Tensor, Conditioning], torch.Tensor]
"""A `Denoiser`, or a function like it."""


def make_scheduler(config: Mapping[str, Any]) -> DPMSolverMultistepScheduler:
    """DPM-Solver++ (2M) over the target's own noise schedule."""
    return cast(DPMSolverMultistepScheduler, DPMSolverMultistepScheduler.from_config(dict(config)))


def initial_noise(seeds: Sequence[int], channels: int, height: int, width: int) -> torch.Tensor:
    """float32 [B, C, h, w] on the CPU; row i depends on seeds[i] alone, on every device and in every batch."""
    rows = [torch.randn((channels, height, width), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows)


@torch.no_grad()
def encode_text(pipeline: StableDiffusionPipeline, texts: Sequence[str], clip_skip: int | None) -> torch.Tensor:
    """Text embeddings [B, L, D] in the text encoder's precision; texts are cut at the encoder's length."""
    tokenizer = pipeline.tokenizer
    ids = tokenizer(list(texts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
                    return_tensors="pt").input_ids
    return hidden_states(pipeline.text_encoder, ids.to(pipeline.device), clip_skip)


def hidden_states(text_encoder: Any, ids: torch.Tensor, clip_skip: int | None) -> torch.Tensor:
    """What the UNet is conditioned on, [B, L, D], for token ids [B, L]; `clip_skip` counts as diffusers does.

    The pipeline's own encode_prompt cannot skip layers: it looks for the norm where transformers 5 keeps it no more.
    """
    if clip_skip is None:
        return text_encoder(ids).last_hidden_state
    states = text_encoder(ids, output_hidden_states=True).hidden_states
    return getattr(text_encoder, "text_model", text_encoder).final_layer_norm(states[-(clip_skip + 1)])


@torch.no_grad()
def sample_latents(denoiser: Denoise, scheduler: DPMSolverMultistepScheduler, prompts: Conditioning,
                   negative: Conditioning, noise: torch.Tensor, *, steps: int, guidance_scale: float,
                   reference: Denoise | None = None) -> torch.Tensor:
    """Latents [B, C, h, w] at t=0, scaled as the codec's latents are.

    `prompts` of B texts; `negative` of one, as long; noise [B, C, h, w] float32. A guidance scale of 1 runs the
    conditional branch alone. Each row depends on its own inputs only, up to the arithmetic of the batch size.

    With a `reference`, latent adaptive normalisation (paper Eq. 7): both sample from the same noise, and after every
    step the latents of `denoiser` take the channel statistics of the reference's.
    """
    guided = guidance_scale > 1
    device, dtype = prompts.embeds.device, prompts.embeds.dtype
    both = Conditioning.join([negative.expand(len(prompts)), prompts]) if guided else prompts
    scheduler.set_timesteps(steps, device=device)
    scheduler.set_begin_index(0)  # else its first step looks its index up on the device, and everything waits
    reference_scheduler = copy.deepcopy(scheduler)  # the solver remembers earlier steps: each trajectory its own
    latents = noise.to(device=device, dtype=dtype) * scheduler.init_noise_sigma
    reference_latents = latents
    for timestep in scheduler.timesteps:
        latents = _step(denoiser, scheduler, latents, timestep, both, guidance_scale)
        if reference is not None:
            reference_latents = _step(reference, reference_scheduler, reference_latents, timestep, both,
                                      guidance_scale)
            latents = match_statistics(latents, reference_latents)
    return latents


def _step(denoiser: Denoise, scheduler: DPMSolverMultistepScheduler, latents: torch.Tensor, timestep: torch.Tensor,
          conditioning: Conditioning, guidance_scale: float) -> torch.Tensor:
    """The latents one step on; with guidance, `conditioning` holds the negative prompts before the prompts."""
    guided = guidance_scale > 1
    inputs = torch.cat([latents, latents]) if guided else latents
    prediction = denoiser(scheduler.scale_model_input(inputs, timestep), timestep, conditioning)
    if guided:
        unconditional, conditional = prediction.chunk(2)
        prediction = unconditional + guidance_scale * (conditional - unconditional)
    return scheduler.step(prediction, timestep, latents, return_dict=False)[0]


def match_statistics(latents: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """`latents` [B, C, h, w] with every channel's mean and standard deviation those of `reference` (paper Eq. 7).

    Written as a scale and an offset, so that equal statistics change no bit. A channel that is constant cannot be
    scaled: it takes the mean alone.
    """
    own, other = latents.float(), reference.float()
    deviation = own.std(dim=(2, 3), keepdim=True)
    scale = torch.where(deviation > 0, other.std(dim=(2, 3), keepdim=True) / deviation, 1.0)
    offset = other.mean(dim=(2, 3), keepdim=True) - own.mean(dim=(2, 3), keepdim=True) * scale
    return (own * scale + offset).to(latents.dtype)
