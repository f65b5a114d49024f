"""Generating a pool side by side: our pipeline against a loop of diffusers' pipeline, each with its best batch.

    python -m benchmarks.pool                                     # the figures target on the CPU
    python -m benchmarks.pool --clock cpu --threads 1             # on a machine that others use too
    python -m benchmarks.pool --size sd15 --device cuda --prompts 4 --batches 8 16 32 --trials channels_last compile
    python -m benchmarks.pool --size tiny --dtype float32         # seconds, to see that the pipeline of sd15 runs

The loop is what a user would write: prompt by prompt, `num_images_per_prompt`, one generator per image, every image
saved as PNG. Ours is `PoolPlan.make`, from prompts to committed shards. Same weights, precision, scheduler, steps,
guidance and seeds; models are loaded before the clock starts, and every batch size is warmed up. A batch that does not
fit is skipped. The script fails where the images differ by more than the tolerance it prints.
"""

import argparse
import copy
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.targets import add_device_options, clock_of, dense_rate, describe, open_target, some_prompts
from hgdpo_core.config import PoolConfig, RunConfig
from hgdpo_core.devices import DTYPES
from hgdpo_core.images import decode_image
from hgdpo_core.models import Model
from hgdpo_core.models.image_generator import ImageGenerator
from hgdpo_core.models.sd15 import KlCodec
from hgdpo_core.prompts import image_seed
from hgdpo_core.stages.base import Worker
from hgdpo_core.stages.pool import PoolPlan, plan_pool
from hgdpo_core.storage import Store

LARGEST_IN_FLOAT32 = 1
MEAN_IN_HALF_PRECISION = 0.5
"""Of 255: the tolerance. In half precision another batch size alone moves single pixels by some steps."""
TRIALS = ("channels_last", "compile")
Images = Callable[[], np.ndarray]
"""Reads the images, uint8 [B, H, W, 3], in the order of prompts and indices; after the clock has stopped."""


@dataclass
class Row:
    """One line of the table."""

    what: str
    batch: int
    images_per_second: float
    images: np.ndarray


class Loop:
    """What a user would write with diffusers alone."""

    def __init__(self, model: Model, config: RunConfig, device: str):
        self.config, self.device = config, device
        pipeline = StableDiffusionPipeline.from_pretrained(model.path, dtype=DTYPES[model.dtype])
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
        self.pipeline = pipeline.to(device)
        self.pipeline.set_progress_bar_config(disable=True)

    def generate(self, prompts: Sequence[str], batch: int, folder: Path | None) -> Images:
        """Saved in `folder` where one is given."""
        pool, sampler, images = self.config.pool, self.config.sampler, []
        for number, prompt in enumerate(prompts):
            for first in range(0, pool.images_per_prompt, batch):
                indices = range(first, min(first + batch, pool.images_per_prompt))
                generated: Any = self.pipeline(
                    prompt, width=sampler.width, height=sampler.height, num_inference_steps=sampler.steps,
                    guidance_scale=sampler.guidance_scale, num_images_per_prompt=len(indices),
                    generator=[torch.Generator().manual_seed(image_seed(0, prompt, j)) for j in indices])
                if folder is not None:
                    for j, image in zip(indices, generated.images, strict=True):
                        image.save(folder / f"{number}-{j}.png")
                images += generated.images
        return lambda: np.stack([np.asarray(image) for image in images])


class Ours:
    """`PoolPlan.make` with a generator that stays loaded."""

    def __init__(self, model: Model, config: RunConfig, device: str):
        self.config = config
        self.generator = ImageGenerator(model, config.sampler, config.pool, device)

    def generate(self, prompts: Sequence[str], batch: int, folder: Path | None) -> Images:
        """As the shards hold them; torch.OutOfMemoryError where the batch had to be halved."""
        if folder is None:
            raise ValueError("a pool needs a folder")
        pool = self.config.pool.model_copy(update={"batch_size": batch})
        plan = plan_pool(Store(str(folder)), self.generator.model, self.config.sampler, pool, prompts)
        self.generator.pool = pool
        plan.make(Worker(network=self.generator))
        if self.generator.pool.batch_size < batch:
            raise torch.OutOfMemoryError(f"a batch of {batch} was halved")
        return lambda: _read_images(plan, prompts)

    def trial(self, name: str) -> "Ours":
        """The same with one change of TRIALS that the product does not make."""
        other = copy.copy(self)
        other.generator = copy.copy(self.generator)
        backbone = self.generator.backbone
        denoiser, codec = copy.deepcopy(backbone.denoiser), copy.deepcopy(backbone.codec)
        vae: Any = cast(KlCodec, codec).vae
        if name == "channels_last":
            denoiser.network.to(memory_format=torch.channels_last)
            vae.to(memory_format=torch.channels_last)
        else:
            denoiser.network.compile()
        other.generator.backbone = replace(backbone, denoiser=denoiser, codec=codec)
        return other


def _read_images(plan: PoolPlan, prompts: Sequence[str]) -> np.ndarray:
    rows = [row for index in plan.indices for row in plan.folder.read(index).to_pylist()]
    order = {prompt: number for number, prompt in enumerate(prompts)}
    rows.sort(key=lambda row: (order[row["prompt"]], row["index"]))
    return np.stack([np.asarray(decode_image(row["image"])) for row in rows])


