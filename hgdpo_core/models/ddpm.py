"""The DDPM chain as a noise schedule: what Stable Diffusion trains with, and the solver that samples from it."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from hgdpo_core import schedule
from hgdpo_core.losses import statistic_matching_loss
from hgdpo_core.models.sampling import make_ddim, make_scheduler


def draw_timesteps(generators: Sequence[torch.Generator], timesteps: int) -> torch.Tensor:
    """One timestep for each generator, uniform in [0, timesteps); int64 `[B]` on the CPU."""
    return torch.cat([torch.randint(timesteps, (1,), generator=generator) for generator in generators])


class DdpmSchedule:
    """From the config of the scheduler that a target samples with; see `hgdpo_core.schedule` for the arithmetic."""

    def __init__(self, config: Mapping[str, Any]):
        self.config = config

    @cached_property
    def chain(self) -> DDPMScheduler:
        """The full training chain."""
        return schedule.training_scheduler(self.config)

    def require_trainable(self) -> None:
        """ModelError for anything but a DDPM chain of epsilon or v-prediction."""
        schedule.check_prediction(self.chain)

    def draw_timesteps(self, generators: Sequence[torch.Generator]) -> torch.Tensor:
        """Uniform in [0, T); int64 [B] on the CPU."""
        return draw_timesteps(generators, len(self.chain))

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return schedule.add_noise(self.chain, latents, noise, timesteps)

    def prediction_target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return schedule.prediction_target(self.chain, latents, noise, timesteps)

    def statistic_matching(self, policy: torch.Tensor, reference: torch.Tensor,
                           timesteps: torch.Tensor) -> torch.Tensor:
        return statistic_matching_loss(policy, reference, timesteps, self.chain)

    def solver(self) -> DPMSolverMultistepScheduler:
        """DPM-Solver++ (2M) over the same chain."""
        return make_scheduler(self.config)

    def differentiable_solver(self) -> DDIMScheduler:
        return make_ddim(self.config)
