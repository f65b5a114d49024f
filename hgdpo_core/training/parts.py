"""What all objectives share: the order of samples, their noise, precision, and what their loop is told.

Samples are counted over the whole run: the sample at global position k is the same, with the same noise and
timestep, for any number of processes, any split into micro-batches, and after any number of resumes.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import nn

from hgdpo_core.devices import cpu_has_fast_bfloat16, use_cpu
from hgdpo_core.errors import ConfigError
from hgdpo_core.models import Conditioning
from hgdpo_core.models.backbone import Denoiser
from hgdpo_core.progress import Progress, ShouldStop, never_stop, silent

BatchT_co = TypeVar("BatchT_co", covariant=True)
LogRow = dict[str, Any]
OnLog = Callable[[LogRow], None]
Validate = Callable[[int], None]
Precision = Literal["no", "bf16", "fp16"]
Generators = list[torch.Generator]
BatchLoss = Callable[[nn.Module, Any, Generators], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class TrainingResult:
    """What a training did. `log` has a row every `log_every` steps and for the last, resumed parts included."""

    steps: int
    log: list[LogRow]
    resumed_from: int | None
    seconds: float  # of training, over all attempts up to their last checkpoint
    global_batch: int  # samples of one optimizer step, over all processes and micro-batches


@dataclass(frozen=True)
class Hooks:
    """How a training reports, and asks whether to go on; only the main process reports.

    `validate` is called with the number of steps done, 0 and the last included, every `validation_every` steps, and
    after a resume once more for the step where it stands. It must leave weights and the global randomness alone.
    """

    progress: Progress = silent
    should_stop: ShouldStop = never_stop
    on_log: OnLog | None = None
    validate: Validate | None = None


class Follower(Protocol):
    """What follows the weights step by step and is kept in the checkpoints; the first process's counts."""

    def step(self) -> None:
        """Called after each optimizer step."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from an earlier `state_dict`."""
        ...


@dataclass(frozen=True)
class Objective:
    """A training as the loop sees it: what tells one from another.

    `batch_loss(denoiser, batch, generators)` returns float32 `[B]` tensors by log name, among them `loss`,
    whose mean is minimised; its `denoiser` is this one's in training precision, and each sample draws its randomness
    from its own generator alone.
    """

    name: str
    denoiser: Denoiser
    batch_loss: BatchLoss
    weights: Callable[[], Mapping[str, torch.Tensor]]
    load_weights: Callable[[Mapping[str, torch.Tensor]], object]
    what_to_lower: str
    follower: Follower | None = None
    as_kept: Callable[[], AbstractContextManager[object]] = nullcontext
    """Inside, the network has the weights that would be kept if the training ended here."""
    finish: Callable[[], object] = lambda: None
    """Called after the last step: gives the network the weights that are kept."""


class TrainedDenoiser(nn.Module):
    """A denoiser whose predictions are float32. Accelerate wraps this and leaves the caller's as it was."""

    def __init__(self, denoiser: Denoiser):
        super().__init__()
        self.denoiser = denoiser

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        return self.denoiser(noisy, timesteps, conditioning).float()


# -- order and randomness of samples


def draw_noise(generators: Generators, like: torch.Tensor) -> torch.Tensor:
    """Standard normal noise for each sample of `like` `[B,...]`; float32, drawn on the CPU, on its device."""
    noise = [torch.randn(like.shape[1:], generator=generator) for generator in generators]
    return torch.stack(noise).to(like.device)


def draw_flips(generators: Generators) -> torch.Tensor:
    """Whether to mirror each sample, one half of the time; bool `[B]` on the CPU."""
    return torch.cat([torch.rand(1, generator=generator) for generator in generators]) < 0.5


def turn(latents: torch.Tensor, mirrored: torch.Tensor, flips: torch.Tensor) -> torch.Tensor:
    """`latents` `[B,C,h,w]`, where `flips` `[B]` says so those of the mirrored image, which are not their mirror."""
    return torch.where(flips[:, None, None, None].to(latents.device), mirrored.to(latents.device), latents)


# -- precision


def resolve_precision(setting: str) -> Precision:
    """Mixed precision as accelerate names it; "auto" is bf16 where the machine multiplies it in hardware.

    ConfigError for a precision the machine has not.
    """
    cuda = not use_cpu()
    if setting == "auto":
        fast = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else cpu_has_fast_bfloat16()
        return "bf16" if fast else "no"
    if setting == "fp16" and not cuda:
        raise ConfigError("mixed_precision fp16 needs a CUDA GPU, and none is visible: use auto, bf16 or no")
    if setting == "bf16" and cuda and not torch.cuda.is_bf16_supported():
        raise ConfigError("mixed_precision bf16 is not supported by this GPU: use auto, fp16 or no")
    return setting  # pyright: ignore[reportReturnType]


def cast_frozen(module: nn.Module, precision: Precision) -> None:
    """Keep weights that are not trained in the mixed precision, in place: half the memory, no cast per step."""
    if precision != "no":
        dtype = torch.bfloat16 if precision == "bf16" else torch.float16
        for parameter in module.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
