"""The loop of all objectives: optimizer steps, log, stopping, checkpoints, and going on from them.

Resuming with another number of processes keeps the batch of an optimizer step as it was, and with it steps, samples,
noise and learning rate: a process takes another part. Only the order of sums changes, so losses agree up to rounding.
"""

import logging
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs

from hgdpo_core.config import TrainingConfig
from hgdpo_core.config.base import content_hash
from hgdpo_core.devices import is_out_of_memory, use_cpu
from hgdpo_core.errors import ConfigError, InputError, StoppedError, StorageError
from hgdpo_core.parallel import Writer
from hgdpo_core.progress import count_of
from hgdpo_core.storage import scratch_folder
from hgdpo_core.training.base import Hooks, Objective, TrainedDenoiser, TrainingResult
from hgdpo_core.training.checkpoints import Checkpoint, Checkpoints, load_latest, read_checkpoint, save_checkpoint
from hgdpo_core.training.data import DataOrder, SampleSource
from hgdpo_core.training.micro_batches import Averages, GradientMaker, memory_advice
from hgdpo_core.training.optimization import make_optimizer, warm_up_schedule
from hgdpo_core.training.parts import LogRow, resolve_precision
from hgdpo_core.training.processes import WAIT, agree, forget_launchers, from_first

logger = logging.getLogger(__name__)


@dataclass
class _Run:
    """The state of one training."""

    objective: Objective
    source: SampleSource[Any]
    config: TrainingConfig
    accelerator: Accelerator
    optimizer: Any  # accelerate's wrapper
    lr_schedule: torch.optim.lr_scheduler.LambdaLR
    gradients: GradientMaker
    step: int = 0
    log: list[LogRow] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def total_steps(self) -> int:
        epochs = math.ceil(self.config.epochs * len(self.source) / self.gradients.global_batch)
        return self.config.max_steps or epochs

    @property
    def config_hash(self) -> str:
        return content_hash({"trainer": self.objective.name, "config": self.config.identity(),
                             "samples": len(self.source)})


def run_training(objective: Objective, source: SampleSource[Any], config: TrainingConfig,
                 checkpoints: Checkpoints | None, hooks: Hooks) -> TrainingResult:
    """Train what requires gradients in `objective.denoiser`, from this config's latest checkpoint if there is one.

    The batch of a step is `step_batch` of the processes that the training began with. Where memory runs out, the
    micro-batch halves and the training goes on with the same result.

    StoppedError after `should_stop`, with a checkpoint; ConfigError when the numbers stop being finite, or when the
    memory is too small for a single sample.
    """
    if len(source) == 0:
        raise InputError("there is nothing to train on: expected at least one sample")
    try:
        with objective.denoiser.training_attention(on_cpu=use_cpu()):
            result = _train(_open(objective, source, config), checkpoints, hooks)
    except RuntimeError as error:  # while the weights move to the GPU, or the optimizer makes its states
        if not is_out_of_memory(error):
            raise
        raise ConfigError(f"training ran out of memory: {memory_advice(objective, config)}") from None
    if objective.average is not None:
        objective.average.put_in_place()
    return result


