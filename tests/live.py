"""A real Prefect server with real workers on tiny models, for tests of orchestration."""

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import tiny
import yaml

from benchmarks.postgres import postgres
from deployments.local import ROOT, Local, _environment, down, up
from hgdpo_core.execution.jobs import cut, write_recipe
from hgdpo_core.images import decode_image
from hgdpo_core.pipeline import run_all
from hgdpo_core.run import open_run
from hgdpo_core.stages.pool import plan_pool
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder

DATABASE = os.environ.get("HGDPO_TEST_DATABASE", "sqlite")
FIRST_PORT = 14200  # ports that a client's own end may get (from 32768) can connect to themselves
PATIENCE_SECONDS = 600  # without any progress: other work may share the machine, and nothing here measures time
LIMIT_SECONDS = 3600
WORK_SECONDS = 1.0  # of CPU that runs used: they get on, however slowly
FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
LIVE = ["SCHEDULED", "PENDING", "RUNNING", "CANCELLING"]
RECORD = re.compile(r"^(?=(?:[\d:.]+ \| )?(?:DEBUG|INFO|WARNING|ERROR|CRITICAL)\b[ :])", re.MULTILINE)
ERROR = re.compile(r"(?:[\d:.]+ \| )?(?:ERROR|CRITICAL)\b")
KNOWN_SERVER_ERRORS = {
    r"sqlite3\.OperationalError\S* database is locked":
        "SQLite refuses a write that meets another one. Clients send a request again, consumers take a message again, "
        "services come round again; what is lost for good fails the test that waits for it.",
    r"sqlalchemy\.exc\.TimeoutError: QueuePool limit":
        "The same seen earlier: all connections wait for a write. The server gives SQLite 15 and no setting for it.",
    r"dropping \d+ events.*NOT NULL constraint failed: events\.occurred":
        "Clients repeat events after a killed server; Prefect's SQLite store refuses a batch that it has as a whole, "
        "and drops these repetitions.",
    r"(worker_channel|WorkerChannel).*(WebSocketDisconnect|ClientDisconnected)":
        "The other end of a channel was killed, or tired of waiting: workers open a new one by themselves.",
}
"""Errors of the server that fail no test: what the record says, and why it does no harm."""


