"""A training over all GPUs of this machine: `accelerate launch` with one process a GPU, watched from here.

    python -m hgdpo_core.launch <folder>      # one of those processes

The folder holds `request.json`; `progress.json`, `result.json` or `error.json` come back through it, and a file `stop`
asks all processes to stop.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from hgdpo_core import errors
from hgdpo_core.errors import HGDPOError, StoppedError
from hgdpo_core.progress import Progress, ShouldStop, never_stop, silent
from hgdpo_core.train_request import TrainRequest, encode_images, find_result, run_train
from hgdpo_core.tuning import Tuned

LOOK_SECONDS = 1.0
LOG_LINES = 20


def run_train_everywhere(request: TrainRequest, *, processes: int | None = None, progress: Progress = silent,
                         encode_progress: Progress = silent, should_stop: ShouldStop = never_stop) -> Tuned:
    """`run_train`, in as many processes as this machine has GPUs (or `processes`); in this one where that is one."""
    processes = processes or max(1, torch.cuda.device_count())
    if processes == 1 or find_result(request) is not None:
        return run_train(request, progress=progress, encode_progress=encode_progress, should_stop=should_stop)
    encode_images(request, progress=encode_progress, should_stop=should_stop)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "request.json").write_text(request.model_dump_json())
        _launch(folder, processes, progress, should_stop)
    tuned = find_result(request)
    assert tuned is not None  # the processes ended well
    return tuned


def _launch(folder: Path, processes: int, progress: Progress, should_stop: ShouldStop) -> None:
    here = ["--multi_gpu"] if torch.cuda.is_available() else ["--cpu"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes), "--num_machines",
               "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", *here,
               "-m", "hgdpo_core.launch", str(folder)]
    with (folder / "log").open("wb") as log:
        launched = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            while launched.poll() is None:
                time.sleep(LOOK_SECONDS)
                _tell(folder, progress)
                if should_stop():
                    (folder / "stop").touch()
        finally:
            launched.kill()  # no-op for one that ended
            launched.wait()
    if (folder / "error.json").exists():
        error = json.loads((folder / "error.json").read_text())
        raise getattr(errors, error["kind"])(error["message"])
    if launched.returncode != 0:
        last = "\n".join((folder / "log").read_text(errors="replace").splitlines()[-LOG_LINES:])
        raise RuntimeError(f"accelerate launch ended with status {launched.returncode}:\n{last}")


def _tell(folder: Path, progress: Progress) -> None:
    try:
        done, total, unit = json.loads((folder / "progress.json").read_text())
    except (OSError, ValueError):
        return
    progress(done, total, unit)


def main(folder: Path) -> int:
    """One process of a training; returns the exit code."""
    request = TrainRequest.model_validate_json((folder / "request.json").read_text())
    first = os.environ.get("RANK", "0") == "0"
    written_at = 0.0

    def tell(done: int, total: int, unit: str) -> None:
        nonlocal written_at
        if done == total or time.monotonic() - written_at > LOOK_SECONDS:
            written_at = time.monotonic()
            _write(folder / "progress.json", [done, total, unit])

    try:
        run_train(request, progress=tell if first else silent, should_stop=(folder / "stop").exists)
    except HGDPOError as error:
        if first or not isinstance(error, StoppedError):
            _write(folder / "error.json", {"kind": type(error).__name__, "message": str(error)})
        return 1
    return 0


def _write(path: Path, value: object) -> None:
    """Whole or not at all: the other process may look at any moment."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value))
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
