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
from dataclasses import dataclass, replace
from typing import Any, Self, cast

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch.utils.checkpoint import checkpoint

from hgdpo_core.models.backbone import Conditioning

Hidden = Callable[[Any, torch.Tensor, int | None], torch.Tensor]
"""(encoder, token ids, clip_skip) -> what the network is conditioned on; `hidden_states` is SD 1.5's."""
Denoise = Callable[[torch.Tensor, torch.Tensor, Conditioning], torch.Tensor]
"""A `Denoiser`, or a function like it."""


def make_scheduler(config: Mapping[str, Any]) -> DPMSolverMultistepScheduler:
    """DPM-Solver++ (2M) over the target's own noise schedule.

    Where the target's config asks for the stochastic variant ("DPM++ 2M SDE"), it is the deterministic one all the
    same: noise added in each step would make an image depend on more than its seed.
    """
    scheduler = DPMSolverMultistepScheduler.from_config(dict(config), algorithm_type="dpmsolver++")
    return cast(DPMSolverMultistepScheduler, scheduler)


def make_ddim(config: Mapping[str, Any]) -> DDIMScheduler:
    """DDIM with eta 0 over the target's own noise schedule: a solver without memory, for gradients."""
    # diffusers would clip samples where a config, such as SD 1.5's, does not name it
    return cast(DDIMScheduler, DDIMScheduler.from_config(dict(config), clip_sample=False))


