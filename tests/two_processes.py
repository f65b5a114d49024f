"""One of two processes of `accelerate launch` on the CPU: small trainings, whose results the first process writes.

    accelerate launch ... tests/two_processes.py <folder>

The folder holds checkpoints that one process left; `results.pt` is what comes out. See core/test_processes.py.
"""

import logging
import os
import shutil
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed import distributed_c10d
from training_cases import Pairs, all_weights, config, sft_config, train, train_images, weights

from hgdpo_core.errors import ConfigError, StoppedError
from hgdpo_core.storage import Store
from hgdpo_core.training.checkpoints import Checkpoints

FIRST = os.environ.get("RANK") == "0"
DEFAULT_WAIT, SLOW_SECONDS = timedelta(seconds=2), 4.0


class Starved(Pairs):
    """Memory for `limit` pairs at a time, in the second process only; less even amid a step's micro-batches."""

    limit = 1

    def batch(self, indices):
        if not FIRST and len(indices) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a lot.")
        return super().batch(indices)


class Empty(Starved):
    limit = 0


class SlowStore(Store):
    """Longer than a process waits for another by torch's default: each checkpoint that is read or written."""

    def __init__(self, root: str):
        super().__init__(root)
        self.used: list[str] = []

    def get_folder(self, key, local, **options):
        self._wait("read")
        super().get_folder(key, local, **options)

    def put_folder(self, local, key):
        self._wait("write")
        super().put_folder(local, key)

    def _wait(self, use: str) -> None:
        self.used.append(use)
        time.sleep(SLOW_SECONDS)


def result_of(trained, flat=weights):
    unet, result = trained
    return {"log": result.log, "weights": flat(unet), "resumed_from": result.resumed_from,
            "global_batch": result.global_batch}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    distributed_c10d._get_default_timeout = lambda backend: DEFAULT_WAIT
    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger("hgdpo_core").addHandler(handler)

    def location(name: str) -> Checkpoints:
        return Checkpoints(Store(str(folder)), name)

    results = {
        "plain": result_of(train(config(batch_size=2))),
        "flips": result_of(train(config(batch_size=2, gradient_accumulation_steps=2, flip=True))),
        "global": result_of(train(config(batch_size=2, global_batch_size=6))),
        "sft": result_of(train_images(sft_config(batch_size=1, caption_dropout=0.5, flip=True)), all_weights),
        "starved": result_of(train(config(batch_size=4), Starved(20))),
    }
    results["starved"]["warnings"] = [text for text in warnings if "ran out of memory" in text]
    results["pure bf16"] = result_of(train(config(batch_size=4, mixed_precision="bf16", autocast=False), Starved(20)))
    try:
        train(config(batch_size=4), Empty(20))
    except ConfigError as error:
        results["empty"] = str(error)
    asked = iter([False, False, FIRST])  # one process alone is asked to stop
    try:
        train(config(batch_size=2), checkpoints=location("two"), should_stop=lambda: next(asked))
    except StoppedError as error:
        results["stopped"] = str(error)
    if FIRST:
        shutil.copytree(folder / "two", folder / "two-kept")
    results["resumed"] = result_of(train(config(batch_size=2), checkpoints=location("two")))
    for name, batch in (("four", 4), ("three", 3), ("one", 1)):
        results[f"from {name}"] = result_of(train(config(batch_size=batch), checkpoints=location(name)))
    results["warnings"] = [text for text in warnings if "goes on with" in text]
    slow = Checkpoints(SlowStore(str(folder)), "four-kept")
    validated = []

    def validate(step: int) -> None:
        validated.append(step)
        time.sleep(SLOW_SECONDS if step == 4 else 0)

    results["slow"] = result_of(train(config(batch_size=4, validation_every=4), checkpoints=slow, validate=validate))
    uses: list[list[str]] = [[], []]
    distributed_c10d.all_gather_object(uses, slow.store.used)  # pyright: ignore[reportAttributeAccessIssue]
    results["slow"].update(uses=uses, validated=validated)
    if FIRST:
        torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
