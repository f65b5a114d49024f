"""Stages cut into requests for ranges of shards, which any process on any machine can make by the same code.

Before that, a stage's recipe is written beside its folder's `config.json`: the config describes what the shards hold,
`means.json` how they are made (the location of the model, the batch size). A request names the folder and a range;
`run_shards` reads the rest from the store.
"""

from collections.abc import Sequence
from itertools import chain

from pydantic import BaseModel, ConfigDict, Field, field_validator

from hgdpo_core.errors import ConfigError, StorageError
from hgdpo_core.progress import Progress, ShouldStop, never_stop, silent
from hgdpo_core.stages import STAGES, Stage
from hgdpo_core.stages.base import OnShard, Worker
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import FORMAT_VERSION, ShardFolder, format_range, parse_range
from hgdpo_core.storage.version import code_version, refuse_other_code

MAX_SHARD_RUNS = 300  # a stage's shard runs; Prefect drops records in bursts of thousands
NAME_CHARACTERS = 24


class ShardRequest(BaseModel):
    """A range of shards of one folder, for `run_shards`. It is the parameter of a shard flow run, as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    root: str = Field(description="the object store, as an absolute URL")
    folder: str = Field(description="key of the folder of shards, for example pools/n20-0123456789ab")
    stage: str = Field(description="what the folder holds, for example pool (images), score or latents")
    shards: str = Field(pattern=r"^\d+(-\d+)?(,\d+(-\d+)?)*$", description='which shards, for example "0-6"')
    code_version: str = Field(description="the code that planned this; other code refuses to run it")
    format_version: int = Field(description="the format of the shards that were planned")

    @field_validator("root")
    @classmethod
    def _is_absolute(cls, root: str) -> str:
        if "://" not in root:
            raise ValueError(f"the root {root!r} is relative: a worker elsewhere needs a URL such as s3://bucket/x")
        return root

    @property
    def indices(self) -> list[int]:
        """The shards' indices, ascending."""
        return parse_range(self.shards)

    @property
    def folder_id(self) -> str:
        """The folder's own name; it ends in the hash of its settings."""
        return self.folder.rpartition("/")[2]

    @property
    def tag(self) -> str:
        """What every run of this range carries, whichever parent started it."""
        return f"shard:{self.folder_id}:{self.indices[0]}"


def write_recipe(stage: Stage, *, copy_to_store: bool = False) -> None:
    """Write the stage's recipe for its workers. The newest holds: an earlier one may name a model that moved."""
    key, recipe = f"{stage.folder.key}/means.json", stage.recipe(copy_to_store=copy_to_store)
    store = stage.folder.store
    if not store.exists(key) or store.read_json(key) != recipe:
        store.write_json(key, recipe)


def cut(stage: Stage, missing: Sequence[int], images_per_run: int | None = None, *,
        least_runs: int = 1) -> list[ShardRequest]:
    """Ranges of whole shards that have something missing, each of about `images_per_run` images; without it, one.

    Ranges are cut from all requested shards, so that a second attempt meets the ranges of the first. They are smaller
    where fewer than `least_runs` would come out, and larger where more than MAX_SHARD_RUNS would.
    """
    if not missing:
        return []
    requested, lacking = stage.indices, frozenset(missing)
    shards = len(requested)
    size = shards if images_per_run is None else images_per_run // stage.images_per_shard
    size = max(min(size, -(-shards // least_runs)), -(-shards // MAX_SHARD_RUNS), 1)
    ranges = (requested[start:start + size] for start in range(0, shards, size))
    return [ShardRequest(root=stage.folder.store.root, folder=stage.folder.key, stage=stage.name,
                         shards=format_range(indices), code_version=code_version(), format_version=FORMAT_VERSION)
            for indices in ranges if lacking.intersection(indices)]


def run_name(stage: Stage, request: ShardRequest) -> str:
    """The name of a shard run: the stage's title, the range, its first and its last prompt."""
    known = list(chain.from_iterable(stage.first_prompts(index) for index in request.indices))
    ends = f": {_short(known[0])}" + (f" to {_short(known[-1])}" if len(known) > 1 else "") if known else ""
    return f"{stage.title} {request.shards}{ends}"


def open_stage(request: ShardRequest) -> Stage:
    """The stage of a request as its folder and recipe describe it.

    ConfigError for an unknown stage; StorageError where the folder has no recipe; ModelError when a model is not the
    planned one.
    """
    if request.stage not in STAGES:
        raise ConfigError(f"there is no stage {request.stage!r}: expected one of {', '.join(sorted(STAGES))}")
    folder = ShardFolder.open(Store(request.root), request.folder)
    key = f"{folder.key}/means.json"
    if not folder.store.exists(key):
        raise StorageError(f"{folder.store.url(folder.key)} has no means.json, which names the location of its "
                           "model: start the run that planned it again")
    return STAGES[request.stage].open(folder, folder.store.read_json(key), request.indices)


def run_shards(request: ShardRequest, *, progress: Progress = silent, should_stop: ShouldStop = never_stop,
               on_shard: OnShard | None = None) -> int:
    """Make what is missing of a range, commit each shard as it finishes; returns the units (images, pairs) made.

    `on_shard` is called with each manifest just committed. ConfigError when this code is not the one that planned the
    range; StoppedError after `should_stop`; errors of `open_stage`.
    """
    refuse_other_code(request.code_version, request.format_version)
    worker = Worker(progress=progress, should_stop=should_stop, on_shard=on_shard)
    return open_stage(request).make(worker)


def _short(prompt: str) -> str:
    line = " ".join(prompt.split())
    return line if len(line) <= NAME_CHARACTERS else line[:NAME_CHARACTERS - 1].rstrip() + "…"
