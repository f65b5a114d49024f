"""What `benchmarks.orchestration` measures of its shard runs: a row at a time, added up over sessions."""

import contextlib
import json
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil

from deployments.local import Local

ROWS = "orchestration.jsonl"
PATIENCE_SECONDS = 300.0
LATE, TRIGGERED = "prefect.flow-run.Late", "prefect.automation.triggered"
SUMMED = ("seconds", "completed", "failed", "server_cpu", "database_cpu", "late", "automations", "errors", "locked")
"""Columns that add up over sessions; memory is the largest of all."""


def ask(local: Local, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
    """The server's answer; a busy SQLite answers 503, so it is asked again for some minutes."""
    ends = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            answer = httpx.request(method, local.url + path, json=body, timeout=PATIENCE_SECONDS)
            if answer.status_code < 500 or time.monotonic() > ends:
                return answer.raise_for_status().json()
        except httpx.TransportError:
            if time.monotonic() > ends:
                raise
        time.sleep(1)


class Meter:
    """What the runs of a parent cost since this was made."""

    def __init__(self, local: Local, parent_id: str):
        self._local, self._parent_id = local, parent_id
        self._server_cpu, self._database_cpu = self._server_seconds(), _postgres_seconds()
        self._memory = {"parent": 0, "server": 0}

    def row(self, run: Mapping[str, Any]) -> dict[str, Any]:
        """Seconds of the parent `run` so far, shard runs by their end, CPU seconds, memory in MiB, events, errors."""
        log = (self._local.home / "server.log").read_text(errors="replace")
        events = {one["value"]: one["count"] for one in ask(self._local, "POST", "/events/count-by/event", {
            "filter": {"event": {"name": [LATE, TRIGGERED]}}})}
        return {"state": run["state_name"], "seconds": round(run["estimated_run_time"], 1),
                "completed": self._count("COMPLETED"), "failed": self._count("FAILED", "CRASHED"),
                "server_cpu": round(self._server_seconds() - self._server_cpu, 1),
                "database_cpu": round(_postgres_seconds() - self._database_cpu, 1),
                "parent_mib": self._memory["parent"] >> 20, "server_mib": self._memory["server"] >> 20,
                "late": events.get(LATE, 0), "automations": events.get(TRIGGERED, 0),
                "errors": len(re.findall(r"^.{0,16}(?:ERROR|CRITICAL)", log, re.MULTILINE)),
                "locked": log.count("database is locked")}

    def note_memory(self) -> None:
        """Look at parent and server, for the largest that they were."""
        for process in self._server():
            self._note("server", process)
        for process in _with_environment("PREFECT__FLOW_RUN_ID", self._parent_id):
            self._note("parent", process)

    def _note(self, name: str, process: psutil.Process) -> None:
        with contextlib.suppress(psutil.Error):  # it has just ended
            self._memory[name] = max(self._memory[name], process.memory_info().rss)

    def _count(self, *states: str) -> int:
        return ask(self._local, "POST", "/flow_runs/count", {"flow_runs": {
            "parent_flow_run_id": {"any_": [self._parent_id]}, "state": {"type": {"any_": states}}}})

    def _server(self) -> Iterator[psutil.Process]:
        for process in _with_environment("PREFECT_HOME", str(self._local.home)):
            with contextlib.suppress(psutil.Error):
                if "server" in process.cmdline():
                    yield process

    def _server_seconds(self) -> float:
        return sum(_seconds(process, 2) for process in self._server())


def _with_environment(name: str, value: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):  # another user's, or already gone
            if process.environ().get(name) == value:
                yield process


def _seconds(process: psutil.Process, columns: int) -> float:
    """CPU seconds so far: user, system, and with four columns those of its ended children."""
    try:
        return sum(process.cpu_times()[:columns])
    except psutil.Error:
        return 0.0


def _postgres_seconds() -> float:
    """CPU seconds so far of every Postgres process here, ended connections included."""
    return sum(_seconds(process, 4) for process in psutil.process_iter(["name"]) if process.info["name"] == "postgres")


# -- rows


def read_rows(file: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The last row of each earlier session with these settings; a row that a kill cut short is left out."""
    last: dict[str, dict[str, Any]] = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if settings.items() <= row.items():
            last[row["session"]] = row
    return list(last.values())


def say(sessions: Sequence[Mapping[str, Any]]) -> str:
    """One line about all sessions, the last of which is the current one."""
    now, sums = sessions[-1], {name: sum(row[name] for row in sessions) for name in SUMMED}
    parent, server = (max(row[name] for row in sessions) for name in ("parent_mib", "server_mib"))
    runs = sums["completed"] or math.nan
    return (f"{sums['completed']} of {now['runs']} shard runs on {now['workers']} workers, {now['open_runs']} open, "
            f"{now['database']}: {now['state']} after {sums['seconds']:.0f} s in {len(sessions)} session(s), "
            f"{now['workers'] * sums['seconds'] / runs:.1f} s a shard run and worker; server "
            f"{sums['server_cpu'] / runs:.2f} s, Postgres {sums['database_cpu'] / runs:.2f} s of CPU a run; memory at "
            f"most: parent {parent} MiB, server {server} MiB; {sums['failed']} failed or crashed, "
            f"automations fired {sums['automations']}, marked Late {sums['late']}; {sums['errors']} errors in the "
            f"server's log, {sums['locked']} of a locked database")
