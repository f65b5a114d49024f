"""Shards on all GPUs of this machine: a process for each makes a part of every stage, watched from here.

    python -m hgdpo_core.execution.processes <folder> <number> <pid>      # one of those processes

The folder holds `work.json`. Before a process makes a shard it creates a file in it, so that no other makes that one.
`<number>.jsonl` brings back progress, log records and the error of a process. They stop when a file `stop` appears, or
when the process `pid` that watches them has ended.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from hgdpo_core import errors
from hgdpo_core.devices import use_cpu
from hgdpo_core.errors import ConfigError, HGDPOError, StoppedError
from hgdpo_core.execution.jobs import ShardRequest, cut, open_stage, write_recipe
from hgdpo_core.execution.runner import InProcess, Runner, make_here
from hgdpo_core.progress import Progress, ShouldStop, StageProgress, never_stop, silent, silent_stages
from hgdpo_core.stages import Stage
from hgdpo_core.stages.base import Worker
from hgdpo_core.storage.scratch import cache_folder
from hgdpo_core.storage.version import refuse_other_code
from hgdpo_core.training.launch import run_train_everywhere
from hgdpo_core.training.processes import launch_environment
from hgdpo_core.training.request import TrainRequest
from hgdpo_core.training.tune import Tuned

PROCESSES = "HGDPO_PROCESSES"
LOOK_SECONDS = 0.5
END_SECONDS = 10.0

logger = logging.getLogger(__name__)


class ProcessError(HGDPOError):
    """A process that made shards ended without an error of its own; what is finished is kept."""


def count_processes() -> int:
    """$HGDPO_PROCESSES, else one for each GPU that torch sees, and one on a CPU; ConfigError where GPUs are fewer."""
    gpus = 0 if use_cpu() else torch.cuda.device_count()
    requested = os.environ.get(PROCESSES) or str(max(1, gpus))
    if not requested.isdecimal() or not 1 <= int(requested) <= (gpus or int(requested)):
        raise ConfigError(f"{PROCESSES} is {requested!r}: expected a whole number from 1"
                          + (f" to {gpus}, the GPUs that torch sees here" if gpus else ""))
    return int(requested)


def local_runner(should_stop: ShouldStop = never_stop) -> Runner:
    """The runner for all GPUs of this machine; where that is one, for this process."""
    processes = count_processes()
    return InProcess(should_stop) if processes == 1 else LocalProcesses(processes, should_stop)


class LocalProcesses:
    """The runner that makes shards in several processes of this machine, each with a GPU of its own, where it has any.

    They live as long as one call of `make`, so that each loads the network of a stage once, and leaves its GPU free.
    """

    copy_to_store = False

    def __init__(self, processes: int, should_stop: ShouldStop = never_stop):
        self.processes, self.should_stop = processes, should_stop

    def make(self, stages: Sequence[Stage], on: StageProgress = silent_stages) -> list[int]:
        """As a Runner's. An error of a process, or ProcessError where one died, stops the others."""
        counts: list[int] = []
        work: list[tuple[Stage, list[int]]] = []
        for stage in stages:
            if stage.runs_on_workers:
                missing = stage.find_missing()
                counts.append(len(missing))
                work += [(stage, missing)] if missing else []
            else:
                counts.append(make_here(stage, on, self.should_stop))
        if work:
            self._make(work, on)
        return counts

    def _make(self, work: Sequence[tuple[Stage, list[int]]], on: StageProgress) -> None:
        requests = []
        for stage, missing in work:
            write_recipe(stage)
            requests += cut(stage, missing)
        with tempfile.TemporaryDirectory(prefix="hgdpo-") as name, ExitStack() as stack:
            folder = Path(name)
            counters = [_Counter(stack.enter_context(on(stage.title))) for stage, _ in work]
            processes = min(self.processes, max(len(missing) for _, missing in work))
            write_work(folder, processes, requests)
            children: list[_Child] = []
            try:
                for number in range(processes):
                    children.append(_Child.start(folder, number, processes))
                self._watch(folder, children, counters)
            finally:
                for child in children:
                    child.end()
        _raise_first(children)

    def _watch(self, folder: Path, children: Sequence["_Child"], counters: Sequence["_Counter"]) -> None:
        live = True
        while live:
            live = any(child.process.poll() is None for child in children)  # before the last look at what they wrote
            for child in children:
                for kind, *values in child.read_messages():
                    if kind == "progress":
                        counters[values[0]].count(child.number, *values[1:])
                    elif kind == "log":
                        logger.log(values[0], "%s: %s", child.name, values[1])
                    else:
                        child.error = getattr(errors, values[0], HGDPOError)(values[1])
            if self.should_stop() or any(child.process.poll() for child in children):
                (folder / "stop").touch()
            if live:
                time.sleep(LOOK_SECONDS)

    def train(self, request: TrainRequest, progress: Progress = silent) -> Tuned:
        """Train on all of them together."""
        return run_train_everywhere(request, processes=self.processes, progress=progress, should_stop=self.should_stop)


class _Counter:
    """The sum of what the processes made of one stage."""

    def __init__(self, progress: Progress):
        self._progress, self._done, self._total = progress, dict[int, int](), 0

    def count(self, process: int, done: int, total: int, unit: str) -> None:
        self._done[process] = done
        self._total = max(self._total, total)  # who looks late finds less missing
        self._progress(min(sum(self._done.values()), self._total), self._total, unit)


