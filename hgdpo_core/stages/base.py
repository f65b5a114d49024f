"""A stage: a folder of shards, which of them are missing, and how to make one; and the one loop that makes them.

A stage answers all that its runner, its worker and the plan of a run ask: nothing outside its file names it. A new one
is a class with the properties below and an entry in `STAGES` (hgdpo_core/stages/__init__.py).
"""

import functools
import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice, takewhile
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import pyarrow as pa

from hgdpo_core.devices import default_device, device_name, free_memory, is_out_of_memory
from hgdpo_core.errors import ConfigError, StoppedError, StorageError
from hgdpo_core.models.sizes import ModelSize
from hgdpo_core.parallel import Writer, ahead, thread_map
from hgdpo_core.progress import Progress, ShouldStop, never_stop, silent
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import InputShard, ShardFolder, ShardManifest

logger = logging.getLogger(__name__)
S = TypeVar("S")
T = TypeVar("T")

Manifests = dict[int, ShardManifest]
OnShard = Callable[[ShardManifest], None]
Claim = Callable[[int], bool]
"""Asked before a shard of an index is read: False where another process of the same work makes it."""
Advance = Callable[[int], None]
"""Called after every n units of a shard."""
BATCHES_AHEAD = 2  # a shard's last batch, often a small one, is computed before one batch is decoded
SHARDS_COMPARED, FOLDERS_COMPARED = 8, 20  # looked at for what past work took


@dataclass(frozen=True)
class Worker:
    """What makes shards: a device, how it reports, and whether it should stop."""

    device: str = field(default_factory=default_device)
    progress: Progress = silent
    should_stop: ShouldStop = never_stop
    on_shard: OnShard | None = None
    """Called with each manifest just committed."""
    claim: Claim = lambda index: True
    network: Any = None
    """What the stage computes with (a scorer, an image generator), already loaded, where one serves several stages."""

    def check_stop(self, doing: str) -> None:
        """StoppedError when the work should end."""
        if self.should_stop():
            raise StoppedError(f"stopped while {doing}; finished shards are kept")


@dataclass(frozen=True)
class ShardRows:
    """One shard as it was computed. `rejected`: what no later stage may use, with its reason."""

    table: pa.Table
    rejected: pa.Table | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


class Probe(NamedTuple):
    """What one image of a stage's work costs on this machine: seconds, and stored bytes where known."""

    seconds: float
    bytes: int | None = None
    advice: str = ""
    """Settings that are faster here, with what was measured, where others were tried."""
    decoding: float = 0.0
    """Of a sampled image's `seconds`, those outside its sampling steps: its prompt, decoding, its file's bytes."""


class Computer(ABC):
    """A loaded network that computes shards."""

    batch_size: int | None
    """Images put through the network together; None where nothing is batched. The loop halves it."""

    def batches(self, index: int, tables: Sequence[pa.Table]) -> Iterator[Any]:
        """What `compute` gets of a shard, one after the other: batches of images, decoded and ready for the network.

        Called in a thread of its own, where each batch is made while the one before, of this shard or of the last, is
        computed.
        """
        return iter(())

    @abstractmethod
    def compute(self, index: int, tables: Sequence[pa.Table], batches: Iterator[Any], worker: Worker,
                advance: Advance) -> ShardRows:
        """The rows of a shard from those of the stage's sources and its `batches`; `advance(n)` after every n units.

        `batches` asks `worker.check_stop` before each; a computer without any does.
        """


