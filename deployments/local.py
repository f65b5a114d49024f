"""A local Prefect server for this checkout, with work pools, deployments, automations and workers: `make up`.

    python -m deployments.local up | schedule | down

Everything is in `.prefect/up` of the checkout and in `prefect.toml`, which has the address of the server for a plain
shell in the checkout. A server that `up` did not start is never used, and the user's own Prefect is never touched.
"""

import argparse
import contextlib
import http.client
import json
import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import psutil

from deployments.pools import PARENTS, SHARDS, TRAININGS, Pool
from deployments.sqlite_server import server_command
from hgdpo_core.progress import count_of

ROOT = Path(__file__).resolve().parents[1]
FIRST_PORT, FIRST_HEALTH_PORT, PORTS = 4200, 8080, 100
START_SECONDS = 600
END_SECONDS = 15
CPU_SHARD_WORKERS = 2
KEEP_ALIVE = ("sh", "-c", 'while :; do "$@"; sleep 5; done', "keep-alive")
"""A worker may die: of a Retry before the run's last process is gone, or of a SQLite that is locked for long."""
YIELDING = ("nice", "-n", "5")
"""For workers and their runs: on a machine whose cores they fill, a server that waits for a core holds its SQLite
locked for half a minute, and its answers become errors."""
COUNT_GPUS = "import torch; print(torch.cuda.device_count())"  # nvidia-smi does not know ROCm
MARK = "HGDPO_LOCAL_PREFECT"
"""Set in every process that `up` starts, and so in their children: `down` finds them by it."""
TOML_MARK = "# Written by `make up`; `make down` removes it."
SQLITE = {
    # It refuses a write that waits longer for another one: on a busy machine the default 5 s are soon over.
    "PREFECT_SERVER_DATABASE_TIMEOUT": "60", "PREFECT_SERVER_DATABASE_CONNECTION_TIMEOUT": "60",
    # Shard runs that wait for a worker are not late; marking hundreds at once locks it for minutes.
    "PREFECT_SERVER_SERVICES_LATE_RUNS_ENABLED": "false"}
OPTIONAL = ("shard_workers", "silent_seconds", "pending_seconds")
UP = """
Prefect UI: {ui}
`make schedule` turns the nightly re-scoring on, `make down` ends all of it.
Start a run on the workers with this line:

    cd {checkout} && {prefect} deployment run hgdpo/full
"""


class LocalError(Exception):
    """`up`, `schedule` or `down` cannot go on; the message says what to do."""


class Workers(NamedTuple):
    """The workers that `up` starts for a work pool."""

    pool: Pool
    count: int
    limit: int | None
    """Runs at once of each."""


@dataclass(frozen=True)
class Local:
    """The files and settings of one local server."""

    home: Path = ROOT / ".prefect" / "up"
    toml: Path = ROOT / "prefect.toml"
    deployments: Path = ROOT / "prefect.yaml"
    first_port: int = FIRST_PORT
    shard_workers: int | None = None
    """Default: one per GPU; two where there is none."""
    silent_seconds: float | None = None
    pending_seconds: float | None = None
    database: str | None = None
    """Of a Postgres, such as postgresql+asyncpg://prefect@db/prefect; default: SQLite in `home`."""
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def record(self) -> Path:
        return self.home / "local.json"

    @property
    def url(self) -> str:
        """The API of the server that runs; LocalError when none does."""
        try:
            return json.loads(self.record.read_text())["url"]
        except (OSError, ValueError, KeyError):
            raise LocalError("no local Prefect server is up: run `make up`") from None


# -- up


def up(local: Local) -> str:
    """Start what is not running yet; returns the address of the UI."""
    if local.toml.exists() and not _is_ours(local.toml):
        raise LocalError(f"{local.toml} was not written by `make up`: move it away, it would be overwritten")
    local.home.mkdir(parents=True, exist_ok=True)
    if not _is_up(local):
        down(local)  # what a crash or a reboot may have left
        _start_server(local)
    environment = _environment(local, local.url)
    _run_inside("up-inside", local, environment)
    print("Deploying", flush=True)
    _call([sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(local.deployments)],
          environment, local.home / "deploy.log")
    _start_workers(local, environment)
    local.toml.write_text(f'{TOML_MARK}\n[api]\nurl = "{local.url}"\n')
    return local.url.removesuffix("/api")


def _is_up(local: Local) -> bool:
    """Whether our own server, and not another one on its port, answers."""
    with contextlib.suppress(LocalError):
        return _healthy(local.url) and bool(_servers(_ours(local)))
    return False


def _servers(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if {"server", "start"} <= set(_command(process))]


