"""How long the denoiser of a pool waits for anything but itself: reading, decoding, encoding, writing.

    python -m benchmarks.shard_wait                                  # the figures target, local disk and a slow store
    python -m benchmarks.shard_wait --size sd15 --device cuda --prompts 6 --prompts-per-shard 2 --batch 8
    python -m benchmarks.shard_wait --size tiny --dtype float32      # seconds, to see that the pipeline of sd15 runs

`PoolPlan.make` is watched from outside: the time in the solver's loop and in the VAE counts as generating, and between
the first image's start and the last commit's end everything else is waiting. The first shard's prompts and the last
shard's commit have nothing to hide behind, so they are reported apart. `--slow` seconds are added to every write of the
store, as a far one would; the last row runs with that and writes in the generating thread, as the code did
before, to show what is hidden.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.targets import add_device_options, clock_of, describe, open_target, some_prompts
from hgdpo_core.config import PoolConfig
from hgdpo_core.models import image_generator
from hgdpo_core.models.image_generator import ImageGenerator
from hgdpo_core.models.sd15 import KlCodec
from hgdpo_core.stages import base
from hgdpo_core.stages.base import Worker
from hgdpo_core.stages.pool import plan_pool
from hgdpo_core.storage import Store


@dataclass
class Watch:
    """Stretches in which the denoiser or the VAE worked, of one run."""

    device: str
    busy: list[tuple[float, float]] = field(default_factory=list)

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, its time noted; the device is waited for before and after."""
        def watched(*arguments: Any, **settings: Any) -> Any:
            start = self._now()
            result = function(*arguments, **settings)
            self.busy.append((start, self._now()))
            return result
        return watched

    def _now(self) -> float:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()


@dataclass(frozen=True)
class Row:
    """One line of the table; all in seconds."""

    what: str
    total: float
    generating: float
    waiting: float
    last_commit: float

    @property
    def fraction(self) -> float:
        """Of the time from the first batch to the last one that the denoiser waited."""
        return self.waiting / (self.generating + self.waiting)


class InlineWriter(base.Writer):
    """Writes where it is asked to, before the next shard is generated."""

    def start(self, job: Callable[[], Any]) -> None:
        job()


class SlowStore(Store):
    """A local store whose every write takes some seconds more."""

    seconds = 0.0

    def write_bytes(self, key: str, data: bytes) -> None:
        time.sleep(self.seconds)
        super().write_bytes(key, data)


@contextmanager
def watching(watch: Watch, *, inline: bool) -> Iterator[None]:
    """The program's solver and codec watched."""
    sample, decode = watch.around(image_generator.sample_latents), watch.around(KlCodec.decode)
    writer = InlineWriter if inline else base.Writer
    with mock.patch.object(image_generator, "sample_latents", sample), mock.patch.object(KlCodec, "decode", decode), \
            mock.patch.object(base, "Writer", writer):
        yield


def run(what: str, generator: ImageGenerator, options: argparse.Namespace, folder: Path, slow: float, *,
        inline: bool) -> Row:
    """Generate a pool again and report where its time went."""
    store = SlowStore(str(folder))
    plan = plan_pool(store, generator.model, generator.sampler, generator.pool, some_prompts(options.prompts))
    store.seconds = slow
    watch = Watch(options.device)
    with watching(watch, inline=inline):
        start = time.perf_counter()
        plan.make(Worker(network=generator))
        end = time.perf_counter()
    generating = sum(b - a for a, b in watch.busy)
    first, last = watch.busy[0][0], watch.busy[-1][1]
    return Row(what, end - start, generating, last - first - generating, end - last)


def format_table(rows: Sequence[Row]) -> str:
    """A Markdown table."""
    lines = ["| store | seconds | generating | waiting | fraction | last encode and commit |", "|---" * 6 + "|"]
    lines += [f"| {row.what} | {row.total:.2f} | {row.generating:.2f} | {row.waiting:.3f} | "
              f"{100 * row.fraction:.2f} % | {row.last_commit:.2f} |" for row in rows]
    return "\n".join(lines)


def compare(options: argparse.Namespace, folder: Path) -> list[Row]:
    """The local disk, a slow store, and the slow store without writing beside generating."""
    clock_of(options)
    model, config = open_target(options.size, folder, options.dtype)
    pool = PoolConfig(images_per_prompt=options.images_per_prompt, prompts_per_shard=options.prompts_per_shard,
                      batch_size=options.batch or config.pool.batch_size)
    generator = ImageGenerator(model, config.sampler, pool, options.device)
    run("", generator, options, folder / "warm", 0.0, inline=False)
    slow = f"{options.slow:g} s a write"
    return [run("local disk", generator, options, folder / "local", 0.0, inline=False),
            run(slow, generator, options, folder / "slow", options.slow, inline=False),
            run(f"{slow}, written in line", generator, options, folder / "inline", options.slow, inline=True)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_device_options(parser)
    parser.set_defaults(clock="wall")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--prompts-per-shard", type=int, default=8)
    parser.add_argument("--images-per-prompt", type=int, default=20)
    parser.add_argument("--batch", type=int, help="default: the preset's")
    parser.add_argument("--slow", type=float, default=1.0, help="seconds added to every write of the slow store")
    options = parser.parse_args(arguments)
    if options.clock == "cpu":
        parser.error("waiting takes no processor time: --clock wall is the only one that sees it")
    with tempfile.TemporaryDirectory() as name:
        rows = compare(options, Path(name))
    print(f"{describe(options)}\n{options.prompts} prompts of {options.images_per_prompt} images, "
          f"{options.prompts_per_shard} prompts a shard\n\n{format_table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
