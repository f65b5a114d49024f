"""AlignProp: a LoRA by the gradient of a reward, back through the sampler (arXiv:2310.03739), a baseline of Table 1.

Public versions disagree with each other; ours: DDIM with eta 0 and the run's own steps and guidance, gradients through
both branches of guidance, and one number of live steps (those the gradient goes through) for each optimizer step, the
same for all its images.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from hgdpo_core.config import AlignPropConfig, PromptSyntax, RunConfig, ScorerConfig
from hgdpo_core.errors import ConfigError
from hgdpo_core.models import Backbone, Conditioning, Model, load_backbone
from hgdpo_core.models.sampling import Denoise, sample_with_gradient
from hgdpo_core.prompts.syntax import strip_syntax
from hgdpo_core.rendering.charts import ChartSpec
from hgdpo_core.scorers import DifferentiableScorer, find_scorer, load_differentiable, require_gradient
from hgdpo_core.stages.located_scorer import find_located_scorer, locate_scorer
from hgdpo_core.storage import Store
from hgdpo_core.training.base import OPTIMIZER_CHARTS, Objective
from hgdpo_core.training.data import EmbeddedPrompts, PromptBatch, hashed_seed
from hgdpo_core.training.lora import LoraObjective, put_lora
from hgdpo_core.training.parts import Generators


class AlignPropTraining(AlignPropConfig):
    """The settings with what a run adds to them: how its images are sampled and scored."""

    width: int
    height: int
    steps: int
    guidance_scale: float
    scorer: ScorerConfig
    scorer_fingerprint: str


@dataclass
class Reward:
    """Latents to scores, with the gradient; on the device of the latents from the first call on."""

    backbone: Backbone
    scorer: DifferentiableScorer
    prompt_syntax: PromptSyntax = "plain"
    """How prompts are written; a scorer reads them without weights, as it does for stored scores."""
    _device: torch.device = field(default=torch.device("cpu"), init=False)

    def __call__(self, latents: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """float32 [B] for scaled latents [B, C, h, w]."""
        if latents.device != self._device:
            self._device = latents.device
            self.backbone.codec.to(self._device)
            self.scorer.to(self._device)
        images = self.backbone.codec.decode_with_gradient(latents)
        texts = [strip_syntax(prompt, self.prompt_syntax) for prompt in prompts]
        return self.scorer.score_pixels((images / 2 + 0.5).clamp(0, 1), texts)


@dataclass
class LiveSteps:
    """How many solver steps the gradient goes through in an optimizer step; the same on all processes."""

    config: AlignPropTraining
    now: int = 0

    def begin_step(self, step: int) -> None:
        """Draw the number for optimizer step `step`, from 0, where it is not fixed."""
        if self.config.live_steps is not None:
            self.now = self.config.live_steps
            return
        generator = torch.Generator().manual_seed(hashed_seed("live steps", self.config.seed, step))
        self.now = int(torch.randint(self.config.least_live_steps, self.config.steps + 1, (1,), generator=generator))


@dataclass
class NegativeTexts:
    """The negative prompt's conditioning at each length, as images of the model are sampled with."""

    model: Model
    _known: dict[int, Conditioning] = field(default_factory=dict, init=False)

    def __call__(self, length: int) -> Conditioning:
        if length not in self._known:  # nearly always one length: a model kept for others would only take room
            text = load_backbone(self.model, "cpu").text
            self._known[length] = text.negative(length).to("cpu", torch.float32)
        return self._known[length]