class Stage(ABC):
    """Shards of one folder, made from those of the same index in `sources`. Cheap to hold: no network, no tensors."""

    name: ClassVar[str]
    """Persisted: in the folder's `config.json` and in requests."""
    unit: ClassVar[str] = "images"
    """What progress and plans count, in the plural."""
    doing: ClassVar[str]
    """For messages: "stopped while {doing}"."""
    runs_on_workers: ClassVar[bool] = True
    """False for work of seconds that needs no model: a parent does it itself."""
    images_per_run: ClassVar[str] = "score_images_per_run"
    """The setting of `workers` that cuts its shard runs."""
    least_runs: ClassVar[str | None] = None
    """The setting of `workers` that decides over how many runs little work is spread."""
    is_costly: ClassVar[bool] = False
    """Whether the loop looks again, right before each shard, for one that another worker made meanwhile."""
    reads: ClassVar[tuple[str, ...]] = ()
    """Attributes that hold the folders of `sources`."""
    read_schemas: ClassVar[tuple[pa.Schema, ...]] = ()
    """Columns that shards of each source must have; none are checked where this is empty."""
    row_bytes: ClassVar[float] = 0.0
    """About how many bytes a unit takes in the store, where no image decides it."""

    folder: ShardFolder
    title: str
    """Its name for people: in progress bars, run names and plans."""
    requested: tuple[int, ...] | None
    expected: Mapping[int, int]
    """Rows that each shard of the first source will have, where a plan knows it."""

    # -- which shards

    @property
    def indices(self) -> list[int]:
        """The requested shards, ascending."""
        return list(self.requested or ())

    @property
    def sources(self) -> tuple[ShardFolder, ...]:
        """The folders whose shard of the same index each shard is made from."""
        return tuple(getattr(self, name) for name in self.reads)

    def existing(self, indices: Iterable[int] | None = None) -> Manifests:
        """Those requested shards (or of `indices`) that exist, made from what their sources hold today."""
        return self.look(indices)[0]

    def find_missing(self, indices: Iterable[int] | None = None) -> list[int]:
        """The requested shards (or of `indices`) that have to be made."""
        requested = self.indices if indices is None else list(indices)
        existing = self.existing(requested)
        return [index for index in requested if index not in existing]

    def look(self, indices: Iterable[int] | None = None) -> tuple[Manifests, tuple[Manifests, ...]]:
        """The shards that exist, and the manifests of each source."""
        requested = self.indices if indices is None else list(indices)
        manifests = self.folder.manifests(requested)
        sources = tuple(source.manifests(requested) for source in self.sources)
        return {index: manifest for index, manifest in manifests.items()
                if self._is_made(index, manifest, sources)}, sources

    def _is_made(self, index: int, manifest: ShardManifest, sources: Sequence[Mapping[int, ShardManifest]]) -> bool:
        return self.is_requested(index, manifest) and is_made_from(
            manifest, index, list(zip(self.sources, sources, strict=True)))

    def is_requested(self, index: int, manifest: ShardManifest | None) -> bool:
        """Whether a committed shard, made here or by another writer, is the requested one."""
        return True

    # -- making them

    @abstractmethod
    def recipe(self, *, copy_to_store: bool = False) -> dict[str, Any]:
        """How the shards are made (the location of the model, the batch size), for `open` on another machine.

        With `copy_to_store`, what is outside the store is copied into it.
        """

    @classmethod
    @abstractmethod
    def open(cls, folder: ShardFolder, recipe: Mapping[str, Any], indices: Sequence[int]) -> Self:
        """The stage as a worker opens it; ModelError when a model is not the planned one any more."""

    @abstractmethod
    def load(self, worker: Worker) -> AbstractContextManager[Computer]:
        """The network, on the worker's device."""

    def units(self, indices: Iterable[int], sources: Sequence[Mapping[int, ShardManifest]]) -> dict[int, int]:
        """Units of each shard, by the manifests of the sources; an estimate where an earlier stage is not finished."""
        made, expected = sources[0], self.expected
        return {index: made[index].rows if index in made else expected.get(index, 0) for index in indices}

    def make(self, worker: Worker, indices: Iterable[int] | None = None) -> int:
        """Make what is missing of the requested shards (or of `indices`); returns the units made."""
        return process_shards(self, worker, indices)

    # -- cutting and planning

    @property
    def images_per_shard(self) -> int:
        """Images that a full shard of a pool holds, or of a stage that reads one; the same for every attempt, so that
        ranges are.
        """
        pool = (*self.sources, self.folder)[0].config
        return pool["images_per_prompt"] * pool["prompts_per_shard"]

    def first_prompts(self, index: int) -> Sequence[str]:
        """Prompts of a shard, for the name of its run; none where they are not known."""
        return ()

    @property
    def work(self) -> str:
        """The kind of work: stages of one kind take the same time for an image."""
        return self.name

    @property
    def images_per_unit(self) -> int:
        """Images that go through the network for one unit."""
        return 1

    def comparable(self) -> Iterator[ShardManifest]:
        """Shards of other folders that took the same work, as far as the store has any."""
        return iter(())

    def probe(self) -> Probe | None:
        """What one image costs here, by a timed batch; None for work that needs no model."""
        return None

    def unit_bytes(self, size: ModelSize, image_bytes: float) -> float:
        """About how many bytes a unit takes in the store; an image takes `image_bytes`."""
        return self.row_bytes