def flops_per_image(generator: ImageGenerator) -> int:
    """Floating point operations of one image's denoising and decoding, counted on shapes alone."""
    sampler, backbone = generator.sampler, generator.backbone
    denoiser: Any = copy.deepcopy(backbone.denoiser).to("meta")
    vae: Any = torch.nn.Module.to(copy.deepcopy(cast(KlCodec, backbone.codec).vae), "meta")
    branches = 2 if sampler.guidance_scale > 1 else 1
    prompts = backbone.text.negative(backbone.text.chunk_length).to("meta").expand(branches)
    shape = backbone.latent_shape((sampler.width, sampler.height))
    latents = torch.empty((branches, *shape), device="meta", dtype=prompts.embeds.dtype)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused attention of CPUs is not counted
        with FlopCounterMode(display=False) as step:
            denoiser(latents, torch.empty((), device="meta"), prompts)
        with FlopCounterMode(display=False) as decoding:
            vae.decode(latents[:1].to(vae.dtype))
    return step.get_total_flops() * sampler.steps + decoding.get_total_flops()


def measure(generate: Callable[[Sequence[str], int, Path | None], Images], prompts: Sequence[str],
            batches: Sequence[int], options: argparse.Namespace, now: Callable[[], float], what: str, *,
            save: bool = True) -> Row:
    """The best batch that fits: its images a second, the median of the repeats; and its images."""
    best: Row | None = None
    for batch in batches:
        try:
            with tempfile.TemporaryDirectory() as name:  # warms up every size of batch that comes
                generate(prompts, batch, Path(name))
            seconds, images = [], np.empty(0)
            for _ in range(options.repeats):
                with tempfile.TemporaryDirectory() as name:
                    start = now()
                    read = generate(prompts, batch, Path(name) if save else None)
                    seconds.append(now() - start)
                    images = read()
        except torch.OutOfMemoryError:
            print(f"{what}: a batch of {batch} does not fit", file=sys.stderr)
            continue
        row = Row(what, batch, len(images) / statistics.median(seconds), images)
        if best is None or row.images_per_second > best.images_per_second:
            best = row
    if best is None:
        sys.exit(f"error: no batch of {what} fits: try smaller ones than {', '.join(map(str, batches))}")
    return best


def differences(row: Row, first: Row) -> tuple[int, float]:
    """Largest and mean difference of two rows' pixels, of 255."""
    difference = np.abs(row.images.astype(int) - first.images.astype(int))
    return int(difference.max()), float(difference.mean())


def within_tolerance(largest: int, mean: float, dtype: str) -> bool:
    return largest <= LARGEST_IN_FLOAT32 if dtype == "float32" else mean <= MEAN_IN_HALF_PRECISION


def format_table(rows: Sequence[Row], flops: float, dense: float) -> str:
    """A Markdown table; the first row is what the others are compared with."""
    lines = ["| side | batch | images/s | ratio | of the dense rate | largest difference | mean difference |",
             "|---|---|---|---|---|---|---|"]
    for row in rows:
        largest, mean = differences(row, rows[0])
        lines.append(f"| {row.what} | {row.batch} | {row.images_per_second:.3g} | "
                     f"{row.images_per_second / rows[0].images_per_second:.2f}x | "
                     f"{100 * row.images_per_second * flops / dense:.0f} % | {largest} | {mean:.2g} |")
    return "\n".join(lines)


def compare(options: argparse.Namespace, folder: Path) -> tuple[list[Row], float, float]:
    """All rows, FLOPs an image and the dense rate."""
    now = clock_of(options)
    model, config = open_target(options.size, folder, options.dtype)
    config = config.model_copy(update={"pool": PoolConfig(
        images_per_prompt=options.images_per_prompt, prompts_per_shard=config.pool.prompts_per_shard)})
    prompts = some_prompts(options.prompts)
    dense = dense_rate(options.device, options.dtype, now)
    loop = Loop(model, config, options.device)
    rows = [measure(loop.generate, prompts, options.loop_batches, options, now, "loop of pipe(), images saved")]
    rows.append(measure(loop.generate, prompts, [rows[0].batch], options, now, "the same, not saved", save=False))
    del loop
    ours = Ours(model, config, options.device)
    rows.append(measure(ours.generate, prompts, options.batches, options, now, "ours, shards committed"))
    for name in options.trials:
        rows.append(measure(ours.trial(name).generate, prompts, [rows[2].batch], options, now, f"trial: ours, {name}"))
    return rows, flops_per_image(ours.generator), dense


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and report whether the images agree."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_device_options(parser)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--images-per-prompt", type=int, default=20)
    parser.add_argument("--batches", type=int, nargs="+", default=[20, 40, 80], help="of ours, to choose the best from")
    parser.add_argument("--loop-batches", type=int, nargs="+", default=[10, 20], help="of the loop")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--trials", nargs="*", choices=TRIALS, default=[], help="changes the product does not make")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        rows, flops, dense = compare(options, Path(name))
    tolerance = (f"largest difference {LARGEST_IN_FLOAT32}" if options.dtype == "float32"
                 else f"mean difference {MEAN_IN_HALF_PRECISION}")
    print(f"{describe(options)}\n{options.prompts} prompts of {options.images_per_prompt} images; {flops / 1e9:.4g} "
          f"GFLOP an image; dense products run at {dense / 1e12:.3g} TFLOP/s, which is a bound of {dense / flops:.4g} "
          f"images/s\ntolerance: {tolerance} of 255\n\n{format_table(rows, flops, dense)}")
    wrong = [row.what for row in rows if not within_tolerance(*differences(row, rows[0]), options.dtype)]
    if wrong:
        print(f"error: beyond the tolerance: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
