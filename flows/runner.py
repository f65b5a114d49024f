"""Where shards and models are made: on this machine, or on workers as flow runs of their deployments."""

import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Literal

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import WorkerStatus
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger
from prefect.runtime import deployment, flow_run

from flows.children import Job, run_jobs
from hgdpo_core.config import WorkersConfig
from hgdpo_core.config.base import content_hash
from hgdpo_core.errors import ConfigError
from hgdpo_core.execution.jobs import ShardRequest, cut, run_name, write_recipe
from hgdpo_core.execution.processes import local_runner
from hgdpo_core.execution.runner import InProcess, Runner, make_here
from hgdpo_core.progress import Progress, ShouldStop, StageProgress, count_of, silent_stages
from hgdpo_core.stages import Stage
from hgdpo_core.storage import Store
from hgdpo_core.training.request import TrainRequest, find_result
from hgdpo_core.training.tune import Tuned
from tasks.ui import LiveTable

ShardRunnerName = Literal["auto", "in_process", "deployment"]
SHARD_DEPLOYMENT, TRAIN_DEPLOYMENT = "hgdpo-shard/shard", "hgdpo-train/train"
SHARD_POOL = "hgdpo-gpu"
COUNT_SECONDS = 15.0


def choose_runner(name: ShardRunnerName, workers: WorkersConfig, store: Store, should_stop: ShouldStop) -> Runner:
    """`auto` is the deployment when this run was started from one, else all GPUs of this machine."""
    if name == "in_process":
        return InProcess(should_stop)
    if name == "auto" and deployment.id is None:
        return local_runner(should_stop)
    return DeploymentRunner(workers, store, should_stop)


class DeploymentRunner:
    """Makes shards as flow runs on workers."""

    def __init__(self, workers: WorkersConfig, store: Store, should_stop: ShouldStop):
        self.workers, self._should_stop = workers, should_stop
        self.copy_to_store = store.local_path("") is None
        check_workers(store)

    def make(self, stages: Sequence[Stage], on: StageProgress = silent_stages) -> list[int]:
        """Cut the stages into ranges, run each as a flow run, wait for all. ShardRunsError names those that failed.

        What needs no model is made here.
        """
        missing = [stage.find_missing() for stage in stages]
        for stage in stages:
            if not stage.runs_on_workers:
                make_here(stage, on, self._should_stop)
        work = [(stage, lacking) for stage, lacking in zip(stages, missing, strict=True)
                if lacking and stage.runs_on_workers]
        if work:
            self._make_on_workers(work, on)
        return [len(lacking) for lacking in missing]

    def _make_on_workers(self, work: Sequence[tuple[Stage, list[int]]], on: StageProgress) -> None:
        jobs: list[Job] = []
        for stage, missing in work:
            write_recipe(stage, copy_to_store=self.copy_to_store)
            requests = self._cut(stage, missing)
            jobs += [_job(stage, request) for request in requests]
            get_run_logger().info("%s: %s of %s, in %s", stage.title, count_of(len(missing), "missing shard"),
                                  stage.folder.key, count_of(len(requests), "shard run"))
        folders = ", ".join(stage.folder.key for stage, _ in work)
        table = LiveTable(f"{work[0][0].name}-shard-runs", f"Shard runs of {folders}")
        with ExitStack() as stack:
            counters = [_Counter(stage, missing, stack.enter_context(on(stage.title))) for stage, missing in work]

            def show(jobs: Sequence[Job]) -> None:
                table.show([job.row() for job in jobs])
                for counter in counters:
                    counter.count(final=not any(job.live for job in jobs))

            run_jobs(jobs, self.workers, should_stop=self._should_stop, on_change=show)
        table.show([job.row() for job in jobs], at_once=True)

    def _cut(self, stage: Stage, missing: Sequence[int]) -> list[ShardRequest]:
        least = getattr(self.workers, stage.least_runs) if stage.least_runs else 1
        return cut(stage, missing, getattr(self.workers, stage.images_per_run), least_runs=least)

    def train(self, request: TrainRequest, progress: Progress) -> Tuned:
        """Train as a flow run of `hgdpo-train/train`; its steps are shown by that run."""
        existing = find_result(request)
        if existing is not None:
            return existing
        parameters = request.model_dump(mode="json")
        work_id = f"{request.kind}-{content_hash(parameters)}"
        name = f"{request.kind} {request.latents.split('/')[1]}"
        job = Job(name=name, deployment=TRAIN_DEPLOYMENT, request=parameters, tags=[request.kind],
                  tag=f"train:{work_id}", key=f"{flow_run.id}:{work_id}",
                  is_done=lambda: find_result(request) is not None)
        get_run_logger().info("%s: training as a flow run of %s", request.kind, TRAIN_DEPLOYMENT)
        run_jobs([job], self.workers, should_stop=self._should_stop, on_change=lambda jobs: None)
        progress(1, 1, "training")
        tuned = find_result(request)
        assert tuned is not None  # run_jobs saw it
        return replace(tuned, existing=False)


def _job(stage: Stage, request: ShardRequest) -> Job:
    parameters = request.model_dump(mode="json")
    # The hash keeps a parent that was started again by newer code from getting its old runs back.
    key = f"{flow_run.id}:{request.folder_id}:{request.indices[0]}:{content_hash(parameters, 8)}"
    return Job(name=run_name(stage, request), deployment=SHARD_DEPLOYMENT, request=parameters, tags=[request.stage],
               tag=request.tag, key=key, is_done=lambda: not stage.find_missing(request.indices))


class _Counter:
    """Progress of shard runs, by counting manifests in the folder now and then."""

    def __init__(self, stage: Stage, missing: Sequence[int], progress: Progress):
        self._folder, self._missing, self._progress, self._counted_at = stage.folder, set(missing), progress, 0.0

    def count(self, *, final: bool) -> None:
        if final or time.monotonic() - self._counted_at > COUNT_SECONDS:
            self._counted_at = time.monotonic()
            self._progress(len(self._missing & self._folder.listed()), len(self._missing), "shards")


def check_workers(store: Store) -> None:
    """ConfigError when the root is a folder of this machine and workers of other machines are online.

    A worker's name ends with its machine, `<anything>@<host>`, as `make up` and docs/OPERATIONS.md have it. Without any
    worker a warning says how to start one; the run waits for it.
    """
    with get_client(sync_client=True) as client:
        try:
            workers = client.read_workers_for_work_pool(SHARD_POOL)
        except ObjectNotFound:
            return  # no pool, no workers: the missing deployment is reported when shards are needed
    online = [worker.name for worker in workers if worker.status == WorkerStatus.ONLINE]
    if not online:
        get_run_logger().warning("No worker of the pool %s is online: this run waits until one starts (`make up`, or "
                                 "prefect worker start --pool %s --limit 1)", SHARD_POOL, SHARD_POOL)
    hosts = sorted({name.rpartition("@")[2] for name in online if "@" in name} - {socket.gethostname()})
    if hosts and store.local_path("") is not None:
        raise ConfigError(f"the root {store.root} is a folder of this machine ({socket.gethostname()}), but workers of "
                          f"{', '.join(hosts)} are online and cannot see it: use a root that all of them reach, such "
                          "as s3://bucket/folder")