def initial_noise(seeds: Sequence[int], channels: int, height: int, width: int) -> torch.Tensor:
    """float32 [B, C, h, w] on the CPU; row i depends on seeds[i] alone, on every device and in every batch."""
    rows = [torch.randn((channels, height, width), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows)


@torch.no_grad()
def encode_text(encoder: Any, tokenizer: Any, texts: Sequence[str], clip_skip: int | None,
                hidden: "Hidden | None" = None) -> torch.Tensor:
    """Text embeddings [B, L, D] in the text encoder's precision; texts are cut at the encoder's length."""
    return (hidden or hidden_states)(encoder, token_ids(encoder, tokenizer, texts), clip_skip)


def token_ids(encoder: Any, tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    """Token ids [B, L] on the encoder's device."""
    ids = tokenizer(list(texts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
                    return_tensors="pt").input_ids
    return ids.to(encoder.device)


def hidden_states(text_encoder: Any, ids: torch.Tensor, clip_skip: int | None) -> torch.Tensor:
    """What the UNet is conditioned on, [B, L, D], for token ids [B, L]; `clip_skip` counts as diffusers does.

    The pipeline's own encode_prompt cannot skip layers: it looks for the norm where transformers 5 keeps it no more.
    """
    if clip_skip is None:
        return text_encoder(ids).last_hidden_state
    states = text_encoder(ids, output_hidden_states=True).hidden_states
    return getattr(text_encoder, "text_model", text_encoder).final_layer_norm(states[-(clip_skip + 1)])


@dataclass
class Trajectory:
    """B images part of the way: their latents, and a solver of their own, which remembers earlier steps."""

    latents: torch.Tensor
    solver: DPMSolverMultistepScheduler
    done: int = 0
    """Steps taken."""

    @classmethod
    def begin(cls, solver: DPMSolverMultistepScheduler, noise: torch.Tensor, like: torch.Tensor, steps: int) -> Self:
        """From noise [B, C, h, w], float32, on the device and in the precision of `like`; `solver` becomes its own."""
        solver.set_timesteps(steps, device=like.device)
        solver.set_begin_index(0)  # else its first step looks its index up on the device, and everything waits
        return cls(noise.to(device=like.device, dtype=like.dtype) * solver.init_noise_sigma, solver)

    @torch.no_grad()
    def advance(self, denoiser: Denoise, conditioning: Conditioning, guidance_scale: float, until: int) -> None:
        """Take the steps up to `until`; with guidance, `conditioning` holds the negative prompts before the prompts."""
        for timestep in self.solver.timesteps[self.done:until]:
            self.latents = _step(denoiser, self.solver, self.latents, timestep, conditioning, guidance_scale)
            self.done += 1

    @property
    def predicted(self) -> torch.Tensor:
        """The clean latents [B, C, h, w] that the last step predicted, which is what DPM-Solver++ remembers."""
        return cast(torch.Tensor, self.solver.model_outputs[-1])

    def rows(self, rows: Sequence[int]) -> Self:
        """Some of the images, in that order, repeated where a row is."""
        return self._with(self.latents[rows], [None if old is None else old[rows] for old in self._remembered])

    @classmethod
    def join(cls, parts: "Sequence[Self]") -> Self:
        """Images that are equally far, one after the other."""
        remembered = [None if old[0] is None else torch.cat(cast("list[torch.Tensor]", old))
                      for old in zip(*(part._remembered for part in parts), strict=True)]
        return parts[0]._with(torch.cat([part.latents for part in parts]), remembered)

    @property
    def _remembered(self) -> list[torch.Tensor | None]:
        return cast("list[torch.Tensor | None]", self.solver.model_outputs)

    def _with(self, latents: torch.Tensor, remembered: Sequence[torch.Tensor | None]) -> Self:
        solver = copy.copy(self.solver)
        solver.model_outputs = list(remembered)  # pyright: ignore[reportAttributeAccessIssue]
        return replace(self, latents=latents, solver=solver)


def guide(prompts: Conditioning, negative: Conditioning, guidance_scale: float) -> Conditioning:
    """What the denoiser is given for B prompts; a guidance scale of 1 runs the conditional branch alone."""
    return Conditioning.join([negative.expand(len(prompts)), prompts]) if guidance_scale > 1 else prompts


def sample_latents(denoiser: Denoise, scheduler: DPMSolverMultistepScheduler, prompts: Conditioning,
                   negative: Conditioning, noise: torch.Tensor, *, steps: int, guidance_scale: float,
                   reference: Denoise | None = None) -> torch.Tensor:
    """Latents [B, C, h, w] at t=0, scaled as the codec's latents are.

    `prompts` of B texts; `negative` of one, as long; noise [B, C, h, w] float32. A guidance scale of 1 runs the
    conditional branch alone. Each row depends on its own inputs only, up to the arithmetic of the batch size.

    With a `reference`, latent adaptive normalisation (paper Eq. 7): both sample from the same noise, and after every
    step the latents of `denoiser` take the channel statistics of the reference's.
    """
    both = guide(prompts, negative, guidance_scale)
    own = Trajectory.begin(scheduler, noise, prompts.embeds, steps)
    if reference is None:
        own.advance(denoiser, both, guidance_scale, steps)
        return own.latents
    other = copy.deepcopy(own)  # the solver remembers earlier steps: each trajectory its own
    for step in range(1, steps + 1):
        own.advance(denoiser, both, guidance_scale, step)
        other.advance(reference, both, guidance_scale, step)
        own.latents = match_statistics(own.latents, other.latents)
    return own.latents


def sample_with_gradient(denoiser: Denoise, solver: DDIMScheduler, prompts: Conditioning, negative: Conditioning,
                         noise: torch.Tensor, *, steps: int, guidance_scale: float, live_steps: int) -> torch.Tensor:
    """As `sample_latents`, with a gradient through the last `live_steps` steps, both branches of guidance included.

    Each live step is computed again in the backward pass, so memory holds one step's activations (AlignProp,
    arXiv:2310.03739; a fixed number of live steps is DRaFT-K, arXiv:2309.17400).
    """
    both = guide(prompts, negative, guidance_scale)
    solver.set_timesteps(steps)
    latents = noise * solver.init_noise_sigma
    for number, timestep in enumerate(solver.timesteps):
        if number < steps - live_steps:
            with torch.no_grad():
                latents = _step(denoiser, solver, latents, timestep, both, guidance_scale)
        else:  # all that changes from step to step is an argument: what a closure reads is the last step's by then
            latents = checkpoint(_step, denoiser, solver, latents, timestep, both, guidance_scale,
                                 use_reentrant=False, preserve_rng_state=False)
    return latents


def _step(denoiser: Denoise, scheduler: Any, latents: torch.Tensor, timestep: torch.Tensor,
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
