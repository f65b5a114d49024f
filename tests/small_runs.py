"""Tunings of the figures model that take seconds: rendered pairs in, a LoRA trained in memory, images by both out."""

from collections.abc import Sequence

import numpy as np
import torch
from training_cases import train_dpo

from hgdpo_core.config import DpoConfig, TargetConfig
from hgdpo_core.figures import caption, prompts, render
from hgdpo_core.figures.dataset import sample_figures, to_model_range
from hgdpo_core.models import Backbone, Conditioning, find_model, load_backbone
from hgdpo_core.models.sampling import initial_noise, sample_latents
from hgdpo_core.training.base import OnLog, TrainingResult
from hgdpo_core.training.data import PairBatch, epoch_order


class SmallWorld:
    """The shipped figures target, some training figures, and held-out prompts with the target's own images."""

    def __init__(self, *, pairs: int = 8, held_out: int = 16, steps: int = 6):
        self.model = find_model(TargetConfig(source="figures", dtype="float32"))
        self.figures = sample_figures("train", pairs, np.random.default_rng(0))
        self.prompts = prompts("validation", held_out, seed=0)
        self.steps = steps
        self.backbone = load_backbone(self.model)
        self.embeds = self.backbone.text.encode_captions([caption(figure) for figure in self.figures]).embeds
        self.held_out_embeds = self.backbone.text.encode_captions(self.prompts).embeds
        self.target_images = self.draw(self.backbone)

    def images(self, defects: Sequence[str | None], *, seed: int = 0) -> np.ndarray:
        """The training figures as the renderer draws them, uint8 [B, 64, 64, 3]."""
        return np.stack([np.asarray(render(figure, seed + i, defect=defect))
                         for i, (figure, defect) in enumerate(zip(self.figures, defects, strict=True))])

    def train(self, winners: np.ndarray, losers: np.ndarray, *, on_log: OnLog | None = None,
              **settings) -> tuple[TrainingResult, np.ndarray]:
        """The training's result, and the tuned model's images of the held-out prompts from the target's seeds."""
        pairs = _Pairs(*(self.backbone.codec.encode(to_model_range(side)) for side in (winners, losers)),
                       self.embeds)
        tuned = load_backbone(self.model)
        config = DpoConfig(**{"batch_size": 4, "learning_rate": 3e-4, "lambda_stat": 0.0, "mixed_precision": "no",
                              "lora_rank": 8, **settings})
        result = train_dpo(tuned.denoiser, tuned.schedule, pairs, config, on_log=on_log)
        return result, self.draw(tuned)

    @torch.no_grad()
    def draw(self, backbone: Backbone) -> np.ndarray:
        """Pictures of the held-out prompts, uint8 [P, 64, 64, 3], seed = position."""
        noise = initial_noise(range(len(self.prompts)), *backbone.latent_shape((64, 64)))
        prompts, first = Conditioning(self.held_out_embeds), Conditioning(self.held_out_embeds[:1])
        latents = sample_latents(backbone.denoiser, backbone.schedule.solver(), prompts, first, noise,
                                 steps=self.steps, guidance_scale=1.0)
        return backbone.codec.decode(latents).pixels


class _Pairs:
    """Pairs in memory."""

    def __init__(self, winners: torch.Tensor, losers: torch.Tensor, embeds: torch.Tensor):
        self.winners, self.losers, self.embeds = winners, losers, embeds

    def __len__(self) -> int:
        return len(self.winners)

    def order(self, seed: int, epoch: int) -> list[int]:
        return epoch_order(len(self), seed, epoch)

    def batch(self, indices: Sequence[int]) -> PairBatch:
        return PairBatch(self.winners[list(indices)], self.losers[list(indices)], self.embeds[list(indices)])
