"""The noise schedule training uses: the target's full chain as a DDPM scheduler that never clips.

alpha_bar_t = scheduler.alphas_cumprod[t]; timesteps are integers in [0, T), T = 1000 for the SD 1.5 family.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDPMScheduler

from hgdpo_core.errors import ModelError


def training_scheduler(scheduler_config: Mapping[str, Any]) -> DDPMScheduler:
    """The full training chain of a target, from the config of whichever scheduler the target samples with.

    Clipping and thresholding are off: a DDPM scheduler made from a PNDM config, which has no such key, would
    clip latents to [-1, 1]. ModelError for anything that is not a DDPM chain of epsilon or v-prediction.
    """
    if "beta_schedule" not in scheduler_config:
        name = scheduler_config.get("_class_name", "no _class_name")
        raise ModelError(f"the scheduler config ({name}) has no beta_schedule: expected one of the DDPM "
                         "family, as SD 1.5 has; flow matching is not supported")
    try:
        scheduler = DDPMScheduler.from_config(dict(scheduler_config), clip_sample=False, thresholding=False)
    except NotImplementedError:
        raise ModelError(f"beta_schedule {scheduler_config['beta_schedule']!r} is unknown to DDPMScheduler: "
                         "expected linear, scaled_linear, squaredcos_cap_v2 or sigmoid") from None
    assert isinstance(scheduler, DDPMScheduler)  # from_config may return a pair, but not as called here
    check_prediction(scheduler)
    return scheduler


def check_prediction(scheduler: DDPMScheduler) -> str:
    """The prediction type, "epsilon" or "v_prediction".

    ModelError for others, and for epsilon with zero terminal SNR.
    """
    kind = scheduler.config["prediction_type"]
    if kind not in ("epsilon", "v_prediction"):
        raise ModelError(f"the model predicts {kind!r}: expected epsilon or v_prediction")
    if kind == "epsilon" and (scheduler.config["rescale_betas_zero_snr"] or scheduler.alphas.min() <= 0):
        raise ModelError("epsilon prediction with zero terminal SNR (rescale_betas_zero_snr): the last "
                         "timestep is pure noise, which says nothing about the image; use v_prediction "
                         "or a plain schedule")
    return kind


def add_noise(scheduler: DDPMScheduler, latents: torch.Tensor, noise: torch.Tensor,
              timesteps: torch.Tensor) -> torch.Tensor:
    """x_t = sqrt(alpha_bar_t) * latents + sqrt(1 - alpha_bar_t) * noise; `[B,C,H,W]`, `timesteps` integers `[B]`."""
    return scheduler.add_noise(latents, noise, timesteps)  # pyright: ignore[reportArgumentType]


def prediction_target(scheduler: DDPMScheduler, latents: torch.Tensor, noise: torch.Tensor,
                      timesteps: torch.Tensor) -> torch.Tensor:
    """What the network should predict, `[B,C,H,W]`: the noise (epsilon), or the velocity (v-prediction).

    velocity = sqrt(alpha_bar_t) * noise - sqrt(1 - alpha_bar_t) * latents (arXiv:2202.00512). `latents` and
    `noise` are `[B,C,H,W]` of one dtype, `timesteps` integers `[B]`.
    """
    if check_prediction(scheduler) == "epsilon":
        return noise
    return scheduler.get_velocity(latents, noise, timesteps)  # pyright: ignore[reportArgumentType]
