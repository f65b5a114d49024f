"""The pairs that stand in for public data sets in the figures setting: generated and labelled once, kept as folders."""

import functools
from collections.abc import Sequence
from pathlib import Path

from hgdpo_core.built_in import FOREIGN_GUIDANCE, FOREIGN_SOURCE, SOURCE, STAND_IN_PAIRS
from hgdpo_core.config import PoolConfig, RunConfig, SamplerConfig, TargetConfig
from hgdpo_core.config.base import content_hash
from hgdpo_core.config.pair_source import PairSource
from hgdpo_core.config.presets import figures
from hgdpo_core.devices import default_device
from hgdpo_core.figures import foreign_path, labeller_path
from hgdpo_core.figures.foreign.prompts import foreign_prompts
from hgdpo_core.figures.foreign_pairs import PairsOf, first_two_of, write_foreign_pairs
from hgdpo_core.models import Model, find_model
from hgdpo_core.models.image_generator import ImageGenerator
from hgdpo_core.pair_sets.sets import PairSet, open_pair_set
from hgdpo_core.prompts import PromptList
from hgdpo_core.storage import DryStore, Store
from hgdpo_core.storage.scratch import cache_folder

BATCH = 40


def open_pairs(source: PairSource, store: Store) -> PairSet:
    """The pairs of a source, which may be the built-in stand-ins; errors as `open_pair_set`."""
    if source.source == FOREIGN_SOURCE:
        source = source.model_copy(update={"source": str(find_stand_ins(store))})
    return open_pair_set(source, leave_out=store.local_path(""))


def find_stand_ins(store: Store) -> Path:
    """The folder of pairs by the foreign generator, three in ten without people, labelled by the labeller.

    Made where it is missing, in a minute or two: beside the root's models, or in the cache. Sampled as the preset does,
    but for the guidance; always in float32, whatever the machine: the pairs are a data set.
    """
    model = find_model(TargetConfig(source=FOREIGN_SOURCE, dtype="float32"))
    sampler = figures().sampler.model_copy(update={"guidance_scale": FOREIGN_GUIDANCE})
    prompts = foreign_prompts("train", STAND_IN_PAIRS, seed=0)
    return _write(_folder(store, f"{FOREIGN_SOURCE}-stand-in-{STAND_IN_PAIRS}"), model, prompts, sampler, seed=0)


def label_own(store: Store, model: Model, config: RunConfig, prompts: PromptList) -> Path:
    """The folder of a built-in target's first two images of each prompt's pool, labelled as the stand-ins are."""
    sampler = config.pool.sampler(config.sampler.plain)
    name = content_hash([model.identity(), sampler.identity(), config.pool.seed, prompts.id])
    return _write(_folder(store, f"{SOURCE}-stand-in-labels-{name}"), model, prompts.prompts, sampler, config.pool.seed)


def _folder(store: Store, name: str) -> Path:
    folder = (store.local_path("images") or cache_folder()) / name
    return cache_folder(name) if isinstance(store, DryStore) and not folder.exists() else folder


def _write(folder: Path, model: Model, prompts: Sequence[str], sampler: SamplerConfig, seed: int) -> Path:
    @functools.cache
    def load() -> PairsOf:  # only where something is missing
        pool = PoolConfig(images_per_prompt=2, batch_size=BATCH, seed=seed)
        return first_two_of(ImageGenerator(model, sampler, pool, default_device()))

    name = FOREIGN_SOURCE if model.path == foreign_path() else SOURCE
    write_foreign_pairs(folder, prompts, lambda texts: load()(texts), labeller=labeller_path(), model=name,
                        fingerprint=f"{model.fingerprint}, {sampler.identity()}, seed {seed}")
    return folder
