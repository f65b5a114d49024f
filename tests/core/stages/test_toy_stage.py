"""A stage registered from outside runs through runner, worker request, plan, resume and halving; nothing names it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa
import pytest
import torch

from hgdpo_core.config import PoolConfig, SamplerConfig, TargetConfig
from hgdpo_core.config.base import content_hash
from hgdpo_core.errors import ConfigError, StoppedError
from hgdpo_core.execution.jobs import ShardRequest, cut, run_name, run_shards, write_recipe
from hgdpo_core.execution.runner import IN_PROCESS
from hgdpo_core.images import decode_image
from hgdpo_core.models import find_model
from hgdpo_core.plan.planner import PlanningRunner
from hgdpo_core.run import open_run
from hgdpo_core.stages import STAGES, Stage
from hgdpo_core.stages.base import Computer, Probe, ShardRows, Worker
from hgdpo_core.stages.pool import plan_pool
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder

PROMPTS = ["a woman in a red top", "a man in a blue top", "a girl with black hair waves"]


@dataclass(frozen=True)
class BrightnessStage(Stage):
    """The mean of each image of a pool."""

    name: ClassVar[str] = "brightness"
    doing: ClassVar[str] = "measuring brightness"
    reads: ClassVar[tuple[str, ...]] = ("pool",)
    row_bytes: ClassVar[float] = 4.0
    expected: ClassVar[Mapping[int, int]] = {0: 2, 1: 2, 2: 2}
    memory: ClassVar[int] = 100
    """Images that fit into memory together."""

    pool: ShardFolder
    folder: ShardFolder
    requested: tuple[int, ...]
    title: str = "brightness"

    @classmethod
    def of(cls, pool: ShardFolder, indices: Sequence[int]) -> Self:
        settings = {"stage": "brightness", "pool": pool.key}
        folder = ShardFolder.create(pool.store, f"brightness/{content_hash(settings)}", settings)
        return cls(pool, folder, tuple(indices))

    def recipe(self, *, copy_to_store: bool = False) -> dict[str, Any]:
        return {"scale": 2.0}

    @classmethod
    def open(cls, folder: ShardFolder, recipe: Mapping[str, Any], indices: Sequence[int]) -> Self:
        assert recipe == {"scale": 2.0}
        return cls(ShardFolder.open(folder.store, folder.config["pool"]), folder, tuple(indices))

    @contextmanager
    def load(self, worker: Worker) -> Iterator["Brightness"]:
        yield Brightness()

    def probe(self) -> Probe:
        return Probe(0.25)


class Brightness(Computer):
    batch_size: int | None = 2

    def compute(self, index: int, tables: Sequence[pa.Table], batches: Iterator[Any], worker: Worker,
                advance: Callable[[int], None]) -> ShardRows:
        worker.check_stop(BrightnessStage.doing)
        assert self.batch_size is not None
        if self.batch_size > BrightnessStage.memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        means = [float(np.asarray(decode_image(data)).mean()) for data in tables[0]["image"].to_pylist()]
        advance(len(means))
        return ShardRows(pa.table({"mean": means}))


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(STAGES, "brightness", BrightnessStage)


@pytest.fixture(scope="module")
def pool(tmp_path_factory, target_folder):
    model = find_model(TargetConfig(source=str(target_folder), dtype="float32"))
    plan = plan_pool(Store(str(tmp_path_factory.mktemp("root"))), model, SamplerConfig(width=32, height=32, steps=1),
                     PoolConfig(images_per_prompt=2, prompts_per_shard=1), PROMPTS)
    plan.make(Worker())
    return plan


@pytest.fixture
def stage(pool, tmp_path):
    made = BrightnessStage.of(pool.folder, pool.indices)
    for path in pool.folder.store.local_path(made.folder.key).glob("shard-*"):
        path.unlink()
    return made


def test_the_runner_makes_it_and_finds_it_again(stage, pool):
    seen = []

    @contextmanager
    def on(title):
        yield lambda *at: seen.append((title, *at))

    assert IN_PROCESS.make([stage], on) == [3] and IN_PROCESS.make([stage], on) == [0]
    assert seen == [("brightness", done, 6, "images") for done in (2, 4, 6)]
    expected = np.asarray(decode_image(pool.folder.read(1)["image"][0].as_py())).mean()
    assert stage.folder.read(1)["mean"][0].as_py() == pytest.approx(expected)


def test_a_worker_makes_ranges_by_their_requests_and_a_stopped_one_goes_on(stage):
    write_recipe(stage)
    first, second = (ShardRequest.model_validate_json(request.model_dump_json())
                     for request in cut(stage, stage.find_missing(), 4))
    assert (first.shards, second.shards, run_name(stage, first)) == ("0-1", "2", "brightness 0-1")
    answers = iter([False, True])
    with pytest.raises(StoppedError, match="stopped while measuring brightness; finished shards are kept"):
        run_shards(first, should_stop=lambda: next(answers))
    assert stage.find_missing() == [1, 2]
    assert run_shards(first) == 2 and run_shards(second) == 2 and stage.find_missing() == []
    with pytest.raises(ConfigError, match="there is no stage 'darkness'"):
        run_shards(first.model_copy(update={"stage": "darkness"}))


def test_it_halves_its_batch_where_memory_runs_out(stage, monkeypatch, caplog):
    monkeypatch.setattr(BrightnessStage, "memory", 1)
    assert stage.make(Worker("cpu")) == 6
    assert {manifest.batch_size for manifest in stage.folder.manifests().values()} == {1}
    assert [record.message for record in caplog.records] == [
        "brightness: 2 images do not fit into the memory of cpu together: 1 at a time from here on"]


def test_an_image_that_does_not_fit_is_one_clear_line(stage, monkeypatch):
    monkeypatch.setattr(BrightnessStage, "memory", 0)
    with pytest.raises(ConfigError, match="brightness: a single image does not fit into the memory of cpu"):
        stage.make(Worker("cpu"))


def test_a_changed_source_makes_it_missing_again(stage, pool):
    stage.make(Worker("cpu"))
    manifest = pool.folder.manifests()[2]
    changed = {index: found for index, found in pool.folder.manifests().items() if index != 2}
    changed[2] = manifest.model_copy(update={"sha256": "0" * 64})
    existing, sources = stage.look()
    assert set(existing) == {0, 1, 2} and sources[0].keys() == {0, 1, 2}
    assert not stage._is_made(2, existing[2], [changed])


def test_the_plan_counts_times_and_sizes_it(stage, target_folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("a person\n")
    (tmp_path / "other.txt").write_text("someone else\n")
    run = open_run("figures", str(tmp_path / "root"), prompts=str(tmp_path / "prompts.txt"), dry=True,
                   overrides={"evaluation.prompts": {"source": str(tmp_path / "other.txt")}, "images": None})
    runner = PlanningRunner(run, with_probe=True)
    assert runner.make([stage]) == [3]
    row, = runner.stages
    assert (row.stage, row.unit, row.total, row.missing, row.missing_shards) == ("brightness", "images", 6, 6, 3)
    assert row.seconds == 1.5 and row.folder == stage.folder.key and row.bytes_missing > 24
    stage.make(Worker("cpu"))
    assert runner.make([stage]) == [0] and runner.stages[1].missing == 0 and runner.stages[1].bytes_found > 0
