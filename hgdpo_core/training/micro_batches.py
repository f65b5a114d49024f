"""The gradient of one global batch: cut over processes and micro-batches, which halve when memory runs out.

A sample's noise is its own and every sample weighs the same, so neither the number of processes nor the size of the
micro-batches changes a result by more than the rounding of sums.
"""

import logging
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from hgdpo_core.config import TrainingConfig
from hgdpo_core.devices import free_memory, is_out_of_memory
from hgdpo_core.errors import ConfigError
from hgdpo_core.training.base import Objective
from hgdpo_core.training.data import DataOrder, SampleSource, sample_generator
from hgdpo_core.training.processes import agree, part_of, sum_gradients

logger = logging.getLogger(__name__)

Averages = dict[str, torch.Tensor]


@dataclass
class GradientMaker:
    """Leaves a global batch's gradient in the trained weights of `denoiser`.

    `micro_batch` is what one process puts through the network at once. It lowers itself.
    """

    objective: Objective
    source: SampleSource
    order: DataOrder
    config: TrainingConfig
    accelerator: Accelerator
    denoiser: nn.Module
    global_batch: int

    def __post_init__(self) -> None:
        self.set_global_batch(self.global_batch)

    def set_global_batch(self, samples: int) -> None:
        """Samples of an optimizer step over all processes, whose parts may differ by one."""
        self.global_batch = samples
        self.micro_batch = min(self.config.batch_size, -(-samples // self.accelerator.num_processes))

    @property
    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.denoiser.parameters() if p.requires_grad]

    def gradient(self, step: int) -> Averages:
        """The log values of step `step` (from 0), each the mean over the global batch; the gradient is summed up.

        ConfigError when memory does not suffice for a single sample.
        """
        averages = self._attempt(step)
        while agree(self.accelerator, averages is None):
            averages = None
            self._lower(step)
            averages = self._attempt(step)
        assert averages is not None  # in all processes
        sum_gradients(self.accelerator, self.trained)
        summed = self.accelerator.reduce(torch.stack(list(averages.values())), reduction="sum")
        assert isinstance(summed, torch.Tensor)
        return dict(zip(averages, summed, strict=True))

    def _attempt(self, step: int) -> Averages | None:
        """This process's part of gradient and averages; None when memory ran out. No process waits for another here."""
        batch = range(step * self.global_batch, (step + 1) * self.global_batch)
        own = part_of(batch, self.accelerator.num_processes, self.accelerator.process_index)
        try:
            self.objective.begin_step(step)
            if not own:  # more processes than samples: what this one computes counts for nothing
                return self._backward(batch[:1], weight=0.0)
            parts = [self._backward(part, weight=len(part) / len(batch))
                     for part in (own[at:at + self.micro_batch] for at in range(0, len(own), self.micro_batch))]
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None
        return {name: torch.stack([part[name] for part in parts]).sum() for name in parts[0]}

    def _backward(self, positions: range, weight: float) -> Averages:
        batch = self.source.batch(self.order.indices(positions))
        generators = [sample_generator(self.config.seed, position) for position in positions]
        values = self.objective.batch_loss(self.denoiser, batch, generators)
        self.accelerator.backward(values["loss"].mean() * weight)
        return {name: value.detach().mean() * weight for name, value in values.items()}

    def _lower(self, step: int) -> None:
        """Halve the micro-batch, back where the step began."""
        for parameter in self.trained:
            parameter.grad = None
        free_memory()
        if self.micro_batch == 1:
            raise ConfigError(f"training ran out of memory at step {step + 1} with one sample at a time: "
                              f"{memory_advice(self.objective, self.config)}")
        self.micro_batch = (self.micro_batch + 1) // 2
        logger.warning("step %d ran out of memory: a process now takes its samples %d at a time. A step's "
                       "batch stays %d, so the result stays the same; batch_size=%d with more "
                       "gradient_accumulation_steps would save the attempt", step + 1, self.micro_batch,
                       self.global_batch, self.micro_batch)


def memory_advice(objective: Objective, config: TrainingConfig) -> str:
    """What to do when even the least does not fit."""
    first = "" if config.gradient_checkpointing else f"set {objective.name}.gradient_checkpointing to true, "
    return (f"{first}use smaller images (sampler.width, sampler.height), or a GPU with more free memory; the last "
            "checkpoint is intact")