def _start_server(local: Local) -> None:
    for port in _free_ports(local.first_port):
        print(f"Starting a Prefect server on port {port}", flush=True)
        url = f"http://127.0.0.1:{port}/api"
        server = _spawn(server_command(local.database, port), _environment(local, url), local.home / "server.log")
        if _await_health(url, server):
            local.record.write_text(json.dumps({"url": url}))
            return
        if _is_free(port):  # the reason was not that another process took the port meanwhile
            raise LocalError(f"the Prefect server did not start: {_last_line(local.home / 'server.log')} "
                             f"({local.home / 'server.log'})")


def _await_health(url: str, server: subprocess.Popen[bytes]) -> bool:
    ends = time.monotonic() + START_SECONDS
    while time.monotonic() < ends:
        if server.poll() is not None:
            return False
        if _healthy(url):
            return server.poll() is None  # a healthy server beside our dead one is not ours
        time.sleep(0.3)
    server.kill()
    return False


def _start_workers(local: Local, environment: dict[str, str]) -> None:
    running = {command[command.index("--name") + 1] for command in map(_command, _ours(local)) if "--name" in command}
    gpus, host, ports = _gpus(), socket.gethostname(), _free_ports(FIRST_HEALTH_PORT)
    for pool, count, limit in _workers(local, gpus):
        for number in range(count):
            name = f"{pool.name}-{number}@{host}"
            if name in running:
                continue
            own = environment | {"PREFECT_WORKER_WEBSERVER_HOST": "127.0.0.1",
                                 "PREFECT_WORKER_WEBSERVER_PORT": str(next(ports))}
            if pool == SHARDS and gpus:
                own[_visibility()] = gpus[number % len(gpus)]
            elif pool == SHARDS:  # else they would take the cores from each other
                own.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
            limited = ["--limit", str(limit)] if limit else []
            _spawn([*YIELDING, *KEEP_ALIVE, sys.executable, "-m", "prefect", "worker", "start", "--pool", pool.name,
                    "--type", "process", "--name", name, "--with-healthcheck", *limited], own,
                   local.home / f"worker-{pool.name}-{number}.log")
            print(f"Started worker {name}", flush=True)


def _workers(local: Local, gpus: Sequence[str]) -> list[Workers]:
    return [Workers(PARENTS, 1, None), Workers(SHARDS, local.shard_workers or len(gpus) or CPU_SHARD_WORKERS, 1),
            Workers(TRAININGS, 1, 1)]


def _gpus() -> list[str]:
    """The GPUs this shell may use, as `_visibility` names them; a process sees one MIG instance: all named count."""
    if os.environ.get("HGDPO_DEVICE") == "cpu":
        return []
    counted = subprocess.run([sys.executable, "-c", COUNT_GPUS], text=True, capture_output=True)
    if counted.returncode != 0:
        raise LocalError(f"torch cannot count the GPUs: {(counted.stderr.strip().splitlines() or ['no reason'])[-1]}")
    count = int(counted.stdout.split()[-1])
    chosen = os.environ.get(_visibility())
    names = [name.strip() for name in chosen.split(",")] if chosen else [str(number) for number in range(count)]
    return names if count and names[0].startswith("MIG-") else names[:count]


def _visibility() -> str:
    """The variable by which the shell's GPUs are chosen; on ROCm its own goes first."""
    return "HIP_VISIBLE_DEVICES" if "HIP_VISIBLE_DEVICES" in os.environ else "CUDA_VISIBLE_DEVICES"


# -- inside: with Prefect's settings pointing at our server, in a process of its own


def _up_inside(local: Local) -> None:
    from deployments.automations import PENDING_SECONDS, SILENT_SECONDS, automations, ship
    from deployments.prepare import create_pools

    create_pools()
    ship(automations(local.silent_seconds or SILENT_SECONDS, local.pending_seconds or PENDING_SECONDS))


def _schedule_inside(local: Local) -> None:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        nightly = client.read_deployment_by_name("hgdpo-rescore/nightly")
        for schedule in nightly.schedules:
            client.update_deployment_schedule(nightly.id, schedule.id, active=True)
            print(f"hgdpo-rescore/nightly runs by {schedule.schedule.model_dump_json(exclude_none=True)}")


