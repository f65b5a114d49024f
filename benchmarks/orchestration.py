"""The cost of orchestration, without generating anything.

    python -m benchmarks.orchestration --shards 300 --runs 300 --workers 2
    python -m benchmarks.orchestration --shards 0 --runs 1000 --open-runs 1000 --database postgres --root /data/thousand

First many shards in one shard run, against the same call without Prefect: milliseconds a shard. Then many shard runs of
one shard each: seconds a shard run and worker, and the memory of parent and server. CPU seconds stand beside the wall
clock's, for machines that are busy with other work. With `--root` the shards stay, and the same command makes only
those that are missing.
"""

import argparse
import re
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from benchmarks.null_shard import plan
from benchmarks.postgres import postgres
from deployments.local import ROOT, Local, down, up
from hgdpo_core.execution.jobs import ShardRequest, cut, run_shards, write_recipe

FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shards", type=int, default=300, help="shards in one run")
    parser.add_argument("--runs", type=int, default=300, help="shard runs of one shard each")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--open-runs", type=int, default=50, help="shard runs that wait or run at once")
    parser.add_argument("--database", choices=["sqlite", "postgres"], default="sqlite")
    parser.add_argument("--root", type=Path, help="a folder that stays; default: a temporary one")
    options = parser.parse_args()
    with ExitStack() as ends:
        name = ends.enter_context(tempfile.TemporaryDirectory())
        url = ends.enter_context(postgres()) if options.database == "postgres" else None
        local = _local(Path(name), options.workers, url)
        ends.callback(down, local)
        up(local)
        if options.shards:
            _many_shards(local, f"file://{name}", options.shards)
        root = f"file://{options.root.resolve()}" if options.root else f"file://{name}/many"
        _many_runs(local, root, options)


def _local(folder: Path, workers: int, database: str | None) -> Local:
    shipped = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    shard = next(one for one in shipped["deployments"] if one["name"] == "shard")
    shard["entrypoint"] = "benchmarks.null_shard:hgdpo_shard"
    full = next(one for one in shipped["deployments"] if one["name"] == "full")
    parent = full | {"name": "parent", "entrypoint": "benchmarks.null_shard:null_parent"}
    shipped["deployments"] = [shard, parent]
    (folder / "prefect.yaml").write_text(yaml.safe_dump(shipped))
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return Local(home=folder / "prefect", toml=folder / "prefect.toml", deployments=folder / "prefect.yaml",
                 shard_workers=workers, database=database, environment=environment)


def _request(root: str, shards: int) -> ShardRequest:
    pool = plan(root, shards)
    write_recipe(pool)
    return cut(pool, pool.indices)[0]


def _many_shards(local: Local, root: str, shards: int) -> None:
    run_shards(_request(f"{root}/first", 1))   # pays what is paid once
    plain = _request(f"{root}/plain", shards)
    wall, cpu = time.monotonic(), time.process_time()
    run_shards(plain)
    wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    request = _request(f"{root}/one-run", shards)
    run = _await(local, _start(local, "hgdpo-shard/shard", {"request": request.model_dump(mode="json")}))
    seconds = run["total_run_time"]
    print(f"{shards} shards in one run: {seconds:.1f} s of the run, {wall:.1f} s ({cpu:.1f} s of CPU) without Prefect: "
          f"{1000 * (seconds - wall) / shards:.1f} ms a shard")


def _many_runs(local: Local, root: str, options: argparse.Namespace) -> None:
    cpu, database_cpu = _cpu_seconds(local), _postgres_seconds()
    parent_id = _start(local, "null-parent/parent", {"root": root, "shards": options.runs, "per_run": 1,
                                                     "open_runs": options.open_runs})
    memory: dict[str, int] = {}
    run = _await(local, parent_id, watch=lambda: _note_memory(local, parent_id, memory))
    seconds = run["total_run_time"]
    cpu, database_cpu = _cpu_seconds(local) - cpu, _postgres_seconds() - database_cpu
    runs = max(_count(local, "/flow_runs/count", {"flow_runs": {"parent_flow_run_id": {"any_": [parent_id]}}}), 1)
    late = _count(local, "/events/count-by/event", {"filter": {"event": {"name": ["prefect.flow-run.Late"]}}})
    log = (local.home / "server.log").read_text(errors="replace")
    errors = len(re.findall(r"^.{0,16}(?:ERROR|CRITICAL)", log, re.MULTILINE))
    parent, server = (memory.get(name, 0) >> 20 for name in ("parent", "server"))
    print(f"{runs} shard runs on {options.workers} workers, {options.open_runs} open, {options.database}: "
          f"{run['state_name']} in {seconds:.0f} s, {options.workers * seconds / runs:.1f} s a shard run and worker; "
          f"server {cpu / runs:.2f} s, Postgres {database_cpu / runs:.2f} s of CPU a run; memory at most: parent "
          f"{parent} MiB, server {server} MiB; marked Late {late}; {errors} errors in the server's log, "
          f"{log.count('database is locked')} of a locked database")


def _start(local: Local, name: str, parameters: dict[str, Any]) -> str:
    with httpx.Client(base_url=local.url, timeout=300) as client:
        deployment = client.get(f"/deployments/name/{name}").raise_for_status().json()["id"]
        for _ in range(60):     # a busy SQLite answers 503
            run = client.post(f"/deployments/{deployment}/create_flow_run", json={"parameters": parameters})
            if run.status_code < 500:
                break
            time.sleep(1)
        return run.raise_for_status().json()["id"]


def _await(local: Local, run_id: str, watch: Any = lambda: None) -> dict[str, Any]:
    with httpx.Client(base_url=local.url, timeout=300) as client:
        while True:
            watch()
            run = client.get(f"/flow_runs/{run_id}").raise_for_status().json()
            if run["state_type"] in FINAL:
                return run
            time.sleep(1)


def _count(local: Local, path: str, body: dict[str, Any]) -> int:
    with httpx.Client(base_url=local.url, timeout=300) as client:
        answer = client.post(path, json=body).raise_for_status().json()
    return answer if isinstance(answer, int) else sum(one["count"] for one in answer)


def _note_memory(local: Local, parent_id: str, memory: dict[str, int]) -> None:
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            if environment.get("PREFECT__FLOW_RUN_ID") == parent_id:
                memory["parent"] = max(memory.get("parent", 0), process.memory_info().rss)
            elif environment.get("PREFECT_HOME") == str(local.home) and "server" in process.cmdline():
                memory["server"] = max(memory.get("server", 0), process.memory_info().rss)
        except (psutil.Error, OSError):
            continue


def _cpu_seconds(local: Local) -> float:
    """CPU seconds of the server so far."""
    for process in psutil.process_iter():
        try:
            if process.environ().get("PREFECT_HOME") == str(local.home) and "server" in process.cmdline():
                return sum(process.cpu_times()[:2])
        except (psutil.Error, OSError):
            continue
    return 0.0


def _postgres_seconds() -> float:
    """CPU seconds so far of every Postgres process here, ended connections included."""
    seconds = 0.0
    for process in psutil.process_iter():
        try:
            if process.name() == "postgres":
                times = process.cpu_times()
                seconds += times.user + times.system + getattr(times, "children_user", 0.0) + getattr(
                    times, "children_system", 0.0)
        except psutil.Error:
            continue
    return seconds


if __name__ == "__main__":
    main()
