"""What both trainers share: the order of samples, their noise, precision, the loop, resuming and stopping.

Samples are counted over the whole run: the sample at global position k is the same, with the same noise and
timestep, for any number of processes, any split into micro-batches, and after any number of resumes.
"""

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import parse_flag_from_env
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from hgdpo_core.checkpoints import Checkpoint, Checkpoints, load_latest, save_checkpoint
from hgdpo_core.config import TrainingConfig, content_hash
from hgdpo_core.errors import ConfigError, InputError, StoppedError
from hgdpo_core.models import cpu_has_fast_bfloat16, default_device
from hgdpo_core.optimization import make_optimizer, warm_up_schedule
from hgdpo_core.progress import Progress, ShouldStop, never_stop, silent

logger = logging.getLogger(__name__)

BatchT_co = TypeVar("BatchT_co", covariant=True)
LogRow = dict[str, Any]
OnLog = Callable[[LogRow], None]
Precision = Literal["no", "bf16", "fp16"]
Generators = list[torch.Generator]
BatchLoss = Callable[[nn.Module, Any, Generators], dict[str, torch.Tensor]]


class SampleSource(Protocol[BatchT_co]):
    """Random access to the samples of a training."""

    def __len__(self) -> int:
        """Samples in one epoch, at least 1."""
        ...

    def order(self, seed: int, epoch: int) -> Sequence[int]:
        """The `len(self)` indices of an epoch in training order; the same for the same arguments.

        `epoch_order` is the plain one; a streaming source shuffles its shards, and inside them.
        """
        ...

    def batch(self, indices: Sequence[int]) -> BatchT_co:
        """The samples of these indices, in this order."""
        ...


@dataclass(frozen=True)
class TrainingResult:
    """What a training did. `log` has a row every `log_every` steps and for the last, resumed parts included."""

    steps: int
    log: list[LogRow]
    resumed_from: int | None
    seconds: float  # of training, over all attempts up to their last checkpoint


@dataclass(frozen=True)
class Hooks:
    """How a training reports, and asks whether to go on; only the main process reports."""

    progress: Progress = silent
    should_stop: ShouldStop = never_stop
    on_log: OnLog | None = None


@dataclass(frozen=True)
class Objective:
    """What tells one trainer from the other.

    `batch_loss(denoiser, batch, generators)` returns float32 `[B]` tensors by log name, among them `loss`,
    whose mean is minimised; `denoiser(noisy, timesteps, prompt_embeds, prompt_mask=None)` is the UNet in training
    precision, and each sample draws its randomness from its own generator alone.
    """

    name: str
    unet: UNet2DConditionModel
    batch_loss: BatchLoss
    weights: Callable[[], Mapping[str, torch.Tensor]]
    load_weights: Callable[[Mapping[str, torch.Tensor]], object]
    what_to_lower: str


class Denoiser(nn.Module):
    """The UNet as a function of tensors. Accelerate wraps this and leaves the caller's UNet as it was."""

    def __init__(self, unet: UNet2DConditionModel):
        super().__init__()
        self.unet = unet

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, prompt_embeds: torch.Tensor,
                prompt_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.unet(noisy, timesteps, encoder_hidden_states=prompt_embeds, encoder_attention_mask=prompt_mask,
                         return_dict=False)[0].float()


# -- order and randomness of samples


def _hashed_seed(*parts: int | str) -> int:
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def epoch_order(samples: int, seed: int, epoch: int) -> list[int]:
    """A permutation of range(samples), decided by the arguments alone."""
    generator = torch.Generator().manual_seed(_hashed_seed("order", seed, epoch))
    return torch.randperm(samples, generator=generator).tolist()


def sample_generator(seed: int, position: int) -> torch.Generator:
    """The randomness of the sample at global position `position`: a CPU generator seeded by sha256 of both."""
    return torch.Generator().manual_seed(_hashed_seed(seed, position))


def draw_timesteps(generators: Generators, timesteps: int) -> torch.Tensor:
    """One timestep per sample, uniform in [0, timesteps); int64 `[B]` on the CPU."""
    return torch.cat([torch.randint(timesteps, (1,), generator=generator) for generator in generators])


def draw_noise(generators: Generators, like: torch.Tensor) -> torch.Tensor:
    """Standard normal noise for each sample of `like` `[B,...]`; float32, drawn on the CPU, on its device."""
    noise = [torch.randn(like.shape[1:], generator=generator) for generator in generators]
    return torch.stack(noise).to(like.device)


