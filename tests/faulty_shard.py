"""The shard flow with faults, for workers of the tests: files in a folder say what happens to which shard, once.

A file `<what>-<image>` holds the first prompt of a shard; when that image of the shard is drawn, the file is removed
and `raise` raises, `kill` kills the process with SIGKILL. With `hold` the shard waits until the file is removed.
While `hold-import` is there no run gets past Pending. `painted.log` gets the time and the first prompt of every shard
begun.
"""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from flows.shard import hgdpo_shard
from hgdpo_core.models.image_generator import ImageGenerator

__all__ = ["hgdpo_shard"]

FAULTS = Path(os.environ["HGDPO_TEST_FAULTS"])
SECONDS_AN_IMAGE = float(os.environ.get("HGDPO_TEST_SLOW", "0"))
generate = ImageGenerator.generate


def generate_with_faults(self, prompts, *arguments) -> Iterator[dict]:
    with (FAULTS / "painted.log").open("a") as log:
        log.write(f"{time.time()} {prompts[0]}\n")
    for number, row in enumerate(generate(self, prompts, *arguments)):
        time.sleep(SECONDS_AN_IMAGE)
        while _is_told(FAULTS / f"hold-{number}", prompts[0]):
            time.sleep(0.2)
        for what in ("raise", "kill"):
            file = FAULTS / f"{what}-{number}"
            if _is_told(file, prompts[0]):
                file.unlink()
                if what == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise RuntimeError("a fault of the test")
        yield row


def _is_told(file: Path, prompt: str) -> bool:
    return file.is_file() and file.read_text() == prompt


while (FAULTS / "hold-import").exists():
    time.sleep(0.2)
ImageGenerator.generate = generate_with_faults
