"""Who makes the shards, and when a folder as root will not do."""

import logging
import socket
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from prefect.client.schemas.objects import WorkerStatus
from prefect.exceptions import ObjectNotFound

from flows import runner
from flows.children import Job
from flows.runner import DeploymentRunner, check_workers, choose_runner
from hgdpo_core.config import PoolConfig, SamplerConfig, TargetConfig, WorkersConfig
from hgdpo_core.errors import ConfigError
from hgdpo_core.execution.jobs import ShardRequest, run_shards
from hgdpo_core.execution.processes import LocalProcesses
from hgdpo_core.execution.runner import InProcess
from hgdpo_core.models import find_model
from hgdpo_core.progress import never_stop
from hgdpo_core.stages.pool import plan_pool
from hgdpo_core.storage import Store

HERE = socket.gethostname()


@pytest.fixture
def workers(monkeypatch):
    """Names of workers that are online; None: there is no such pool."""
    names = []

    def read(pool):
        if None in names:
            raise ObjectNotFound(RuntimeError("404"))
        return [SimpleNamespace(name=name, status=WorkerStatus.ONLINE) for name in names] + [
            SimpleNamespace(name="gpu-9@gone", status=WorkerStatus.OFFLINE)]

    class Client:
        read_workers_for_work_pool = staticmethod(read)
        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *_: None  # noqa: E731

    monkeypatch.setattr(runner, "get_client", lambda sync_client: Client())
    monkeypatch.setattr(runner, "get_run_logger", lambda: logging.getLogger("test"))
    return names


@pytest.mark.parametrize(("name", "deployed", "here"), [
    ("auto", None, True), ("auto", "id", False), ("in_process", "id", True), ("deployment", None, False)])
def test_auto_is_the_deployment_for_a_run_that_was_started_from_one(workers, monkeypatch, tmp_path, name, deployed,
                                                                  here):
    monkeypatch.setattr(runner, "deployment", SimpleNamespace(id=deployed))
    chosen = choose_runner(name, WorkersConfig(), Store(str(tmp_path)), never_stop)
    assert isinstance(chosen, InProcess if here else DeploymentRunner)
    assert not chosen.copy_to_store  # a folder: all workers are on this machine


def test_a_run_of_this_machine_takes_all_its_gpus(monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "deployment", SimpleNamespace(id=None))
    monkeypatch.setenv("HGDPO_DEVICE", "cpu")
    monkeypatch.setenv("HGDPO_PROCESSES", "2")
    chosen = choose_runner("auto", WorkersConfig(), Store(str(tmp_path)), never_stop)
    assert isinstance(chosen, LocalProcesses) and chosen.processes == 2
    assert isinstance(choose_runner("in_process", WorkersConfig(), Store(str(tmp_path)), never_stop), InProcess)


def test_models_are_shared_where_workers_may_be_elsewhere(workers):
    assert DeploymentRunner(WorkersConfig(), Store("memory://bucket"), never_stop).copy_to_store


def test_a_folder_as_root_is_refused_when_workers_of_other_machines_are_online(workers, tmp_path, caplog):
    check_workers(Store(str(tmp_path)))
    assert "No worker of the pool hgdpo-gpu is online" in caplog.text
    workers += [f"gpu-0@{HERE}", "a name without a machine"]
    check_workers(Store(str(tmp_path)))
    workers.append("gpu-0@elsewhere")
    with pytest.raises(ConfigError, match="workers of elsewhere are online and cannot see it"):
        check_workers(Store(str(tmp_path)))
    check_workers(Store("memory://bucket"))
    workers.append(None)
    check_workers(Store(str(tmp_path)))


def test_works_become_one_job_a_range_and_their_shards_are_counted(workers, monkeypatch, tmp_path, target_folder):
    model = find_model(TargetConfig(source=str(target_folder), dtype="float32"))
    pool = PoolConfig(images_per_prompt=2, prompts_per_shard=1, batch_size=2)
    jobs_seen, shown, counted = [], [], {}

    def offered():
        """Three prompts, and the first of them by other settings."""
        store = Store(str(tmp_path))
        return [plan_pool(store, model, SamplerConfig(width=32, height=32, steps=steps), pool, prompts).titled(title)
                for title, steps, prompts in (("target", 1, ["a", "b", "c"]), ("tuned", 2, ["a"]))]

    def run_jobs(jobs, workers, *, should_stop, on_change):
        assert workers is settings
        jobs_seen.extend(jobs)
        for job in jobs:
            assert not job.is_done()
            run_shards(ShardRequest.model_validate(job.request))
            job.done = job.is_done()
            on_change(jobs)

    @contextmanager
    def stages(title):
        yield lambda *at: counted.update({title: at})

    monkeypatch.setattr(runner, "run_jobs", run_jobs)
    monkeypatch.setattr(runner, "flow_run", SimpleNamespace(id="parent"))
    monkeypatch.setattr(runner, "LiveTable", lambda key, description: SimpleNamespace(
        show=lambda rows, at_once=False: shown.append((key, rows))))
    settings = WorkersConfig(draw_images_per_run=4)
    make = DeploymentRunner(settings, Store(str(tmp_path)), never_stop).make
    works = offered()
    make(works, stages)
    pool_id = works[0].folder.key.removeprefix("pools/")
    first, second, third = jobs_seen
    assert isinstance(first, Job) and first.done and second.done and third.done
    assert first.tag == f"shard:{pool_id}:0" and second.tag == f"shard:{pool_id}:2"
    assert first.key.startswith(f"parent:{pool_id}:0:") and first.tags == ["pool"]
    assert [job.name for job in jobs_seen] == ["target 0-1: a to b", "target 2: c", "tuned 0: a"]
    assert counted == {"target": (3, 3, "shards"), "tuned": (1, 1, "shards")}
    assert shown[-1][0] == "pool-shard-runs" and [row["work"] for row in shown[-1][1]] == ["done"] * 3
    make(offered(), stages)
    assert len(jobs_seen) == 3  # nothing is missing: no run starts


def test_few_images_are_spread_over_several_runs(workers, monkeypatch, tmp_path, target_folder):
    model = find_model(TargetConfig(source=str(target_folder), dtype="float32"))
    plan = plan_pool(Store(str(tmp_path)), model, SamplerConfig(width=32, height=32, steps=1),
                     PoolConfig(images_per_prompt=2, prompts_per_shard=1), ["a", "b", "c"])
    names = []
    monkeypatch.setattr(runner, "run_jobs", lambda jobs, *_, **__: names.append([job.name for job in jobs]))
    monkeypatch.setattr(runner, "flow_run", SimpleNamespace(id="parent"))
    monkeypatch.setattr(runner, "LiveTable", lambda *_: SimpleNamespace(show=lambda rows, at_once: None))
    for runs in (1, 2):
        settings = WorkersConfig(draw_images_per_run=100, least_draw_runs=runs)
        DeploymentRunner(settings, plan.folder.store, never_stop).make([plan])
    assert names == [["pool 0-2: a to c"], ["pool 0-1: a to b", "pool 2: c"]]