@dataclass
class _Child:
    """A process and what it wrote."""

    number: int
    name: str
    process: subprocess.Popen[bytes]
    messages: Path
    log: Path
    seen: int = 0
    error: HGDPOError | None = field(default=None)

    @classmethod
    def start(cls, folder: Path, number: int, processes: int) -> "_Child":
        environment = child_environment(number, processes)
        name = f"GPU {environment['CUDA_VISIBLE_DEVICES']}" if not use_cpu() else f"process {number}"
        log = cache_folder("logs") / f"shards-{os.getpid()}-{number}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "hgdpo_core.execution.processes", str(folder), str(number), str(os.getpid())]
        with log.open("wb") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        return cls(number, name, process, folder / f"{number}.jsonl", log)

    def read_messages(self) -> Iterator[list[Any]]:
        """The whole lines that are new."""
        try:
            new = self.messages.read_bytes()[self.seen:]
        except FileNotFoundError:
            return
        whole = new[:new.rfind(b"\n") + 1]
        self.seen += len(whole)
        yield from map(json.loads, whole.splitlines())

    def end(self) -> None:
        """End it where it still runs; shards that are begun are lost. The log stays where it died."""
        self.process.terminate()
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.returncode == 0 or self.error is not None:
            self.log.unlink(missing_ok=True)


def child_environment(number: int, processes: int) -> dict[str, str]:
    """This process's environment for one of several: a GPU of its own, and its part of the CPU's threads."""
    environment = launch_environment()
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    if not use_cpu():
        listed = environment.get("CUDA_VISIBLE_DEVICES")
        environment["CUDA_VISIBLE_DEVICES"] = listed.split(",")[number].strip() if listed else str(number)
    return environment


def write_work(folder: Path, processes: int, requests: Sequence[ShardRequest]) -> None:
    """What the processes of `main` read."""
    (folder / "work.json").write_text(json.dumps({"processes": processes,
                                                  "requests": [request.model_dump() for request in requests]}))


def _raise_first(children: Sequence[_Child]) -> None:
    """The error of a process; that it was stopped only where no other is the reason."""
    found = [child.error for child in children if child.error is not None]
    for error in found:
        if not isinstance(error, StoppedError):
            raise error
    for child in children:
        if child.process.returncode != 0 and child.error is None:
            raise ProcessError(f"the process of {child.name} that made shards ended with status "
                               f"{child.process.returncode}: its log is {child.log}; finished shards are kept")
    if found:
        raise found[0]


class _Report:
    """Writes lines where `_Child.read_messages` finds them."""

    def __init__(self, path: Path):
        self._file, self._lock, self._sent = path.open("a"), threading.Lock(), 0.0

    def __call__(self, kind: str, *values: object) -> None:
        with self._lock:
            self._file.write(json.dumps([kind, *values]) + "\n")
            self._file.flush()

    def progress(self, stage: int, done: int, total: int, unit: str, *, at_once: bool = False) -> None:
        """Now and then, or at once."""
        if at_once or time.monotonic() - self._sent > LOOK_SECONDS:
            self._sent = time.monotonic()
            self("progress", stage, done, total, unit)


class _Messages(logging.Handler):
    """Sends records as reports."""

    def __init__(self, report: _Report):
        super().__init__()
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        self._report("log", record.levelno, record.getMessage())


def main(folder: Path, number: int, watcher: int | None = None) -> int:
    """One of the processes, which the process `watcher` watches; returns the exit code."""
    report = _Report(folder / f"{number}.jsonl")
    handler, ours = _Messages(report), logging.getLogger("hgdpo_core")
    ours.setLevel(logging.INFO)
    ours.addHandler(handler)

    def should_stop() -> bool:
        return (folder / "stop").exists() or (watcher is not None and not psutil.pid_exists(watcher))

    try:
        work = json.loads((folder / "work.json").read_text())
        for stage, fields in enumerate(work["requests"]):
            request = ShardRequest.model_validate(fields)
            first = number * len(request.indices) // work["processes"]  # where no other begins
            order = request.indices[first:] + request.indices[:first]
            _make(folder, stage, request, order, report, should_stop)
    except HGDPOError as error:
        report("error", type(error).__name__, str(error))
        return 1
    finally:
        ours.removeHandler(handler)
    return 0


def _make(folder: Path, stage: int, request: ShardRequest, order: Sequence[int], report: _Report,
          should_stop: ShouldStop) -> None:
    """What of a request no other process has begun."""
    last: tuple[int, int, str] | None = None
    own: set[int] = set()

    def progress(done: int, total: int, unit: str) -> None:
        nonlocal last
        last = done, total, unit
        report.progress(stage, *last)

    def claim(index: int) -> bool:
        if index not in own:  # asked again where a batch did not fit
            try:
                (folder / f"{stage}-{index}").touch(exist_ok=False)
            except FileExistsError:
                return False
            own.add(index)
        return True

    refuse_other_code(request.code_version, request.format_version)
    open_stage(request).make(Worker(progress=progress, should_stop=should_stop, claim=claim), order)
    if last is not None:
        report.progress(stage, *last, at_once=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *map(int, sys.argv[2:])))