def _train(run: _Run, checkpoints: Checkpoints | None, hooks: Hooks) -> TrainingResult:
    config = run.config
    resumed_from = _resume(run, checkpoints)
    saved_step, before, started = run.step, run.seconds, time.monotonic()
    if config.warmup_steps >= run.total_steps and run.accelerator.is_main_process:
        logger.warning("a training of %s ends inside its warm-up of %d, before the learning rate is %g: use more "
                       "samples or epochs, or fewer warmup_steps", count_of(run.total_steps, "step"),
                       config.warmup_steps, config.learning_rate)
    if not run.accelerator.is_main_process:
        hooks = Hooks(should_stop=hooks.should_stop)
    hooks.progress(run.step, run.total_steps, "steps")
    with Writer() as writer:  # of checkpoints, beside the steps that follow
        while True:
            run.seconds = before + time.monotonic() - started
            finished = run.step >= run.total_steps
            stopping = not finished and agree(run.accelerator, hooks.should_stop())
            if run.step != saved_step and (finished or stopping or run.step % config.checkpoint_every == 0):
                _save(run, checkpoints, writer)
                saved_step = run.step
            _validate(run, hooks, finished)
            if finished or stopping:
                break
            _report(run, _optimizer_step(run), hooks)
    run.accelerator.wait_for_everyone()  # the launcher ends the first, which may still write, when another fails
    if stopping:
        kept = f"step {saved_step} is kept" if checkpoints and saved_step else "nothing is kept"
        raise StoppedError(f"training was asked to stop after step {run.step} of {run.total_steps}: {kept}")
    return TrainingResult(run.step, run.log, resumed_from, run.seconds, run.gradients.global_batch)


def _open(objective: Objective, source: SampleSource[Any], config: TrainingConfig) -> _Run:
    # Accelerate keeps the precision of the process's first training and refuses another one.
    forget_launchers()
    AcceleratorState._reset_state()
    precision = resolve_precision(config.mixed_precision) if objective.autocast else "no"
    accelerator = Accelerator(mixed_precision=precision, cpu=use_cpu(),
                              kwargs_handlers=[InitProcessGroupKwargs(timeout=WAIT)])
    denoiser = objective.denoiser.to(accelerator.device)
    if config.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    grouped = objective.parameter_groups
    optimizer = make_optimizer(grouped() if grouped else (p for p in denoiser.parameters() if p.requires_grad), config)
    # The schedule is not prepared: accelerate would advance it once for every process.
    lr_schedule = warm_up_schedule(optimizer, config.warmup_steps)
    # Precision only, no DistributedDataParallel: that would send gradients amid a backward pass, where a process out
    # of memory leaves the others waiting. Ours are sent once a step, when all have theirs.
    trained = accelerator.prepare_model(TrainedDenoiser(denoiser), evaluation_mode=True)
    global_batch = step_batch(config, accelerator.num_processes)
    gradients = GradientMaker(objective, source, DataOrder(source, config.seed), config, accelerator, trained,
                              global_batch)
    optimizer = accelerator.prepare_optimizer(optimizer)
    return _Run(objective, source, config, accelerator, optimizer, lr_schedule, gradients)


def step_batch(config: TrainingConfig, processes: int = 1) -> int:
    """Samples of an optimizer step over all processes, of a training that begins with so many."""
    return config.global_batch_size or config.batch_size * config.gradient_accumulation_steps * processes


def _optimizer_step(run: _Run) -> LogRow:
    """One step on one global batch; its log row, averaged over that batch."""
    averages = run.gradients.gradient(run.step)
    grad_norm = run.accelerator.clip_grad_norm_(run.gradients.trained, run.config.max_grad_norm)
    averages["grad_norm"] = torch.as_tensor(grad_norm, device=run.accelerator.device).float()
    row = _row(run, averages)
    run.optimizer.step()
    run.lr_schedule.step()
    run.optimizer.zero_grad()
    if run.objective.average is not None:
        run.objective.average.step()
    run.step += 1
    return row


def _row(run: _Run, averages: Averages) -> LogRow:
    numbers = torch.stack(list(averages.values())).tolist()
    row = {"step": run.step + 1, **dict(zip(averages, numbers, strict=True)),
           "learning_rate": run.lr_schedule.get_last_lr()[0]}
    # An fp16 scaler meets infinite gradients on its way and skips those steps; an infinite loss is never right.
    for name in ["loss"] if run.accelerator.scaler is not None else ["loss", "grad_norm"]:
        if not math.isfinite(row[name]):
            raise ConfigError(f"training stopped at step {row['step']}, before the weights changed: {name} is "
                              f"{row[name]}, expected a finite number. Lower {run.objective.what_to_lower}, use "
                              f"mixed_precision no{'' if run.objective.autocast else ' with autocast true'}, or look "
                              "for latents that are not finite; the last checkpoint is intact")
    return row


