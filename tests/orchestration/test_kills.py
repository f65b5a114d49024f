"""Kills at random points: whatever dies, the rows are those of an undisturbed run and no committed shard is made again.

Without Prefect in seconds. With it slow: a run that lost its worker too is noticed by its missing heartbeats, which
takes more than a minute each time.
"""

import contextlib
import logging
import multiprocessing
import os
import random
import signal
import time
from datetime import datetime
from pathlib import Path

import live
import psutil
import pytest
import slow_writer

from deployments import local
from hgdpo_core.config import PoolConfig, SamplerConfig, TargetConfig
from hgdpo_core.execution.jobs import ShardRequest, cut, run_shards, write_recipe
from hgdpo_core.models import find_model
from hgdpo_core.prompts import prompt_id
from hgdpo_core.stages.pool import plan_pool
from hgdpo_core.storage import Store

log = logging.getLogger(__name__)
KILLS = int(os.environ.get("HGDPO_TEST_KILLS", "20"))
SEED = int(os.environ.get("HGDPO_TEST_SEED", "0"))
SILENT_SECONDS = 90  # Prefect's heartbeats come every 30 s at most
SUPERVISOR_SECONDS = 60  # what a supervisor waits after SIGTERM before it kills
PROMPTS = [f"a woman in a red top, number {i}" for i in range(24)]
WHAT = ["shard", "worker", "both", "pending", "parent", "terminate worker", "cancel parent", "two writers",
        "everything", "server"]


# -- without Prefect


def test_killed_writers_and_two_at_once_change_nothing(target_folder, tmp_path, monkeypatch):
    model = find_model(TargetConfig(source=str(target_folder), dtype="float32"))
    prompts = [f"a woman in a red top, number {i}" for i in range(10)]
    pool = PoolConfig(images_per_prompt=3, prompts_per_shard=1, batch_size=2)

    def planned(root):
        store = Store(str(tmp_path / root))
        stage = plan_pool(store, model, SamplerConfig(width=32, height=32, steps=1), pool, prompts)
        write_recipe(stage)
        return store, stage, cut(stage, stage.find_missing())[0]

    undisturbed, _, request = planned("undisturbed")
    run_shards(request)
    store, stage, request = planned("killed")
    request, begun = request.model_dump(mode="json"), tmp_path / "begun.log"
    chance, kills, seen = random.Random(SEED), 0, {}
    # Imported once, in a process without threads that forks the writers; it knows no path but the environment's.
    monkeypatch.setenv("PYTHONPATH", f"{local.ROOT}{os.pathsep}{Path(live.__file__).parent}")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["slow_writer"])
    for _ in range(30):
        writers = [context.Process(target=slow_writer.make_slowly, args=(request, str(begun)))
                   for _ in range(1 + kills % 2)]
        before = _begun(begun)
        for writer in writers:
            writer.start()
        while _begun(begun) == before and any(writer.is_alive() for writer in writers):
            time.sleep(0.01)
        if kills < 6:
            time.sleep(chance.uniform(0, 0.2))
            for writer in writers:
                kills += writer.is_alive()
                writer.kill()
        for writer in writers:
            writer.join()
            assert writer.exitcode in (0, -signal.SIGKILL)
        seen = check_nothing_changed(store, seen)
        if not stage.find_missing():
            break
    assert kills >= 3
    assert live.row_hashes(store) == live.row_hashes(undisturbed)
    assert_no_committed_shard_was_begun_again(_begun(begun), store, prompts, "n3")


def _begun(log):
    lines = [line.partition(" ") for line in log.read_text().splitlines()] if log.exists() else []
    return [(float(begun), prompt) for begun, _, prompt in lines]


# -- with a server and workers


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    environment = {"XDG_CACHE_HOME": str(folder / "cache"), "HGDPO_TEST_SLOW": "0.3"}
    with live.live(folder, environment, silent_seconds=SILENT_SECONDS, pending_seconds=SILENT_SECONDS) as running:
        yield running


@pytest.fixture(scope="module")
def parameters(tmp_path_factory):
    return live.small_run(tmp_path_factory.mktemp("user"), PROMPTS, 4, **{
        "pool.images_per_prompt": 4, "workers.draw_images_per_run": 12, "workers.max_failed_shards": 99,
        "workers.pending_seconds": 3 * SILENT_SECONDS})


def worker_processes(workers, pool="hgdpo-gpu"):
    found = []
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
            ours = process.environ().get("PREFECT_HOME") == str(workers.local.home)
            if "worker" in command and pool in command and "keep-alive" not in command and ours:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def kill(process, how=signal.SIGKILL):
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(how)


def strike(workers, what, parent, running, chance):
    """Do it, and put back the server as a person would. Workers come back by themselves, runs are never touched."""
    if what == "two writers":   # the second one is this process; it is faster, and the worker yields to it
        run_shards(ShardRequest.model_validate(running["parameters"]["request"]))
    if what == "pending":
        kill_with_pending_run(workers, parent)
    process = workers.process_of(running["id"])
    hit = chance.choice(workers.until("a worker", lambda: worker_processes(workers)))
    if what in ("shard", "both", "everything") and process is not None:
        kill(process)
    if what in ("both", "everything"):  # whichever worker it was: both, and all that they run
        for worker in worker_processes(workers):
            for child in worker.children(recursive=True):
                kill(child)
            kill(worker)
    if what == "worker":
        kill(hit)
    if what == "terminate worker":
        kill(hit, signal.SIGTERM)
        for worker in psutil.wait_procs([hit], timeout=SUPERVISOR_SECONDS)[1]:
            kill(worker)  # Prefect 3.8.8's lets its run finish and then may hang
    if what in ("parent", "everything") and (found := workers.process_of(parent)) is not None:
        kill(found)
    if what == "cancel parent":
        workers.cancel(parent)
    if what == "server":
        servers = [p for p in psutil.process_iter() if _is_server(p, workers)]
        for server in servers:
            kill(server)
        psutil.wait_procs(servers, timeout=60)
        time.sleep(SILENT_SECONDS + 10)  # longer than the window: live shards may be marked Crashed after it
        restart_server(workers)