@dataclass
class Live:
    """A server with workers that is up, and the folder that tells its shards their faults."""

    local: Local
    faults: Path

    def __post_init__(self):
        self.http = httpx.Client(base_url=self.local.url, timeout=120)

    # -- the API, as the UI calls it

    def post(self, path: str, body: dict[str, Any]) -> Any:
        return self._send("POST", path, body).json()

    def patch(self, path: str, body: dict[str, Any]) -> None:
        self._send("PATCH", path, body)

    def _send(self, method: str, path: str, body: dict[str, Any]) -> httpx.Response:
        answer = patiently(lambda: self.http.request(method, path, json=body), lambda got: got.status_code < 500)
        assert answer.status_code < 300, answer.text
        return answer

    def start(self, deployment: str, parameters: dict[str, Any]) -> str:
        """The id of a new run of a deployment."""
        found = self.http.get(f"/deployments/name/{deployment}").json()
        return self.post(f"/deployments/{found['id']}/create_flow_run", {"parameters": parameters})["id"]

    def retry(self, run_id: str) -> None:
        """What the UI's Retry button sends."""
        state = {"type": "SCHEDULED", "name": "AwaitingRetry", "message": "Retry from the UI"}
        assert self.post(f"/flow_runs/{run_id}/set_state", {"state": state, "force": False})["status"] == "ACCEPT"

    def cancel(self, run_id: str) -> None:
        """What the UI's Cancel button sends."""
        state = {"type": "CANCELLING", "message": "Set from the UI"}
        self.post(f"/flow_runs/{run_id}/set_state", {"state": state, "force": False})

    def run(self, run_id: str) -> dict[str, Any]:
        return patiently(lambda: self.http.get(f"/flow_runs/{run_id}"), lambda got: got.status_code == 200).json()

    def runs(self, **expected: Any) -> list[dict[str, Any]]:
        """All runs that a filter of the API finds, oldest first."""
        return self.post("/flow_runs/filter", {"flow_runs": expected, "sort": "START_TIME_ASC", "limit": 200})

    def children(self, parent: str, *tags: str) -> list[dict[str, Any]]:
        more = {"tags": {"all_": list(tags)}} if tags else {}
        return self.runs(parent_flow_run_id={"any_": [parent]}, **more)

    def stored(self) -> str:
        """What the server stores and shows of deployments, runs and their logs, as one text."""
        kinds = ("deployments", "flow_runs", "logs")
        return json.dumps([self.post(f"/{kind}/filter", {"limit": 200}) for kind in kinds])

    # -- waiting

    def until(self, what: str, true: Callable[[], Any]) -> Any:
        """What `true` gives once it gives something. Waits as long as runs change state or work."""
        began = moved = time.monotonic()
        states, worked = None, 0.0
        while time.monotonic() < min(moved + PATIENCE_SECONDS, began + LIMIT_SECONDS):
            if value := true():
                return value
            self.check_server()
            now = [(run["id"], run["state_id"]) for run in self.runs()]
            used = self.seconds_worked()
            if now != states or abs(used - worked) > WORK_SECONDS:
                states, worked, moved = now, used, time.monotonic()
            time.sleep(0.5)
        raise AssertionError(f"never came: {what}\n{self.log_tails()}")

    def await_final(self, run_id: str) -> dict[str, Any]:
        return self.until(f"the end of {run_id}",
                          lambda: (found := self.run(run_id))["state_type"] in FINAL and found)

    def await_quiet(self, parent: str) -> list[dict[str, Any]]:
        """The parent's children, once none of them is live."""
        return self.until("the end of all children", lambda: (found := self.children(parent)) and all(
            child["state_type"] in FINAL for child in found) and found)

    def log_tails(self) -> str:
        """The end of every log, for a failed test."""
        return "\n".join(f"== {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-25:])
                         for log in sorted(self.local.home.glob("worker*.log")))

    def check_server(self) -> None:
        """AssertionError when the server's log has an error that is not one of the known ones."""
        unknown = unknown_errors((self.local.home / "server.log").read_text(errors="replace"))
        assert not unknown, "the server logged errors:\n" + "\n".join(unknown)

    # -- faults

    def fault(self, what: str, image: int, prompt: str) -> None:
        (self.faults / f"{what}-{image}").write_text(prompt)

    def release(self, what: str, image: int) -> None:
        (self.faults / f"{what}-{image}").unlink()

    def painted_at(self) -> list[tuple[float, str]]:
        """When which shard was begun, by its first prompt, in order."""
        log = self.faults / "painted.log"
        lines = [line.partition(" ") for line in log.read_text().splitlines()] if log.exists() else []
        return [(float(begun), prompt) for begun, _, prompt in lines]

    def painted(self) -> list[str]:
        """First prompts of the shards that were begun, in order."""
        return [prompt for _, prompt in self.painted_at()]

    def kill_with_worker(self, run_id: str) -> None:
        """Kill a run's worker and then all its processes, so that no end of the run is ever reported."""
        process = self.process_of(run_id)
        assert process is not None
        next(parent for parent in process.parents() if "worker" in parent.cmdline()).kill()
        for one in self.flow_processes(run_id):
            one.kill()

    def process_of(self, run_id: str) -> psutil.Process | None:
        """The process that runs a flow, None when there is none (any more)."""
        return next(self.flow_processes(run_id), None)

    def seconds_worked(self) -> float:
        """CPU seconds of all flow runs that live."""
        seconds = 0.0
        for process in self.flow_processes():
            with contextlib.suppress(psutil.Error):
                seconds += sum(process.cpu_times()[:2])
        return seconds

    def flow_processes(self, run_id: str | None = None) -> Iterator[psutil.Process]:
        """The living processes of this server's flow runs, or of one."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                environment = process.environ()
                found = environment.get("PREFECT__FLOW_RUN_ID")
                if (found is not None and run_id in (None, found)
                        and environment.get("PREFECT_HOME") == str(self.local.home)
                        and process.is_running() and process.status() != psutil.STATUS_ZOMBIE):
                    yield process


@contextlib.contextmanager
def live(folder: Path, environment: dict[str, str], *, secrets: Mapping[str, str] | None = None,
         cron: str | None = None, **settings: Any) -> Iterator[Live]:
    """A server, pools, deployments and workers below `folder`; all gone at the end.

    `secrets`: variables that runs get from Secret blocks, as docs/OPERATIONS.md says, and that workers do not have.
    `cron`: when the nightly run starts, once its schedule is on; else as shipped. HGDPO_TEST_DATABASE=postgres puts the
    server on a Postgres of its own.
    """
    with contextlib.ExitStack() as ends:
        if DATABASE == "postgres":
            settings["database"] = ends.enter_context(postgres())
        yield from _live(folder, environment, secrets, cron, settings)


def _live(folder: Path, environment: dict[str, str], secrets: Mapping[str, str] | None, cron: str | None,
          settings: dict[str, Any]) -> Iterator[Live]:
    deployments = folder / "prefect.yaml"
    shipped = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    faulty = next(one for one in shipped["deployments"] if one["name"] == "shard")
    faulty["entrypoint"] = "faulty_shard:hgdpo_shard"
    if cron:
        next(one for one in shipped["deployments"] if one["name"] == "nightly")["schedules"][0]["cron"] = cron
    blocks = {name: name.lower().replace("_", "-") for name in secrets or {}}
    if secrets:
        shipped["pull"].append({"deployments.steps.set_environment": {
            name: f"{{{{ prefect.blocks.secret.{block} }}}}" for name, block in blocks.items()}})
    deployments.write_text(yaml.safe_dump(shipped))
    faults = folder / "faults"
    faults.mkdir()
    local = Local(home=folder / "prefect", toml=folder / "prefect.toml", deployments=deployments, first_port=FIRST_PORT,
                  environment={"PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}", "OMP_NUM_THREADS": "1",
                               "HGDPO_TEST_FAULTS": str(faults), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1",
                               "PREFECT_WORKER_QUERY_SECONDS": "1", "PREFECT_API_REQUEST_TIMEOUT": "300",
                               **environment, **dict.fromkeys(secrets or {}, "")}, **settings)
    try:
        up(local)
        for name, block in blocks.items():
            _save_secret(local, block, (secrets or {})[name])
        running = Live(local, faults)
        yield running
        running.check_server()
    finally:
        down(local)


def unknown_errors(log: str) -> list[str]:
    """Records of a server's log from ERROR on, tracebacks included, without those of KNOWN_SERVER_ERRORS."""
    errors = [record.strip() for record in RECORD.split(log) if ERROR.match(record)]
    return [error for error in errors
            if not any(re.search(known, error, re.DOTALL) for known in KNOWN_SERVER_ERRORS)]


