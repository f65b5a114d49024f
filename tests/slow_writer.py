"""A process that makes a range of shards slowly, to be killed in the middle of it."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hgdpo_core.execution.jobs import ShardRequest, run_shards
from hgdpo_core.models.image_generator import ImageGenerator

SECONDS_AN_IMAGE = 0.03
generate = ImageGenerator.generate


def make_slowly(request: dict[str, Any], log: str) -> None:
    """Make what is missing; `log` gets the time and the first prompt of every shard begun."""
    torch.set_num_threads(1)    # as in the tests: sums over more threads round otherwise

    def generate_slowly(self, prompts, *arguments) -> Iterator[dict]:
        with Path(log).open("a") as file:
            file.write(f"{time.time()} {prompts[0]}\n")
        for row in generate(self, prompts, *arguments):
            time.sleep(SECONDS_AN_IMAGE)
            yield row

    ImageGenerator.generate = generate_slowly
    run_shards(ShardRequest.model_validate(request))