def kill_with_pending_run(workers, parent):
    """The worker of a run that is not yet Running, and the process that it started for it."""
    def look():
        if workers.run(parent)["state_type"] in live.FINAL:
            return "none"
        runs = workers.children(parent)
        if not any(run["state_type"] in ("SCHEDULED", "PENDING") for run in runs):
            return "none"
        return next((run for run in runs if run["state_type"] == "PENDING"), None)

    pending = workers.until("a pending shard run, or none that waits", look)
    if pending == "none":
        return
    for worker in worker_processes(workers):
        with contextlib.suppress(psutil.NoSuchProcess):
            children = worker.children(recursive=True)
            if pending["id"] in map(_run_of, children):
                kill(worker)
                for child in children:
                    kill(child)


def _run_of(process):
    with contextlib.suppress(psutil.Error, OSError):
        return process.environ().get("PREFECT__FLOW_RUN_ID")


def _is_server(process, workers):
    try:
        return (process.environ().get("PREFECT_HOME") == str(workers.local.home)
                and {"server", "uvicorn"} & set(process.cmdline()) != set())
    except (psutil.Error, OSError):
        return False


def restart_server(workers):
    """The same server on the same port and data, as after a reboot of its machine."""
    port = workers.local.url.split(":")[2].split("/")[0]
    command = local.server_command(workers.local.database, int(port))
    local._spawn(command, local._environment(workers.local, workers.local.url), workers.local.home / "server.log")
    workers.until("the server again", lambda: local._healthy(workers.local.url))


def committed(store):
    return {key: store.read_json(key) for key, _, _ in store.walk("pools")
            if key.endswith(".json") and "/shard-" in key}


@pytest.mark.slow
def test_random_kills_change_nothing(workers, parameters, tmp_path):
    chance = random.Random(SEED)
    expected = live.row_hashes(live.run_undisturbed(parameters | {"root": str(tmp_path / "undisturbed")}))
    kills, rounds = 0, 0
    while kills < KILLS:
        rounds += 1
        there = parameters | {"root": str(tmp_path / f"root-{rounds}")}
        store = Store(there["root"])
        parent = workers.start("hgdpo/full", there)
        kills = kill_at_random(workers, parent, store, kills, chance)
        finish(workers, parent)
        assert_no_committed_shard_was_begun_again(workers.painted_at(), store, PROMPTS, "n4")
        assert live.row_hashes(store) == expected
        (workers.faults / "painted.log").unlink()


def kill_at_random(workers, parent, store, kills, chance):
    """Kill while the pool is made, until it is whole or enough was killed; returns the kills so far."""
    seen = {}
    while kills < KILLS and (running := a_running_shard(workers, parent)):
        time.sleep(chance.uniform(0, 8))
        seen = check_nothing_changed(store, seen)
        what = WHAT[kills % len(WHAT)]
        strike(workers, what, parent, running, chance)
        kills += 1
        log.info("kill %d: %s, after %d shards", kills, what, len(seen))
        revive(workers, parent)
    check_nothing_changed(store, seen)
    return kills


def a_running_shard(workers, parent):
    """A shard run of the training pool that runs, None when the parent ended or went on to other stages."""
    def look():
        runs = workers.children(parent)
        if workers.run(parent)["state_type"] in live.FINAL or any("score" in run["tags"] for run in runs):
            return "none"
        return next((run for run in runs if run["state_type"] == "RUNNING"), None)

    found = workers.until("a running shard or the end of the pool", look)
    return None if found == "none" else found


def check_nothing_changed(store, seen):
    now = committed(store)
    assert all(now[key] == manifest for key, manifest in seen.items())
    return now


def assert_no_committed_shard_was_begun_again(painted, store, prompts, pool):
    """`painted`: when which shard was begun, by its first prompt."""
    ends = {(key.split("/")[1][:2], manifest["details"]["prompt_ids"][0]):
            datetime.fromisoformat(manifest["created_at"]).timestamp() for key, manifest in committed(store).items()}
    for begun, prompt in painted:
        if prompt in prompts:  # both models generate held-out prompts
            assert begun <= ends[pool, prompt_id(prompt)] + 1, f"{prompt!r} was made again"


def revive(workers, parent):
    """What a person does in the UI: wait until nothing is live that is dead, press Retry on a parent that ended."""
    def settled():
        state = workers.run(parent)["state_type"]
        if state in live.FINAL:
            return True
        return any(c["state_type"] == "RUNNING" and workers.process_of(c["id"]) for c in workers.children(parent))

    workers.until("a live shard or an ended parent", settled)
    if workers.run(parent)["state_type"] in {"FAILED", "CRASHED", "CANCELLED"}:
        workers.retry(parent)


def finish(workers, parent):
    for _ in range(5):
        ended = workers.await_final(parent)
        if ended["state_type"] == "COMPLETED":
            return
        workers.retry(parent)
    raise AssertionError(f"the run does not complete: {ended['state']['message']}\n{workers.log_tails()}")
