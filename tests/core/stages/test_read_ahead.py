"""The next shard and the next batch are made while one is computed: bounded, in order, and nothing else changes."""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyarrow as pa
import pytest
import torch

from hgdpo_core.errors import InputError, StoppedError
from hgdpo_core.stages.base import Computer, ShardRows, Stage, Worker, prepare_batches
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder

SHARDS, ROWS, BATCH = 6, 10, 4


@dataclass
class Doubling(Computer):
    """Doubles numbers, and records when each batch is made and computed."""

    batch_size: int | None = BATCH
    events: list[str] = field(default_factory=list)
    memory: int = BATCH
    broken: int | None = None
    most_tables: int = 0
    tables: int = 0
    second_shard: threading.Event = field(default_factory=threading.Event)
    next_batch: dict[tuple[int, int], threading.Event] = field(default_factory=dict)

    def made(self, index: int, batch: int) -> threading.Event:
        return self.next_batch.setdefault((index, batch), threading.Event())

    def batches(self, index: int, tables: Sequence[pa.Table]) -> Iterator[list[int]]:
        self.events.append(f"open {index}")
        for number, batch in enumerate(prepare_batches(self.prepare, tables[0]["number"].to_pylist(),
                                                       self.batch_size)):
            self.events.append(f"made {index} {number}")
            self.made(index, number).set()
            yield batch

    def prepare(self, number: int) -> int:
        if number == self.broken:
            raise InputError(f"{number} is broken")
        return 2 * number

    def compute(self, index: int, tables: Sequence[pa.Table], batches: Iterator[Any], worker: Worker,
                advance: Any) -> ShardRows:
        values: list[int] = []
        for number, batch in enumerate(batches):
            self.events.append(f"take {index} {number}")
            if len(batch) > self.memory:
                raise torch.OutOfMemoryError("CUDA out of memory")
            values += batch
            advance(len(batch))
            self.events.append(f"done {index} {number}")
        return ShardRows(pa.table({"double": values}))


@dataclass(frozen=True)
class DoublingStage(Stage):
    name: ClassVar[str] = "doubling"
    doing: ClassVar[str] = "doubling"
    reads: ClassVar[tuple[str, ...]] = ("numbers",)
    expected: ClassVar[Mapping[int, int]] = {}

    numbers: ShardFolder
    folder: ShardFolder
    computer: Computer
    requested: tuple[int, ...] = tuple(range(SHARDS))
    title: str = "doubling"

    def recipe(self, *, copy_to_store: bool = False) -> dict[str, Any]:
        return {}

    @classmethod
    def open(cls, folder: ShardFolder, recipe: Mapping[str, Any], indices: Sequence[int]) -> "DoublingStage":
        raise AssertionError("it is made where it is planned, and never opened from its recipe")

    def load(self, worker: Worker) -> Any:
        return nullcontext(self.computer)


@pytest.fixture
def stage(tmp_path):
    store = Store(str(tmp_path))
    numbers = ShardFolder.create(store, "numbers", {"stage": "numbers"})
    for index in range(SHARDS):
        numbers.commit(index, pa.table({"number": range(index * ROWS, (index + 1) * ROWS)}))
    return DoublingStage(numbers, ShardFolder.create(store, "doubling", {"stage": "doubling"}), Doubling())


def made(stage) -> dict[int, list[int]]:
    return {index: stage.folder.read(index)["double"].to_pylist() for index in stage.folder.manifests()}


EXPECTED = {index: [2 * number for number in range(index * ROWS, (index + 1) * ROWS)] for index in range(SHARDS)}


def test_the_next_batch_and_the_next_shard_are_made_while_one_is_computed(stage, monkeypatch):
    """Each batch waits for the next one, of the next shard too: made one after the other, it would wait for ever."""
    computer = stage.computer
    compute = Doubling.compute

    def waiting(self, index, tables, batches, worker, advance):
        def watched():
            for number, batch in enumerate(batches):
                last = number == (ROWS - 1) // BATCH
                if (index, last) != (SHARDS - 1, True):
                    assert computer.made(index + 1 if last else index, 0 if last else number + 1).wait(30)
                yield batch
        return compute(self, index, tables, watched(), worker, advance)

    monkeypatch.setattr(Doubling, "compute", waiting)
    assert stage.make(Worker("cpu")) == SHARDS * ROWS and made(stage) == EXPECTED


def test_two_batches_are_ahead_and_three_shards(stage, monkeypatch):
    held, most, read = 0, [], ShardFolder.read

    def reading(self, *arguments, **options):
        nonlocal held
        if self.key == "numbers":
            held += 1
            most.append(held)
        return read(self, *arguments, **options)

    def finished(manifest):
        nonlocal held
        held -= 1

    def slow(done, total, unit):
        time.sleep(0.005)

    monkeypatch.setattr(ShardFolder, "read", reading)
    assert stage.make(Worker("cpu", progress=slow, on_shard=finished)) == SHARDS * ROWS
    assert max(most) <= 5 and len(most) == SHARDS  # in work, three ahead, and one that is being written
    ahead = 0
    for event in stage.computer.events:
        ahead += event.startswith("made") - event.startswith("done")
        assert ahead <= 3  # in work, and two ahead


def test_a_batch_that_does_not_fit_starts_its_shard_again_with_half(stage):
    stage.computer.memory = 1
    done = []
    assert stage.make(Worker("cpu", progress=lambda *at: done.append(at[0]))) == SHARDS * ROWS
    assert made(stage) == EXPECTED and done == list(range(1, SHARDS * ROWS + 1))
    assert {manifest.batch_size for manifest in stage.folder.manifests().values()} == {1}


def test_a_batch_that_stops_fitting_leaves_finished_shards_alone(stage, monkeypatch):
    compute, calls = Doubling.compute, []

    def shrinking(self, index, *arguments):
        calls.append(index)
        self.memory = 2 if index >= 3 else BATCH
        return compute(self, index, *arguments)

    monkeypatch.setattr(Doubling, "compute", shrinking)
    assert stage.make(Worker("cpu")) == SHARDS * ROWS
    assert made(stage) == EXPECTED and calls == [0, 1, 2, 3, 3, 4, 5]
    assert [stage.folder.find(index).batch_size for index in range(SHARDS)] == [4, 4, 4, 2, 2, 2]


def test_a_stop_ends_what_is_ahead_and_keeps_finished_shards(stage):
    threads, done = threading.active_count(), []
    with pytest.raises(StoppedError, match="stopped while doubling; finished shards are kept"):
        stage.make(Worker("cpu", progress=lambda *at: done.append(at[0]), should_stop=lambda: len(done) >= 4))
    assert done == [4, 8, 10, 14] and list(made(stage)) == [0]
    assert threading.active_count() <= threads + 2  # those that decode stay
    assert not [thread for thread in threading.enumerate() if thread.name in ("ahead", "writer")]
    assert stage.make(Worker("cpu")) == (SHARDS - 1) * ROWS and made(stage) == EXPECTED


def test_an_error_ahead_comes_after_the_shards_before_it(stage):
    stage.computer.broken = 2 * ROWS + 5
    with pytest.raises(InputError, match="25 is broken"):
        stage.make(Worker("cpu"))
    assert list(made(stage)) == [0, 1]


def test_a_broken_shard_ahead_is_reported_after_the_shards_before_it(stage):
    path = stage.numbers.store.local_path(f"numbers/{stage.numbers.find(2).file}")
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(Exception, match="both were moved to quarantine"):
        stage.make(Worker("cpu"))
    assert list(made(stage)) == [0, 1]