class _DataOrder:
    """Sample indices by global position; epochs follow each other without a gap or a short batch."""

    def __init__(self, source: SampleSource[Any], seed: int):
        self._source, self._seed = source, seed
        self._epoch, self._order = -1, []

    def indices(self, positions: Sequence[int]) -> list[int]:
        return [self._index(*divmod(position, len(self._source))) for position in positions]

    def _index(self, epoch: int, place: int) -> int:
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(self._source.order(self._seed, epoch))
            if len(self._order) != len(self._source):
                raise InputError(f"the order of epoch {epoch} names {len(self._order)} samples: expected each "
                                 f"of the {len(self._source)} once")
        return self._order[place]


# -- precision


def resolve_precision(setting: str) -> Precision:
    """Mixed precision as accelerate names it; "auto" is bf16 where the machine multiplies it in hardware.

    ConfigError for a precision the machine has not.
    """
    cuda = not _use_cpu()
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


def _use_cpu() -> bool:
    return default_device() == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU")


# -- the loop


@dataclass
class _Run:
    """One training under way."""

    objective: Objective
    source: SampleSource[Any]
    config: TrainingConfig
    accelerator: Accelerator
    denoiser: nn.Module
    optimizer: Any  # accelerate's wrapper
    lr_schedule: torch.optim.lr_scheduler.LambdaLR
    order: _DataOrder
    step: int = 0
    log: list[LogRow] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def global_batch(self) -> int:
        config = self.config
        return config.batch_size * self.accelerator.num_processes * config.gradient_accumulation_steps

    @property
    def total_steps(self) -> int:
        epochs = math.ceil(self.config.epochs * len(self.source) / self.global_batch)
        return self.config.max_steps or epochs

    @property
    def config_hash(self) -> str:
        return content_hash({"trainer": self.objective.name, "config": self.config.model_dump(mode="json"),
                             "samples": len(self.source), "processes": self.accelerator.num_processes})

    def positions(self, micro: int) -> range:
        """Global positions of this process's next micro-batch; processes share each micro-step side by side."""
        size, processes = self.config.batch_size, self.accelerator.num_processes
        first = self.step * self.global_batch + (micro * processes + self.accelerator.process_index) * size
        return range(first, first + size)


def run_training(objective: Objective, source: SampleSource[Any], config: TrainingConfig,
                 precision: Precision, checkpoints: Checkpoints | None, hooks: Hooks) -> TrainingResult:
    """Train what requires gradients in `objective.unet`, from this config's latest checkpoint if there is one.

    StoppedError after `should_stop`, with a checkpoint; ConfigError when the numbers stop being finite.
    """
    if len(source) == 0:
        raise InputError("there is nothing to train on: expected at least one sample")
    with _fast_attention(objective.unet):
        return _train(_open(objective, source, config, precision), checkpoints, hooks)


@contextmanager
def _fast_attention(unet: UNet2DConditionModel) -> Iterator[None]:
    """On a CPU, plain attention: the fused one's backward takes over half of a small UNet's step there."""
    before = dict(unet.attn_processors)
    if _use_cpu():
        unet.set_attn_processor(AttnProcessor())
    try:
        yield
    finally:
        unet.set_attn_processor(before)


def _train(run: _Run, checkpoints: Checkpoints | None, hooks: Hooks) -> TrainingResult:
    config = run.config
    resumed_from = _resume(run, checkpoints)
    saved_step, before, started = run.step, run.seconds, time.monotonic()
    if not run.accelerator.is_main_process:
        hooks = Hooks(should_stop=hooks.should_stop)
    hooks.progress(run.step, run.total_steps, "steps")
    while True:
        run.seconds = before + time.monotonic() - started
        finished = run.step == run.total_steps
        stopping = not finished and _agree(run.accelerator, hooks.should_stop())
        if run.step != saved_step and (finished or stopping or run.step % config.checkpoint_every == 0):
            _save(run, checkpoints)
            saved_step = run.step
        if finished:
            return TrainingResult(run.step, run.log, resumed_from, run.seconds)
        if stopping:
            kept = f"step {saved_step} is kept" if checkpoints and saved_step else "nothing is kept"
            raise StoppedError(f"training was asked to stop after step {run.step} of {run.total_steps}: {kept}")
        _report(run, _optimizer_step(run), hooks)