def is_made_from(manifest: ShardManifest, index: int,
                 sources: Sequence[tuple[ShardFolder, Mapping[int, ShardManifest]]]) -> bool:
    """Whether a shard was made from what the sources' shards of the same index hold today."""
    return all(index in found for _, found in sources) and manifest.inputs == tuple(
        folder.input_shard(index, manifest=found[index]) for folder, found in sources)


def shards_like(store: Store, parent: str, **same: Any) -> Iterator[ShardManifest]:
    """A few shards of each folder in `parent` whose config has these values; unreadable ones are left out."""
    for name in store.list_folders(parent)[:FOLDERS_COMPARED]:
        folder = ShardFolder.open_if_readable(store, f"{parent}/{name}")
        if folder is not None and all(folder.config.get(key) == value for key, value in same.items()):
            yield from folder.manifests(range(SHARDS_COMPARED)).values()


def process_shards(stage: Stage, worker: Worker, indices: Iterable[int] | None = None) -> int:
    """Make what is missing of a stage, commit each shard as it finishes; returns the units made now.

    A shard is written, and the next ones are read, while one is computed. In memory are at most the rows of the shard
    in work, of those of the two batches ahead, of one that is being read, and what is written; one batch in work, two
    ahead, and two decoded images for each thread. Stopping loses at most the shard in work, a crash also the one being
    written. Where a batch does not fit into memory, its shard starts again with half of it. StoppedError after
    `worker.should_stop`; ConfigError when a single image does not fit.
    """
    requested = stage.indices if indices is None else list(indices)
    existing, sources = stage.look(requested)
    missing = [index for index in requested if index not in existing]
    if not missing:
        return 0
    units = stage.units(missing, sources)
    total, made = sum(units.values()), 0
    with stage.load(worker) as computer, Writer() as writer:
        while missing:
            with _read_ahead(stage, computer, worker, missing, sources) as shards:
                start = time.monotonic()
                for shard, batches in shards:
                    index = shard.index
                    if stage.is_costly and stage.is_requested(index, stage.folder.find(index)):
                        worker.progress(made + units[index], total, stage.unit)
                    else:
                        rows = _compute(stage, computer, shard, batches, worker, made, total)
                        if rows is None:
                            break
                        writer.start(functools.partial(
                            _commit, stage, worker, index, rows, inputs=shard.inputs,
                            device=device_name(worker.device), batch_size=computer.batch_size,
                            seconds=time.monotonic() - start, details=rows.details))
                    made += units[index]
                    missing = missing[missing.index(index) + 1:]
                    start = time.monotonic()
                else:
                    return made
            _halve_batch(stage, computer, worker)
    return made


class _Shard(NamedTuple):
    """What a shard is made from."""

    index: int
    tables: list[pa.Table]
    inputs: list[InputShard]