def small_run(location: Path, prompts: Sequence[str], held_out: int, **overrides: Any) -> dict[str, Any]:
    """Parameters of `hgdpo` for tiny models and prompts, written to `location`; a prompt is a shard of its own."""
    (location / "prompts.txt").write_text("\n".join(prompts) + "\n")
    (location / "held-out.txt").write_text("".join(f"a man in a blue top, number {i}\n" for i in range(held_out)))
    target, judge = tiny.save_target(location / "target"), tiny.save_judge(location / "judge")
    return {"target": str(target), "prompts": str(location / "prompts.txt"), "overrides": {
        "target.dtype": "float32", "scorer.source": str(judge),
        "evaluation.scorers": [{"name": "pickscore", "source": str(judge)}],
        "evaluation.prompts": {"source": str(location / "held-out.txt")}, "sampler.width": 32, "sampler.height": 32,
        "sampler.steps": 2, "pool.prompts_per_shard": 1, "dpo.max_steps": 2, "dpo.batch_size": 2,
        "dpo.learning_rate": 5e-2} | overrides}


def shard_requests(parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """Parameters of a `hgdpo-shard` run for each shard of the pool that `hgdpo` would make with these parameters."""
    run = open_run("figures", parameters["root"], prompts=parameters["prompts"], target=parameters["target"],
                   overrides=parameters["overrides"])
    pool = plan_pool(run.store, run.target, run.config.sampler, run.config.pool, run.prompts.prompts)
    write_recipe(pool)
    return [request.model_dump(mode="json") for request in cut(pool, pool.find_missing(), 1)]


def _save_secret(local: Local, block: str, value: str) -> None:
    code = f"import os; from prefect.blocks.system import Secret; Secret(value=os.environ['VALUE']).save('{block}')"
    environment = _environment(local, local.url) | {"VALUE": value}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)


# -- the same run without Prefect, to compare with


def run_undisturbed(parameters: dict[str, Any]) -> Store:
    """The whole method in this process, without Prefect; returns its store."""
    run = open_run("figures", parameters["root"], prompts=parameters["prompts"], target=parameters["target"],
                   overrides=parameters["overrides"])
    run_all(run)
    return run.store


def row_hashes(store: Store) -> dict[str, str]:
    """Folder -> hash of all its decoded rows; images count by their pixels."""
    folders = sorted({key.rpartition("/")[0] for key, _, _ in store.walk() if "/shard-" in key
                      and key.endswith(".json")})
    return {key: _hash_rows(ShardFolder.open(store, key)) for key in folders}


def _hash_rows(folder: ShardFolder) -> str:
    digest = hashlib.sha256()
    for index in folder.manifests():
        for row in folder.read(index).to_pylist():
            for name in ("image", "jpg_0", "jpg_1"):
                if name in row:
                    row[name] = hashlib.sha256(decode_image(row[name]).tobytes()).hexdigest()
            digest.update(json.dumps(row, sort_keys=True, default=lambda data: data.hex()).encode())
    return digest.hexdigest()


def patiently(ask: Callable[[], httpx.Response], good: Callable[[httpx.Response], bool]) -> httpx.Response:
    """A busy or restarting server is asked again."""
    ends = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            answer = ask()
            if good(answer) or time.monotonic() > ends:
                return answer
        except httpx.HTTPError:
            if time.monotonic() > ends:
                raise
        time.sleep(0.5)
