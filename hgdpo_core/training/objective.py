"""Objectives by name: all that a training from latents to a kept model, its plan and its report ask for.

A new one is a subclass of `TrainingObjective` in a file of its own, its config, and an entry in `OBJECTIVES`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from hgdpo_core.errors import ConfigError
from hgdpo_core.training.alignprop import AlignProp
from hgdpo_core.training.base import TrainingObjective
from hgdpo_core.training.data import epoch_order
from hgdpo_core.training.dpo import Dpo
from hgdpo_core.training.instantbooth import InstantBoothTraining
from hgdpo_core.training.sft import Sft
from hgdpo_core.training.sft_winners import SftWinners

OBJECTIVES: dict[str, TrainingObjective] = {"sft": Sft(), "dpo": Dpo(), "sft_winners": SftWinners(),
                                            "alignprop": AlignProp(), "instantbooth": InstantBoothTraining()}


def find_objective(name: str) -> TrainingObjective:
    """The objective of that name; ConfigError for an unknown one."""
    if name not in OBJECTIVES:
        raise ConfigError(f"there is no training objective {name!r}: expected one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]


def lora_objective(name: str) -> TrainingObjective:
    """The objective of that name, which trains the LoRA of a run; ConfigError for one that does not."""
    objective = find_objective(name)
    if objective.trains_on == "images":
        choices = (other for other, each in OBJECTIVES.items() if each.trains_on != "images")
        raise ConfigError(f"objective is {name!r}, which trains on images: expected how its LoRA is "
                          f"trained, one of {', '.join(choices)}")
    return objective


class RandomSamples:
    """Endless random samples of an objective, for a probe."""

    def __init__(self, objective: TrainingObjective, shapes: Mapping[str, Sequence[int]]):
        self._objective, self._shapes = objective, shapes

    def __len__(self) -> int:
        return 1024

    def order(self, seed: int, epoch: int) -> Sequence[int]:
        return epoch_order(len(self), seed, epoch)

    def batch(self, indices: Sequence[int]) -> Any:
        batch = self._objective.random_batch(len(indices), self._shapes["latent_shape"], self._shapes["embeds_shape"])
        return batch.with_pooled(self._shapes["pooled_shape"]) if "pooled_shape" in self._shapes else batch