_END = object()
"""Follows the last batch of a shard, and stands for the first where there is none."""


@contextmanager
def _read_ahead(stage: Stage, computer: Computer, worker: Worker, indices: Sequence[int],
                sources: Sequence[Manifests]) -> Iterator[Iterator[tuple[_Shard, Iterator[Any]]]]:
    """Each shard with its batches, made beside the caller; costly ones are not begun before they are asked for."""
    def read() -> Generator[_Shard]:
        for index in filter(worker.claim, indices):
            shards = [(folder, found.get(index)) for folder, found in zip(stage.sources, sources, strict=True)]
            schemas = stage.read_schemas or (None,) * len(shards)
            yield _Shard(index, [folder.read(index, manifest=manifest, schema=schema)
                                 for (folder, manifest), schema in zip(shards, schemas, strict=True)],
                         [folder.input_shard(index, manifest=manifest) for folder, manifest in shards])

    def stream() -> Generator[Any]:
        with closing(read()) if stage.is_costly else ahead(read()) as shards:
            for shard in shards:
                batches = computer.batches(shard.index, shard.tables)
                yield shard, next(batches, _END)
                yield from batches
                yield _END

    def pairs(items: Iterator[Any]) -> Iterator[tuple[_Shard, Iterator[Any]]]:
        for shard, first in items:
            rest = takewhile(lambda batch: batch is not _END, items)
            yield shard, rest if first is _END else chain((first,), rest)
            deque(rest, maxlen=0)  # of a shard that was not made

    with closing(stream()) if stage.is_costly else ahead(stream(), _END, BATCHES_AHEAD) as items:
        yield pairs(items)


def prepare_batches(prepare: Callable[[S], T], items: Iterable[S], batch_size: int | None) -> Iterator[list[T]]:
    """`prepare` of each item, such as an encoded image, in threads; in batches."""
    prepared = thread_map(prepare, items)
    while batch := list(islice(prepared, batch_size)):
        yield batch


def _compute(stage: Stage, computer: Computer, shard: _Shard, batches: Iterator[Any], worker: Worker, made: int,
             total: int) -> ShardRows | None:
    """The shard's rows; None where memory runs out."""
    done = 0

    def advance(units: int) -> None:
        nonlocal done
        done += units
        worker.progress(made + done, total, stage.unit)

    def watched() -> Iterator[Any]:
        for batch in batches:
            worker.check_stop(stage.doing)
            yield batch

    try:
        return computer.compute(shard.index, shard.tables, watched(), worker, advance)
    except RuntimeError as error:
        if not is_out_of_memory(error) or computer.batch_size is None:
            raise
    return None  # what the error held on to is free from here on


def _halve_batch(stage: Stage, computer: Computer, worker: Worker) -> None:
    size, device = computer.batch_size, device_name(worker.device)
    assert size is not None
    if size == 1:
        raise ConfigError(f"{stage.title}: a single image does not fit into the memory of {device}: use a device that "
                          "nothing else uses, set target.dtype to bfloat16 or float16, or lower sampler.width and "
                          "sampler.height")
    computer.batch_size = size // 2
    logger.warning("%s: %d images do not fit into the memory of %s together: %d at a time from here on", stage.title,
                   size, device, size // 2)
    free_memory()


def _commit(stage: Stage, worker: Worker, index: int, rows: ShardRows, **facts: Any) -> None:
    if rows.rejected is not None and rows.rejected.num_rows:
        stage.folder.reject(f"shard-{index:05d}", rows.rejected)
    manifest = stage.folder.commit(index, rows.table, **facts)
    if not stage.is_requested(index, manifest):
        raise StorageError(f"shard {index} of {stage.folder.key} was taken at the same moment by a run with "
                           "other prompts: start this run again, it will plan around it")
    if worker.on_shard is not None:
        worker.on_shard(manifest)
