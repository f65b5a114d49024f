"""What an objective is, as requests, plans and reports see it and as the loop does; and what a training reports."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from hgdpo_core.config import RunConfig, TrainingConfig
from hgdpo_core.models import Backbone, Conditioning, Model
from hgdpo_core.models.averaging import WeightAverage
from hgdpo_core.models.backbone import Denoiser
from hgdpo_core.models.sizes import ModelSize
from hgdpo_core.progress import Progress, ShouldStop, never_stop, silent
from hgdpo_core.rendering.charts import ChartSpec
from hgdpo_core.statistics.checks import LogCheck
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder
from hgdpo_core.training.data import SampleSource
from hgdpo_core.training.parts import Generators, LogRow

OPTIMIZER_CHARTS = (
    ChartSpec("Gradient norm", ("grad_norm",), "before clipping"),
    ChartSpec("Learning rate", ("learning_rate",), "after warm-up and schedule"),
)
OnLog = Callable[[LogRow], None]
Validate = Callable[[int], None]
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
    """How a training reports, and asks whether to stop; only the main process reports.

    `validate` is called with the number of steps done, 0 and the last included, every `validation_every` steps, and
    after a resume once more for the step it resumes from. It must not change weights or the global randomness.
    """

    progress: Progress = silent
    should_stop: ShouldStop = never_stop
    on_log: OnLog | None = None
    validate: Validate | None = None


@dataclass(frozen=True)
class Objective:
    """A training as the loop sees it.

    `batch_loss(denoiser, batch, generators)` returns float32 `[B]` tensors by log name, among them `loss`,
    whose average is minimised; its `denoiser` is this one's in training precision, and each sample draws its randomness
    from its own generator alone.
    """

    name: str
    denoiser: Denoiser
    batch_loss: BatchLoss
    weights: Callable[[], Mapping[str, torch.Tensor]]
    load_weights: Callable[[Mapping[str, torch.Tensor]], object]
    what_to_lower: str
    average: WeightAverage | None = None
    """Of the first process: the weights that are kept instead of the network's own, and used for validation."""
    begin_step: Callable[[int], object] = lambda step: None
    """Called before the samples of optimizer step `step`, from 0; more than once where memory ran out."""
    autocast: bool = True
    """Whether mixed precision is torch's autocast; if not, `batch_loss` casts what the network reads."""
    parameter_groups: Callable[[], Sequence[dict[str, Any]]] | None = None
    """What is trained, by learning rate, as torch's optimizers take it; default: all at the settings' own rate."""


class TrainingObjective(ABC):
    """One way to tune a model: all that requests, plans, probes and reports ask. Cheap: it holds no tensors."""

    name: ClassVar[str]
    """Its key in `OBJECTIVES`, the `kind` of its requests, and what the ids of its models begin with."""
    title: ClassVar[str]
    """What the report calls such a training."""
    method: ClassVar[str] = ""
    """The name of the whole method that it is the end of, for titles; by default its own title."""
    made_by: ClassVar[str] = ""
    """How it makes a model, for a model card, after "made without human labels"; Markdown. Default: by its title."""
    trains_on: ClassVar[Literal["images", "triplets", "prompts"]]
    """What its samples are made of, by stages before."""
    config: ClassVar[type[TrainingConfig]]
    """Of its settings."""
    section: ClassVar[str]
    """The part of a run's settings that its own are in."""
    charts: ClassVar[Sequence[ChartSpec]]
    """What the report shows of the log's columns, those of `with_derived` among them."""
    checks: ClassVar[Sequence[LogCheck]] = ()
    """Warnings about a finished training, from its log and the evaluation behind it."""
    samples: Callable[[ShardFolder, Sequence[int]], SampleSource[Any]]
    """What the training reads, from shards of latents."""

    def settings(self, config: RunConfig) -> TrainingConfig:
        """Its settings, an instance of `config`, in those of a run."""
        return getattr(config, self.section)

    def check(self, config: RunConfig) -> None:  # noqa: B027
        """ConfigError for settings of a run that it cannot train by; nothing is loaded yet."""

    def require_fit(self, store: Store, triplets: str | None, samples: SampleSource[Any],  # noqa: B027
                    indices: Sequence[int], model: Model, config: Any) -> None:
        """InputError for samples that this model should not be trained on; `triplets`: what they were made of."""

    @abstractmethod
    def random_batch(self, count: int, latent_shape: Sequence[int], embeds_shape: Sequence[int]) -> Any:
        """A batch as `samples` gives it, of random numbers, for a timed probe."""

    @abstractmethod
    def prepare(self, backbone: Backbone, model: Model, config: Any) -> Objective:
        """What the loop trains of a backbone of `model` in float32, which is changed in place."""

    @abstractmethod
    def save(self, backbone: Backbone, folder: Path, model_id: str) -> str:
        """Write what was trained into an empty folder; returns the kind of model it is, "lora" or "pipeline"."""

    def locate(self, store: Store, config: Any, *, copy_to_store: bool) -> dict[str, Any]:
        """Where what its settings name is, for `find_located` on another machine."""
        return {}

    def find_located(self, store: Store, config: Any, locations: Mapping[str, Any]) -> Any:
        """The settings with what they name as this machine finds it; ModelError where that is another version."""
        return config

    def average_step(self, config: Any) -> Any:
        """The settings for a probe, whose few steps should take as long as those of a training on average."""
        return config

    def watch(self, warn: Callable[[str], object]) -> OnLog:
        """Called with each log row of a training under way, it warns when something goes wrong."""
        return lambda row: None

    def with_derived(self, log: Sequence[Mapping[str, float]]) -> Sequence[Mapping[str, float]]:
        """The log with the columns that are computed from others."""
        return log

    @abstractmethod
    def trained_numbers(self, size: ModelSize, config: Any) -> int:
        """How many numbers of a model of that size are trained."""

    def saved_numbers(self, size: ModelSize, config: Any) -> int:
        """How many numbers the kept model holds."""
        return self.trained_numbers(size, config)


class TrainedDenoiser(nn.Module):
    """A denoiser whose predictions are float32. Accelerate wraps this and leaves the caller's as it was."""

    def __init__(self, denoiser: Denoiser):
        super().__init__()
        self.denoiser = denoiser

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        return self.denoiser(noisy, timesteps, conditioning).float()
