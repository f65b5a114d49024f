"""The stand-in pairs as folders: which prompts, generators and settings make them."""

import functools
from collections.abc import Sequence
from pathlib import Path

from hgdpo_core.built_in import FOREIGN_GUIDANCE, FOREIGN_SOURCE, SOURCE
from hgdpo_core.config import PoolConfig, RunConfig, SamplerConfig, TargetConfig
from hgdpo_core.devices import default_device
from hgdpo_core.models import Model, find_model
from hgdpo_core.models.image_generator import ImageGenerator
from hgdpo_core.presets import figures

from . import foreign_path, labeller_path
from .foreign.prompts import foreign_prompts
from .foreign_pairs import PairsOf, first_two_of, write_foreign_pairs

BATCH = 40


def write_foreign(folder: Path, count: int) -> Path:
    """`count` pairs by the foreign generator, three in ten without people; what exists is kept.

    Sampled as the preset does, but for the guidance. Always float32, whatever the machine: the pairs are a data set.
    """
    model = find_model(TargetConfig(source=FOREIGN_SOURCE, dtype="float32"))
    sampler = figures().sampler.model_copy(update={"guidance_scale": FOREIGN_GUIDANCE})
    return _write(folder, model, foreign_prompts("train", count, seed=0), sampler, seed=0)


def write_labelled(folder: Path, model: Model, config: RunConfig, prompts: Sequence[str]) -> Path:
    """The first two images of each pool of a run, by its target."""
    return _write(folder, model, prompts, config.pool.sampler(config.sampler.plain), config.pool.seed)


def _write(folder: Path, model: Model, prompts: Sequence[str], sampler: SamplerConfig, seed: int) -> Path:
    @functools.cache
    def load() -> PairsOf:  # only where something is missing
        pool = PoolConfig(images_per_prompt=2, batch_size=BATCH, seed=seed)
        return first_two_of(ImageGenerator(model, sampler, pool, default_device()))

    name = FOREIGN_SOURCE if model.path == foreign_path() else SOURCE
    write_foreign_pairs(folder, prompts, lambda texts: load()(texts), labeller=labeller_path(), model=name,
                        fingerprint=f"{model.fingerprint}, {sampler.identity()}, seed {seed}")
    return folder
