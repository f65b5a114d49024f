"""Whether scoring and encoding take as long as the slowest of fetching, decoding and computing, not as their sum.

    python -m benchmarks.read_ahead                                    # 704x1024, minutes
    python -m benchmarks.read_ahead --shards 3 --prompts-per-shard 1 --images-per-prompt 2 --width 64 --height 96

There is no GPU here: the scorer and the VAE are fakes that sleep as long as an H100 would compute, by the estimates of
`--score-images` and `--latent-images` a second, and release the interpreter as its driver does. Everything else is the
program's: a store whose every request takes `--latency` seconds more, shards of PNG images of noise on soft colours,
decoded and cropped as PickScore does. Each of the three is also measured alone, in the same run; what is written is
reported apart, since it is hidden too.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from benchmarks.score import make_images
from benchmarks.targets import some_prompts
from hgdpo_core.config import PoolConfig, SamplerConfig, ScorerConfig, TargetConfig
from hgdpo_core.images import decode_image, encode_image, to_model_range
from hgdpo_core.models import Backbone, Conditioning, Model, find_model
from hgdpo_core.prompts import prompt_id
from hgdpo_core.scorers.pixels import Prepared, crop_pixels
from hgdpo_core.stages import Stage
from hgdpo_core.stages.base import Worker
from hgdpo_core.stages.latents import PAIRS, LatentStage, latent_folder
from hgdpo_core.stages.pool import SCHEMA, PoolPlan, plan_pool
from hgdpo_core.stages.scores import ScoreStage
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder

SIDE = 224  # what PickScore sees


class SlowStore(Store):
    """A local store whose every request takes some seconds more."""

    latency = 0.0

    def _attempt(self, doing: str, key: str, function: Callable[..., Any], *args: Any) -> Any:
        time.sleep(self.latency)
        return super()._attempt(doing, key, function, *args)


@dataclass
class FakeScorer:
    """Sleeps for each image; its score is a mean of the pixels that PickScore would see."""

    seconds: float

    def prepare(self, image: Image.Image) -> Prepared:
        return Prepared(crop_pixels([image], SIDE)[0].numpy())

    def score(self, images: Sequence[Prepared], prompts: Sequence[str]) -> torch.Tensor:
        time.sleep(self.seconds * len(images))
        return torch.tensor([float(image.pixels[0, 0].mean()) for image in images])


@dataclass
class FakeCodec:
    """Sleeps for each image; its latents are every eighth pixel."""

    seconds: float

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds * len(images))
        return images[:, [0, 1, 2, 0], ::8, ::8].contiguous()


@dataclass(frozen=True)
class FakeLatentStage(LatentStage):
    """With a VAE and a text encoder that compute nothing."""

    seconds: float = 0.0

    def backbone(self, device: str) -> Backbone:
        text = SimpleNamespace(encode=lambda prompts: [Conditioning(torch.zeros(1, 77, 768))] * len(prompts),
                               pooled_width=None)
        fake: Any = SimpleNamespace(codec=FakeCodec(self.seconds), text=text, shapes=lambda size: {})
        return fake


@dataclass(frozen=True)
class Row:
    """One line of the table; all in seconds."""

    what: str
    images: int
    fetching: float
    decoding: float
    computing: float
    writing: float
    together: float

    @property
    def ratio(self) -> float:
        """To the slowest of the three alone."""
        return self.together / max(self.fetching, self.decoding, self.computing)


def write_images(options: argparse.Namespace, store: Store, model: Model) -> tuple[PoolPlan, ShardFolder]:
    """A pool, and pairs of as many images, of a few images that repeat."""
    plan = plan_pool(store, model, SamplerConfig(width=options.width, height=options.height),
                     PoolConfig(images_per_prompt=options.images_per_prompt,
                                prompts_per_shard=options.prompts_per_shard),
                     some_prompts(options.shards * options.prompts_per_shard))
    files = [encode_image(np.asarray(image), "png") for image in make_images(8, options.width, options.height)]
    triplets = ShardFolder.create(store, "triplets/hand", {"stage": "triplets"})
    for shard in plan.shards:
        rows = [{"prompt_id": prompt_id(prompt), "prompt": prompt, "index": index, "seed": 0,
                 "image": files[index % len(files)], "width": options.width, "height": options.height}
                for prompt in shard.prompts for index in range(options.images_per_prompt)]
        plan.folder.commit(shard.index, pa.Table.from_pylist(rows, schema=SCHEMA),
                           details={"prompt_ids": shard.prompt_ids})
        pairs = [{"prompt_id": best["prompt_id"], "caption": best["prompt"], "jpg_0": best["image"],
                  "jpg_1": worst["image"]} for best, worst in zip(rows[::2], rows[1::2], strict=True)]
        triplets.commit(shard.index, pa.Table.from_pylist(pairs, schema=PAIRS))
    return plan, triplets


def measure(what: str, stage: Stage, worker: Worker, images: int, store: SlowStore, latency: float) -> Row:
    """Each part alone, then the stage as it runs."""
    store.latency = latency
    (source,), manifests = stage.sources, stage.sources[0].manifests()
    start = time.perf_counter()
    for index in stage.indices:
        tables = [source.read(index, manifest=manifests[index])]
    fetched = time.perf_counter()
    with stage.load(worker) as computer:
        for index in stage.indices:
            batches = list(computer.batches(index, tables))
        decoded = time.perf_counter()
        for index in stage.indices:
            rows = computer.compute(index, tables, iter(batches), worker, lambda units: None)
    computed = time.perf_counter()
    other = ShardFolder.create(store, f"alone/{what}", {"stage": what})
    begun = time.perf_counter()
    for index in stage.indices:
        other.commit(index, rows.table)
    written = time.perf_counter()
    stage.make(worker)
    together = time.perf_counter() - written
    return Row(what, images, fetched - start, decoded - fetched, computed - decoded, written - begun, together)


def decoded_by_a_core(options: argparse.Namespace) -> dict[str, float]:
    """Images a second that one core makes ready, by processor time: decoded, and decoded and cropped."""
    data = [encode_image(np.asarray(image), "png") for image in make_images(8, options.width, options.height)]
    scorer, rates = FakeScorer(0.0), {}
    for name, prepare in (("decoded", decode_image), ("for a VAE", lambda data: to_model_range(decode_image(data))),
                          ("for a scorer", lambda data: scorer.prepare(decode_image(data)))):
        start = time.process_time()
        for image in data:
            prepare(image)
        rates[name] = len(data) / (time.process_time() - start)
    return rates


def compare(options: argparse.Namespace, folder: Path) -> list[Row]:
    """Scoring and encoding."""
    store, model = SlowStore(str(folder)), find_model(TargetConfig(source="figures", dtype="float32"))
    plan, triplets = write_images(options, store, model)
    scorer = ScorerConfig(source="figures", batch_size=options.batch)
    size = (options.width, options.height)
    latents = FakeLatentStage(triplets, latent_folder(store, triplets, model, size), model, tuple(plan.indices),
                              seconds=1 / options.latent_images)
    return [measure("scoring", ScoreStage.of(plan, scorer),
                    Worker("cpu", network=FakeScorer(1 / options.score_images)), plan.images, store, options.latency),
            measure("latents", latents, Worker("cpu"), plan.images, store, options.latency)]


def format_table(rows: Sequence[Row]) -> str:
    """A Markdown table, of seconds; but for the last two columns of each part alone."""
    lines = ["| stage | images | fetching | decoding | computing | writing | together | ratio |", "|---" * 8 + "|"]
    lines += [f"| {row.what} | {row.images} | {row.fetching:.2f} | {row.decoding:.2f} | {row.computing:.2f} | "
              f"{row.writing:.2f} | {row.together:.2f} | {row.ratio:.2f}x |" for row in rows]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shards", type=int, default=10)
    parser.add_argument("--prompts-per-shard", type=int, default=4)
    parser.add_argument("--images-per-prompt", type=int, default=20, help="even: pairs are made of them")
    parser.add_argument("--width", type=int, default=704)
    parser.add_argument("--height", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=32, help="of the scorer")
    parser.add_argument("--latency", type=float, default=0.05, help="seconds that each request to the store takes more")
    parser.add_argument("--score-images", type=float, default=600.0, help="images/s of PickScore in bf16 on an H100")
    parser.add_argument("--latent-images", type=float, default=26.0, help="images/s of the VAE in float32 on an H100")
    options = parser.parse_args(arguments)
    rates = decoded_by_a_core(options)
    with tempfile.TemporaryDirectory() as name:
        rows = compare(options, Path(name))
    print(f"{options.shards} shards, {options.width}x{options.height} PNG, {options.latency:g} s a request, "
          f"{os.cpu_count()} cores; a scorer that sleeps as for {options.score_images:g} images/s, a VAE as for "
          f"{options.latent_images:g}\none core: " + ", ".join(f"{rate:.3g} images/s {name}"
                                                             for name, rate in rates.items())
          + f"\n\n{format_table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