def _end_runs_inside(local: Local) -> None:
    """Give every live run a final state, so that a later `up` shows its Retry and starts nothing."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.client.schemas.objects import FlowRun, StateType
    from prefect.states import Cancelled, Crashed

    with get_client(sync_client=True) as client:
        live = FlowRunFilter.model_validate({"state": {"type": {"any_": [
            StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.CANCELLING, StateType.PAUSED]}}})
        runs: list[FlowRun] = []
        while page := client.read_flow_runs(flow_run_filter=live, limit=100, offset=len(runs)):
            runs += page
        for run in runs:
            if not run.auto_scheduled or run.run_count:  # the next nights' runs stay
                waits = run.state is not None and run.state.type in (StateType.SCHEDULED, StateType.CANCELLING)
                message = "Ended by `make down`; finished shards are kept, Retry goes on."
                client.set_flow_run_state(run.id, (Cancelled if waits else Crashed)(message=message), force=True)


INSIDE = {"up-inside": _up_inside, "schedule-inside": _schedule_inside, "end-runs-inside": _end_runs_inside}


# -- schedule, down


def schedule(local: Local) -> None:
    """Turn the nightly run on."""
    _run_inside("schedule-inside", local, _environment(local, local.url), quiet=False)


def down(local: Local) -> int:
    """End everything that `up` started, running flow runs included; returns the number of processes."""
    processes = _ours(local)
    servers = _servers(processes)
    others = [process for process in processes if process not in servers]
    _end(others)
    try:
        if servers and others and _is_up(local):
            _run_inside("end-runs-inside", local, _environment(local, local.url))
    except LocalError as error:  # such as a server that lost its database: it is to end all the same
        print(f"The server could not end its runs, which go on with the next `make up`: {error}", file=sys.stderr)
    _end(_ours(local))
    if local.toml.exists() and _is_ours(local.toml):
        local.toml.unlink()
    local.record.unlink(missing_ok=True)
    return len(processes)


def _end(processes: Sequence[psutil.Process]) -> None:
    for end in (psutil.Process.terminate, psutil.Process.kill):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                end(process)
        _, processes = psutil.wait_procs(processes, timeout=END_SECONDS)


# -- below


def _environment(local: Local, url: str) -> dict[str, str]:
    """The shell's environment without its Prefect, pointing at our server; AWS and CUDA variables pass through."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return kept | {
        "PREFECT_HOME": str(local.home), "PREFECT_PROFILES_PATH": str(local.home / "profiles.toml"),
        "PREFECT_API_URL": url, "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1",
        "PREFECT_WORKER_QUERY_SECONDS": "3",  # the server is local, and small runs would mostly wait
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "10000"), MARK: str(local.home)} | (
            {"PREFECT_API_DATABASE_CONNECTION_URL": local.database} if local.database else SQLITE) | local.environment


def _ours(local: Local) -> list[psutil.Process]:
    """Every process that `up` started, directly or not; never this one or its parents."""
    mine = {process.pid for process in psutil.Process().parents()} | {os.getpid()}
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid not in mine and process.environ().get(MARK) == str(local.home):
                found.append(process)
        except (psutil.Error, OSError):  # another user's, or already gone
            continue
    return found


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _spawn(command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(command, env=environment, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output,
                                stderr=subprocess.STDOUT, start_new_session=True)


def _call(command: list[str], environment: dict[str, str], log: Path) -> None:
    with log.open("wb") as output:
        done = subprocess.run(command, env=environment, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output,
                              stderr=subprocess.STDOUT)
    if done.returncode != 0:
        raise LocalError(f"{' '.join(command[2:5])} failed: {_last_line(log)} ({log})")


def _run_inside(command: str, local: Local, environment: dict[str, str], *, quiet: bool = True) -> None:
    options = [f"--{name.replace('_', '-')}={getattr(local, name)}" for name in ("home", *OPTIONAL)
               if getattr(local, name) is not None]
    line = [sys.executable, "-m", "deployments.local", command, *options]
    if quiet:
        _call(line, environment, local.home / f"{command}.log")
    elif subprocess.run(line, env=environment, cwd=ROOT).returncode != 0:
        raise LocalError(f"{command} failed")


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it printed nothing"


def _is_ours(toml: Path) -> bool:
    return toml.read_text(errors="replace").startswith(TOML_MARK)


def _free_ports(first: int) -> Iterator[int]:
    """Those of the next hundred that are free when they are asked for; LocalError after the last."""
    yield from filter(_is_free, range(first, first + PORTS))
    raise LocalError(f"no free port from {first} to {first + PORTS - 1}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            return answer.read() == b"true"
    except (OSError, http.client.HTTPException, ValueError):  # nothing there, or another program on the port
        return False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m deployments.local", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=["up", "schedule", "down", *INSIDE])
    parser.add_argument("--home", type=Path, default=Local.home, help=argparse.SUPPRESS)
    parser.add_argument("--shard-workers", type=int, help="workers for shards; default: one per GPU, else two")
    parser.add_argument("--silent-seconds", type=float, help="no heartbeat for so long: Crashed; default 600")
    parser.add_argument("--pending-seconds", type=float, help="Pending for so long: Crashed; default 600")
    parser.add_argument("--database", help="postgresql+asyncpg://...; default: SQLite in the checkout")
    options = parser.parse_args(arguments)
    local = Local(home=options.home, database=options.database, **{name: getattr(options, name) for name in OPTIONAL})
    try:
        if options.command in INSIDE:
            INSIDE[options.command](local)
        elif options.command == "up":
            prefect = Path(sys.executable).with_name("prefect")
            print(UP.format(ui=up(local), checkout=shlex.quote(str(ROOT)), prefect=shlex.quote(str(prefect))))
        elif options.command == "schedule":
            schedule(local)
        else:
            print(f"Ended {count_of(down(local), 'process', 'processes')}")
    except LocalError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
