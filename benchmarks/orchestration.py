"""The cost of orchestration, without generating anything.

    python -m benchmarks.orchestration --shards 300 --runs 300 --workers 2
    python -m benchmarks.orchestration --light --runs 1000 --open-runs 1000 --database postgres --root /data/thousand

First many shards in one shard run, against the same call without Prefect: milliseconds a shard. Then many shard runs of
one shard each: seconds a shard run and worker, and the memory of parent and server. CPU seconds stand beside the wall
clock's, for machines that are busy with other work. With `--light` there are only the many runs, which load no torch.

A row comes every minute, so that it may be stopped at any time (Ctrl-C, SIGTERM). With `--root` the shards stay and the
rows go to orchestration.jsonl there; the same command makes only the shards that are missing, and its rows add up all
sessions of the same settings.
"""

import argparse
import json
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from benchmarks.null_shard import plan
from benchmarks.orchestration_rows import ROWS, Meter, ask, read_rows, say
from benchmarks.postgres import postgres
from deployments.local import ROOT, Local, down, up
from hgdpo_core.execution.jobs import ShardRequest, cut, run_shards, write_recipe

FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
ROW_SECONDS, LOOK_SECONDS = 60, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shards", type=int, default=300, help="shards in one run")
    parser.add_argument("--runs", type=int, default=300, help="shard runs of one shard each")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--light", action="store_true", help="shard runs as benchmarks.light_shard has them")
    parser.add_argument("--open-runs", type=int, default=50, help="shard runs that wait or run at once")
    parser.add_argument("--database", choices=["sqlite", "postgres"], default="sqlite")
    parser.add_argument("--root", type=Path, help="a folder that stays; default: a temporary one")
    options = parser.parse_args()
    _end_on(signal.default_int_handler)  # SIGTERM too, and SIGINT where a shell's background ignores it
    with ExitStack() as ends:
        name = ends.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        url = ends.enter_context(postgres()) if options.database == "postgres" else None
        local = _local(Path(name), options, url)
        ends.callback(down, local)
        ends.callback(_end_on, signal.SIG_IGN)  # a second one would leave servers behind
        try:
            up(local)
            if options.shards and not options.light:
                _many_shards(local, f"file://{name}", options.shards)
            _many_runs(local, options.root or Path(name, "many"), options)
        except KeyboardInterrupt:
            print("stopped: the last row is the result so far", flush=True)


def _end_on(handler: Any) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _local(folder: Path, options: argparse.Namespace, database: str | None) -> Local:
    shipped = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    shard = next(one for one in shipped["deployments"] if one["name"] == "shard")
    shard["entrypoint"] = f"benchmarks.{'light' if options.light else 'null'}_shard:hgdpo_shard"
    full = next(one for one in shipped["deployments"] if one["name"] == "full")
    parent = full | {"name": "parent", "entrypoint": "benchmarks.null_shard:null_parent"}
    shipped["deployments"] = [shard, parent]
    (folder / "prefect.yaml").write_text(yaml.safe_dump(shipped))
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return Local(home=folder / "prefect", toml=folder / "prefect.toml", deployments=folder / "prefect.yaml",
                 shard_workers=options.workers, database=database, environment=environment)


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


def _many_runs(local: Local, root: Path, options: argparse.Namespace) -> None:
    root = root.resolve()
    root.mkdir(parents=True, exist_ok=True)
    parent = _start(local, "null-parent/parent", {"root": f"file://{root}", "shards": options.runs, "per_run": 1,
                                                  "open_runs": options.open_runs})
    began = datetime.now(UTC).isoformat(timespec="seconds")
    settings = {name: getattr(options, name) for name in ("runs", "workers", "open_runs", "database", "light")}
    meter, before = Meter(local, parent), read_rows(root / ROWS, settings)
    for run in _looks(local, parent, meter):
        row = {"session": began} | settings | meter.row(run)
        with (root / ROWS).open("a") as rows:
            rows.write(json.dumps(row) + "\n")
        print(say([*before, row]), flush=True)


def _looks(local: Local, run_id: str, meter: Meter) -> Iterator[dict[str, Any]]:
    """The run, every minute and at its end."""
    due = 0.0
    while True:
        run = ask(local, "GET", f"/flow_runs/{run_id}")
        meter.note_memory()
        ended = run["state_type"] in FINAL
        if ended or time.monotonic() > due:
            yield run
            due = time.monotonic() + ROW_SECONDS
        if ended:
            return
        time.sleep(LOOK_SECONDS)


def _start(local: Local, name: str, parameters: dict[str, Any]) -> str:
    deployment = ask(local, "GET", f"/deployments/name/{name}")["id"]
    return ask(local, "POST", f"/deployments/{deployment}/create_flow_run", {"parameters": parameters})["id"]


def _await(local: Local, run_id: str) -> dict[str, Any]:
    while (run := ask(local, "GET", f"/flow_runs/{run_id}"))["state_type"] not in FINAL:
        time.sleep(LOOK_SECONDS)
    return run


if __name__ == "__main__":
    main()
