"""A training over all GPUs of this machine: `accelerate launch` with one process a GPU, watched from here.

    python -m hgdpo_core.training.launch <folder> <pid>      # one of those processes

The folder holds `request.json`; `progress.json`, `messages.jsonl` (log records of the first process) and `error.json`
come back through it. The processes stop, with a checkpoint, when a file `stop` appears in it, or when the process `pid`
that watches them has ended.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

from hgdpo_core import errors
from hgdpo_core.devices import free_memory, use_cpu, use_gpu
from hgdpo_core.errors import HGDPOError, StoppedError
from hgdpo_core.progress import Progress, ShouldStop, never_stop, silent
from hgdpo_core.training.processes import LAUNCHED, forget_launchers, is_first_process, launch_environment
from hgdpo_core.training.request import TrainRequest, find_result, run_train
from hgdpo_core.training.tune import Tuned

LOOK_SECONDS = 1.0
END_SECONDS = 40.0  # the launcher itself grants its processes 30
LOG_LINES = 20

logger = logging.getLogger(__name__)


def run_train_everywhere(request: TrainRequest, *, processes: int | None = None, progress: Progress = silent,
                         should_stop: ShouldStop = never_stop) -> Tuned:
    """`run_train`, in as many processes as this machine has GPUs (or `processes`); in this one where that is one."""
    forget_launchers()
    processes = processes or (1 if use_cpu() else max(1, torch.cuda.device_count()))
    if processes == 1 or find_result(request) is not None:
        return run_train(request, progress=progress, should_stop=should_stop)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "request.json").write_text(request.model_dump_json())
        free_memory()  # what this process drew or encoded with would be missing to the first one on the same GPU
        _launch(folder, processes, progress, should_stop)
    tuned = find_result(request)
    assert tuned is not None  # the processes ended well
    return tuned


def launch_command(processes: int) -> list[str]:
    """`accelerate launch` on this machine, up to what it starts: a script, or -m and a module.

    With --cpu it would start one process, whatever the number: --multi_gpu is the launcher of several, and each of them
    falls back to the CPU where no GPU is requested or available. What is not given here, a user's own
    `accelerate config` decides: gpu_ids would.
    """
    return ["env", f"{LAUNCHED}=1", sys.executable, "-m", "accelerate.commands.launch", "--num_processes",
            str(processes), "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
            "--main_process_port", "0", "--multi_gpu", "--gpu_ids", "all"]


def _launch(folder: Path, processes: int, progress: Progress, should_stop: ShouldStop) -> None:
    command = [*launch_command(processes), "-m", "hgdpo_core.training.launch", str(folder), str(os.getpid())]
    repeated = 0
    with (folder / "log").open("wb") as log:
        launched = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=launch_environment())
        try:
            while launched.poll() is None:
                time.sleep(LOOK_SECONDS)
                _report_progress(folder, progress)
                repeated = _repeat_messages(folder, repeated)
                if should_stop():
                    (folder / "stop").touch()
        finally:
            _end(launched)
    _repeat_messages(folder, repeated)
    if (folder / "error.json").exists():
        error = json.loads((folder / "error.json").read_text())
        raise getattr(errors, error["kind"])(error["message"])
    if launched.returncode != 0:
        last = "\n".join((folder / "log").read_text(errors="replace").splitlines()[-LOG_LINES:])
        raise RuntimeError(f"accelerate launch ended with status {launched.returncode}:\n{last}")


def _end(launched: subprocess.Popen[bytes]) -> None:
    """Terminate first: killed at once, the launcher would leave its processes behind."""
    launched.terminate()  # does nothing where it has ended
    try:
        launched.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        launched.kill()
        launched.wait()


def _report_progress(folder: Path, progress: Progress) -> None:
    try:
        done, total, unit = json.loads((folder / "progress.json").read_text())
    except (OSError, ValueError):
        return
    progress(done, total, unit)


def _repeat_messages(folder: Path, seen: int) -> int:
    """Log here what the first process logged since byte `seen`; returns where to continue."""
    try:
        new = (folder / "messages.jsonl").read_bytes()[seen:]
    except FileNotFoundError:
        return seen
    whole = new[:new.rfind(b"\n") + 1]
    for line in whole.splitlines():
        level, message = json.loads(line)
        logger.log(level, message)
    return seen + len(whole)


class _Messages(logging.Handler):
    """Writes records where `_repeat_messages` finds them."""

    def __init__(self, path: Path):
        super().__init__()
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps([record.levelno, record.getMessage()]) + "\n")


def main(folder: Path, watcher: int | None = None) -> int:
    """One process of a training, which the process `watcher` watches; returns the exit code."""
    use_gpu(int(os.environ.get("LOCAL_RANK", "0")))
    request = TrainRequest.model_validate_json((folder / "request.json").read_text())
    first = is_first_process()
    written_at = 0.0

    def report(done: int, total: int, unit: str) -> None:
        nonlocal written_at
        if done == total or time.monotonic() - written_at > LOOK_SECONDS:
            written_at = time.monotonic()
            _write(folder / "progress.json", [done, total, unit])

    def should_stop() -> bool:
        return (folder / "stop").exists() or (watcher is not None and not psutil.pid_exists(watcher))

    if first:
        ours = logging.getLogger("hgdpo_core")
        ours.setLevel(logging.INFO)
        ours.addHandler(_Messages(folder / "messages.jsonl"))
    try:
        run_train(request, progress=report if first else silent, should_stop=should_stop)
    except HGDPOError as error:
        if first or not isinstance(error, StoppedError):
            _write(folder / "error.json", {"kind": type(error).__name__, "message": str(error)})
        return 1
    return 0


def _write(path: Path, value: object) -> None:
    """Whole or not at all: the other process may read at any moment."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value))
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