def _open(objective: Objective, source: SampleSource[Any], config: TrainingConfig, precision: Precision) -> _Run:
    # Accelerate keeps the precision of the process's first training and refuses another one.
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=precision, cpu=_use_cpu(),
                              gradient_accumulation_steps=config.gradient_accumulation_steps)
    unet = objective.unet.to(accelerator.device)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    optimizer = make_optimizer((p for p in unet.parameters() if p.requires_grad), config)
    # The schedule is not prepared: accelerate would advance it once for every process.
    lr_schedule = warm_up_schedule(optimizer, config.warmup_steps)
    denoiser, optimizer = accelerator.prepare(Denoiser(unet), optimizer)
    return _Run(objective, source, config, accelerator, denoiser, optimizer, lr_schedule,
                _DataOrder(source, config.seed))


def _optimizer_step(run: _Run) -> LogRow:
    """One step on one global batch; its log row, averaged over that batch."""
    parts: list[dict[str, torch.Tensor]] = []
    for micro in range(run.config.gradient_accumulation_steps):
        positions = run.positions(micro)
        batch = run.source.batch(run.order.indices(positions))
        generators = [sample_generator(run.config.seed, position) for position in positions]
        with run.accelerator.accumulate(run.denoiser):
            values = run.objective.batch_loss(run.denoiser, batch, generators)
            run.accelerator.backward(values["loss"].mean())
        parts.append({name: value.detach().mean() for name, value in values.items()})
    trained = [p for p in run.denoiser.parameters() if p.requires_grad]
    grad_norm = run.accelerator.clip_grad_norm_(trained, run.config.max_grad_norm)
    means = {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
    means["grad_norm"] = torch.as_tensor(grad_norm, device=run.accelerator.device).float()
    row = _row(run, means)
    run.optimizer.step()
    run.lr_schedule.step()
    run.optimizer.zero_grad()
    run.step += 1
    return row


def _row(run: _Run, means: dict[str, torch.Tensor]) -> LogRow:
    reduced: Any = run.accelerator.reduce(torch.stack(list(means.values())), reduction="mean")
    row = {"step": run.step + 1, **dict(zip(means, reduced.tolist(), strict=True)),
           "learning_rate": run.lr_schedule.get_last_lr()[0]}
    # An fp16 scaler meets infinite gradients on its way and skips those steps; an infinite loss is never right.
    must_be_finite = ["loss"] if run.accelerator.scaler is not None else ["loss", "grad_norm"]
    for name in must_be_finite:
        if not math.isfinite(row[name]):
            raise ConfigError(f"training stopped at step {row['step']}, before the weights changed: {name} is "
                              f"{row[name]}, expected a finite number. Lower {run.objective.what_to_lower}, "
                              "use mixed_precision no, or look for latents that are not finite; the last "
                              "checkpoint is intact")
    return row


def _report(run: _Run, row: LogRow, hooks: Hooks) -> None:
    if run.step % run.config.log_every == 0 or run.step == run.total_steps:
        run.log.append(row)
        if hooks.on_log is not None:
            hooks.on_log(row)
    hooks.progress(run.step, run.total_steps, "steps")


def _agree(accelerator: Accelerator, flag: bool) -> bool:
    """Whether any process says so: they stop together, or the others would wait for ever."""
    if accelerator.num_processes == 1:
        return flag
    votes: Any = accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), reduction="sum")
    return votes.item() > 0


# -- resuming


def _save(run: _Run, checkpoints: Checkpoints | None) -> None:
    if checkpoints is None:
        return
    if run.accelerator.is_main_process:
        scaler = run.accelerator.scaler
        state = {"optimizer": run.optimizer.state_dict(), "lr_schedule": run.lr_schedule.state_dict(),
                 "scaler": scaler.state_dict() if scaler is not None else None,
                 "log": run.log, "seconds": run.seconds}
        save_checkpoint(checkpoints, Checkpoint(run.step, run.objective.weights(), state), run.config_hash)
    run.accelerator.wait_for_everyone()


def _resume(run: _Run, checkpoints: Checkpoints | None) -> int | None:
    """Continue where the latest checkpoint stands; its step, or None for a fresh start."""
    found = load_latest(checkpoints, run.config_hash) if checkpoints else None
    if found is None:
        return None
    run.objective.load_weights(found.weights)
    run.optimizer.load_state_dict(found.state["optimizer"])
    run.lr_schedule.load_state_dict(dict(found.state["lr_schedule"]))
    if run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(found.state["scaler"])
    run.step, run.log, run.seconds = found.step, list(found.state["log"]), found.state["seconds"]
    logger.info("training continues after step %d of %d", run.step, run.total_steps)
    return found.step