def prepare_alignprop(backbone: Backbone, negative: Callable[[int], Conditioning], scorer: DifferentiableScorer,
                      config: AlignPropTraining, prompt_syntax: PromptSyntax = "plain") -> Objective:
    """The loss -reward / `reward_deviation` for the loop, and a LoRA on the denoiser's network that it trains.

    Each image begins from noise of its own generator. `negative(length)`: conditioning of one text. Log rows: `step`,
    `loss`, `reward` (in the scorer's units, of images as they are sampled in training), `live_steps`, `grad_norm`
    (before clipping) and `learning_rate`. ModelError for a network that cannot be trained.
    """
    denoiser = backbone.denoiser
    lora, reward, live = put_lora(denoiser, config), Reward(backbone, scorer, prompt_syntax), LiveSteps(config)
    shape = backbone.latent_shape((config.width, config.height))

    def batch_loss(trained: nn.Module, batch: PromptBatch, generators: Generators) -> dict[str, torch.Tensor]:
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        rewards: dict[int, torch.Tensor] = {}
        for rows in _equally_long(batch.conditionings):
            texts = Conditioning.join([batch.conditionings[row] for row in rows])
            latents = sample_with_gradient(
                reads(trained, lora.read_dtype), backbone.schedule.differentiable_solver(),
                texts.to(denoiser.device, lora.read_dtype),
                negative(texts.length).to(denoiser.device, lora.read_dtype), noise[rows].to(denoiser.device),
                steps=config.steps, guidance_scale=config.guidance_scale, live_steps=live.now)
            rewards |= zip(rows, reward(latents, [batch.prompts[row] for row in rows]), strict=True)
        scores = torch.stack([rewards[row] for row in range(len(noise))])
        return {"loss": -scores / config.reward_deviation, "reward": scores,
                "live_steps": torch.full_like(scores, live.now)}

    return replace(lora.objective("alignprop", batch_loss), begin_step=live.begin_step)


def reads(trained: nn.Module, dtype: torch.dtype) -> Denoise:
    """The network given noisy latents in that precision; the solver keeps float32."""
    return lambda noisy, timestep, conditioning: trained(noisy.to(dtype), timestep, conditioning)


def _equally_long(conditionings: Sequence[Conditioning]) -> list[list[int]]:
    """Rows whose texts are equally long, together: the sampler pads none."""
    groups: dict[int, list[int]] = {}
    for row, conditioning in enumerate(conditionings):
        groups.setdefault(conditioning.length, []).append(row)
    return list(groups.values())


class AlignProp(LoraObjective):
    """The entry in `OBJECTIVES`."""

    name, title = "alignprop", "AlignProp"
    made_by = ("by [AlignProp, arXiv:2310.03739](https://arxiv.org/abs/2310.03739): a scorer's gradient, back through "
               "the sampler")
    section, trains_on, config, samples = "alignprop", "prompts", AlignPropTraining, EmbeddedPrompts
    charts = (ChartSpec("Reward", ("reward",), "of images sampled in training"),
              ChartSpec("Live steps", ("live_steps",), "solver steps that the gradient goes through"),
              *OPTIMIZER_CHARTS)

    def settings(self, config: RunConfig) -> AlignPropTraining:
        sampler = config.sampler
        return AlignPropTraining(**config.alignprop.model_dump(), width=sampler.width, height=sampler.height,
                                 steps=sampler.steps, guidance_scale=sampler.guidance_scale, scorer=config.scorer,
                                 scorer_fingerprint=find_scorer(config.scorer.name, config.scorer.source))

    def check(self, config: RunConfig) -> None:
        require_gradient(config.scorer.name)
        if config.scorer.dtype == "float16":
            raise ConfigError("scorer.dtype is float16, in which the gradient of a reward underflows: set it to "
                              "float32 or bfloat16")
        for name in ("live_steps", "least_live_steps"):
            steps, value = config.sampler.steps, getattr(config.alignprop, name)
            if value is not None and value > steps:
                raise ConfigError(f"alignprop.{name} is {value}, but an image is sampled in {steps} steps: choose "
                                  f"from 1 to {steps}")

    def locate(self, store: Store, config: AlignPropTraining, *, copy_to_store: bool) -> dict[str, Any]:
        return {"reward": locate_scorer(store, config.scorer, copy_to_store=copy_to_store)}

    def find_located(self, store: Store, config: AlignPropTraining, locations: Mapping[str, Any]) -> AlignPropTraining:
        found = find_located_scorer(store, locations["reward"], config.scorer_fingerprint)
        return config.model_copy(update={"scorer": found})

    def average_step(self, config: AlignPropTraining) -> AlignPropTraining:
        mean = round((config.least_live_steps + config.steps) / 2)
        return config.model_copy(update={"live_steps": config.live_steps or mean})

    def random_batch(self, count: int, latent_shape: Sequence[int], embeds_shape: Sequence[int]) -> PromptBatch:
        return PromptBatch([f"prompt {number}" for number in range(count)],
                           [Conditioning(torch.randn(1, *embeds_shape)) for _ in range(count)])

    def prepare(self, backbone: Backbone, model: Model, config: AlignPropTraining) -> Objective:
        scorer = load_differentiable(config.scorer, "cpu")  # each process moves it to its own GPU, later
        return prepare_alignprop(backbone, NegativeTexts(model), scorer, config, model.prompt_syntax)