def _validate(run: _Run, hooks: Hooks, finished: bool) -> None:
    every = run.config.validation_every
    if hooks.validate is not None and every is not None and (finished or run.step % every == 0):
        with run.objective.average.in_place() if run.objective.average is not None else nullcontext():
            hooks.validate(run.step)


def _report(run: _Run, row: LogRow, hooks: Hooks) -> None:
    if run.step % run.config.log_every == 0 or run.step == run.total_steps:
        run.log.append(row)
        if hooks.on_log is not None:
            hooks.on_log(row)
    hooks.progress(run.step, run.total_steps, "steps")


# -- resuming


def _save(run: _Run, checkpoints: Checkpoints | None, writer: Writer) -> None:
    """Begin to write a checkpoint, when the one before is written; its copy takes as much of the machine's memory."""
    if checkpoints is None or not run.accelerator.is_main_process:
        return
    writer.finish()  # before the copy: there is never more than one
    scaler, average = run.accelerator.scaler, run.objective.average
    state = {"optimizer": run.optimizer.state_dict(), "lr_schedule": run.lr_schedule.state_dict(),
             "scaler": scaler.state_dict() if scaler is not None else None,
             "follower": average.state_dict() if average is not None else None,
             "global_batch": run.gradients.global_batch, "processes": run.accelerator.num_processes,
             "log": run.log, "seconds": run.seconds}
    checkpoint = Checkpoint(run.step, run.objective.weights(), state).on_host()
    writer.start(partial(save_checkpoint, checkpoints, checkpoint, run.config_hash))


def _resume(run: _Run, checkpoints: Checkpoints | None) -> int | None:
    """Continue from the latest checkpoint; its step, or None for a fresh start."""
    found = _load(run, checkpoints) if checkpoints else None
    if found is None:
        return None
    if found.step > run.total_steps:
        raise StorageError(f"the checkpoint of step {found.step} is beyond the last step {run.total_steps} of this "
                           "training: delete the folder of its checkpoints and start it again")
    run.objective.load_weights(found.weights)
    run.optimizer.load_state_dict(found.state["optimizer"])
    run.lr_schedule.load_state_dict(dict(found.state["lr_schedule"]))
    if run.accelerator.scaler is not None and found.state["scaler"] is not None:  # None: it began without fp16
        run.accelerator.scaler.load_state_dict(found.state["scaler"])
    if run.objective.average is not None:
        run.objective.average.load_state_dict(found.state["follower"])
    run.step, run.log, run.seconds = found.step, list(found.state["log"]), found.state["seconds"]
    run.gradients.set_global_batch(found.state["global_batch"])
    logger.info("training continues after step %d of %d", run.step, run.total_steps)
    _warn_of_other_processes(run, found.state["processes"])
    return found.step


def _load(run: _Run, checkpoints: Checkpoints) -> Checkpoint | None:
    """The latest checkpoint: the first process fetches it, the others read its copy, all being on one machine."""
    first, found = run.accelerator.is_main_process, None
    with scratch_folder() as own:
        folder = from_first(run.accelerator, own)
        if first:
            found = load_latest(checkpoints, run.config_hash, folder)
        if from_first(run.accelerator, found is not None) and not first:
            found = read_checkpoint(folder)
        run.accelerator.wait_for_everyone()  # the folder is still there for all
    return found


def _warn_of_other_processes(run: _Run, before: int) -> None:
    now = run.accelerator.num_processes
    if now != before:
        logger.warning(
            "this training goes on with %d process%s instead of %d. The batch of a step stays %d, and so do its "
            "samples, their noise, the learning rate and the number of steps; a process takes up to %d samples a step, "
            "%d at a time. Losses agree with those of %d up to rounding",
            now, "" if now == 1 else "es", before, run.gradients.global_batch, -(-run.gradients.global_batch // now),
            run.gradients.micro_batch, before)
