"""What `gpu_check` runs: each part takes a `Setting` and returns its rows, or raises where something is not right."""

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import dpo_step, pool, score
from benchmarks.dpo_step import Pairs
from benchmarks.targets import random_target, some_prompts
from hgdpo_core.config import RunConfig, SamplerConfig, TargetConfig
from hgdpo_core.config.presets import sd15
from hgdpo_core.errors import first_line
from hgdpo_core.images import decode_image, encode_image, to_model_range
from hgdpo_core.models import Model, find_model, load_backbone
from hgdpo_core.models.image_generator import ImageGenerator
from hgdpo_core.scorers import pickscore
from hgdpo_core.scorers.weights import freeze
from hgdpo_core.stages.base import Worker
from hgdpo_core.stages.latents import LatentStage, latent_folder
from hgdpo_core.stages.pool import plan_pool
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder
from hgdpo_core.training.base import Hooks, TrainingResult
from hgdpo_core.training.checkpoints import COMPLETE, Checkpoints
from hgdpo_core.training.data import ImageBatch, LatentPairs
from hgdpo_core.training.loop import run_training
from hgdpo_core.training.objective import find_objective

PIXEL_LIMITS = {"float32": 1.0, "bfloat16": 6.0, "float16": 3.0}
"""Mean difference of 255 from the CPU's images in float32: TF32 or half precision through every layer."""
SCORE_LIMIT, LATENT_LIMIT = 0.05, 0.05
"""In PickScore's points, and in the units of latents, of order 1: TF32, and sums in another order."""
RESUMED_LIMIT = 0.02
"""Relative, of a loss: attention's backward pass on a GPU adds in another order every time."""
LOG_2_LIMIT = 1e-3
"""Of the first DPO loss from log 2: policy and reference are one network still."""
TINY: dict[str, dict[str, Any]] = {
    "unet": {"block_out_channels": (32, 32), "layers_per_block": 1, "norm_num_groups": 8, "cross_attention_dim": 32,
             "attention_head_dim": 4, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
             "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")},
    "vae": {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4},
    "text_encoder": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}}
"""Two blocks of a UNet in place of four: a CPU runs all parts in seconds."""
SPEED_STEPS = 20
REPEATS = 3


@dataclass(frozen=True)
class Row:
    """A number; with a `limit` it is a check. None where it could not be measured, which `unit` then explains."""

    what: str
    value: float | None
    unit: str
    limit: float | None = None

    @property
    def holds(self) -> bool:
        return self.limit is None or self.value is not None and self.value <= self.limit


@dataclass(frozen=True)
class Setting:
    """A device, "sd15" or "tiny", a scratch folder; and what several parts use, made when first asked for."""

    device: str
    size: str
    folder: Path

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def is_tiny(self) -> bool:
        return self.size == "tiny"

    @cached_property
    def model(self) -> Model:
        """In bfloat16."""
        path = random_target(self.folder / "target", TINY if self.is_tiny else {}, in_range=True)
        return find_model(TargetConfig(source=str(path), dtype="bfloat16"))

    @cached_property
    def config(self) -> RunConfig:
        """The preset, small where the models are."""
        config = sd15(str(self.folder / "target"), "prompts.txt")
        if not self.is_tiny:
            return config
        return config.model_copy(update={
            "sampler": config.sampler.model_copy(update={"width": 32, "height": 48, "steps": 2}),
            "dpo": config.dpo.model_copy(update={"batch_size": 2}),
            "pool": config.pool.model_copy(update={"batch_size": 2})})

    @property
    def image_size(self) -> tuple[int, int]:
        return self.config.sampler.width, self.config.sampler.height

    @cached_property
    def pairs(self) -> Pairs:
        """Two batches of triplets, and their latents as the stage caches them."""
        store, count = Store(str(self.folder / "root")), 2 * self.config.dpo.batch_size
        files = [encode_image(np.asarray(image), "png") for image in score.make_images(2 * count, *self.image_size)]
        captions = some_prompts(count)
        triplets = ShardFolder.create(store, "triplets/check", {"stage": "triplets"})
        triplets.commit(0, pa.table({"prompt_id": captions, "caption": captions, "jpg_0": files[:count],
                                     "jpg_1": files[count:]}))
        latents = latent_folder(store, triplets, self.model, self.image_size)
        LatentStage(triplets, latents, self.model, (0,)).make(Worker(self.device))
        return Pairs(files[:count], files[count:], captions, LatentPairs(latents, [0]))

    def now(self) -> float:
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def options(self, **others: Any) -> argparse.Namespace:
        """As the benchmarks' own scripts read them."""
        return argparse.Namespace(device=self.device, size=self.size, dtype="bfloat16", **others)


# -- is it right


def draw_shard(setting: Setting) -> list[Row]:
    """One shard, from prompts to its commit, in a few steps."""
    sampler = setting.config.sampler.model_copy(update={"steps": 2 if setting.is_tiny else 8})
    pool_config = setting.config.pool.model_copy(update={"images_per_prompt": setting.config.pool.batch_size})
    plan = plan_pool(Store(str(setting.folder / "pool")), setting.model, sampler, pool_config, some_prompts(1))
    start = setting.now()
    made = plan.make(Worker(setting.device))
    return [Row(f"{made} images in {sampler.steps} steps, loading included", setting.now() - start, "s")]


def compare_images(setting: Setting) -> list[Row]:
    """Two small images in each precision, against those of the CPU in float32."""
    side = 32 if setting.is_tiny else 256
    sampler = SamplerConfig(width=side, height=side, steps=2, guidance_scale=5.0)
    two = setting.config.pool.model_copy(update={"images_per_prompt": 2})

    def draw(device: str, dtype: str) -> np.ndarray:
        generator = ImageGenerator(replace(setting.model, dtype=dtype), sampler, two, device)
        rows = generator.generate(some_prompts(1))
        return np.stack([np.asarray(decode_image(row["image"])) for row in rows]).astype(float)

    expected = draw("cpu", "float32")
    if expected.std() < 5:
        raise RuntimeError("the CPU's images are nearly of one colour: nothing could differ")
    return [Row(f"{dtype}, mean difference of pixels", float(np.abs(draw(setting.device, dtype) - expected).mean()),
                "of 255", limit)
            for dtype, limit in PIXEL_LIMITS.items() if setting.on_gpu or dtype == "bfloat16"]


def compare_scores(setting: Setting) -> list[Row]:
    """A scorer in the shape of PickScore, in float32, on both."""
    made = score.random_scorer("tiny" if setting.is_tiny else "full")
    images, prompts = score.make_images(4, *setting.image_size), score.PROMPTS[:4]

    def scored(device: str) -> torch.Tensor:
        ours = pickscore.PickScore(freeze(made.model, device), made.tokenizer, made.processor, "")
        return ours.score(images, prompts)

    difference = (scored("cpu") - scored(setting.device)).abs().max().item()
    return [Row("largest difference of 4 scores", difference, "points", SCORE_LIMIT)]


def encode_latents(setting: Setting) -> list[Row]:
    """The latents that training reads, at full size; and small ones against the CPU's."""
    start = setting.now()
    count = 2 * len(setting.pairs.latents)
    rows = [Row(f"{count} images encoded, loading included", setting.now() - start, "s")]
    pixels = torch.from_numpy(np.stack([to_model_range(image) for image in score.make_images(2, 64, 64)]))
    latents = {device: load_backbone(setting.model, device, codec_dtype="float32").codec.encode(pixels)
               for device in {setting.device, "cpu"}}
    difference = (latents[setting.device] - latents["cpu"]).abs().max().item()
    return [*rows, Row("largest difference of latents", difference, "", LATENT_LIMIT)]


class _Winners:
    """The winners of pairs, as fine-tuning reads images."""

    def __init__(self, pairs: LatentPairs):
        self._pairs, self.order = pairs, pairs.order

    def __len__(self) -> int:
        return len(self._pairs)

    def batch(self, indices: Sequence[int]) -> ImageBatch:
        batch = self._pairs.batch(indices)
        return ImageBatch(batch.winner_latents, batch.prompt_embeds)


def train(setting: Setting, kind: str, precision: str, **settings: Any) -> list[Row]:
    """Three steps by the preset, then the third once more from the checkpoint of the second: the losses agree."""
    samples: Any = setting.pairs.latents if kind == "dpo" else _Winners(setting.pairs.latents)
    config = getattr(setting.config, kind).model_copy(update={
        "max_steps": 3, "checkpoint_every": 2, "batch_size": setting.config.dpo.batch_size, "global_batch_size": None,
        "warmup_steps": 1, "mixed_precision": precision, "optimizer": "adam8bit" if setting.on_gpu else "adamw",
        **settings})

    def run(checkpoints: Checkpoints) -> TrainingResult:
        backbone = load_backbone(setting.model, dtype="float32")
        objective = find_objective(kind).prepare(backbone, setting.model, config)
        return run_training(objective, samples, config, checkpoints, Hooks())

    with tempfile.TemporaryDirectory(dir=setting.folder) as name:  # gigabytes
        checkpoints = Checkpoints(Store(name), "checkpoints")
        straight = run(checkpoints)
        checkpoints.store.delete(f"{checkpoints.key}/step-3/{COMPLETE}")
        resumed = run(checkpoints)
    if resumed.resumed_from != 2:
        raise RuntimeError(f"training resumed from step {resumed.resumed_from}, expected 2")
    first, last, again = straight.log[0], straight.log[-1]["loss"], resumed.log[-1]["loss"]
    rows = [Row("a step, the first and checkpoints included", straight.seconds / 3, "s"),
            Row("third loss, resumed against straight", abs(again - last) / abs(last), "relative", RESUMED_LIMIT)]
    if kind == "dpo":
        rows.append(Row("first DPO loss, from log 2", abs(first["dpo_loss"] - math.log(2)), "", LOG_2_LIMIT))
    return rows


# -- is it fast


def time_attention(setting: Setting) -> list[Row]:
    """Self-attention of the first blocks at 704x1024, a batch of 8 with guidance; forward, and with backward."""
    shape = (2, 2, 96, 40) if setting.is_tiny else (16, 8, 11264, 40)
    query, key, value = (torch.randn(shape, device=setting.device, dtype=torch.bfloat16, requires_grad=True)
                         for _ in range(3))
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    rows = []
    for backend in backends if setting.on_gpu else backends[:1]:
        def forward(backend: SDPBackend = backend) -> torch.Tensor:
            with sdpa_kernel([backend]):
                return F.scaled_dot_product_attention(query, key, value)

        name = backend.name.removesuffix("_ATTENTION").lower()
        for what, work in ((f"{name} forward", forward), (f"{name} forward and backward",
                                                          lambda forward=forward: forward().sum().backward())):
            try:
                rows.append(Row(what, 1000 * _seconds(setting, work), "ms"))
            except RuntimeError as error:
                rows.append(Row(what, None, f"not available: {first_line(error)}"))
    return rows


def _seconds(setting: Setting, work: Callable[[], object]) -> float:
    """The median of a few, after one that warms up."""
    work()
    marks = [setting.now()]
    for _ in range(REPEATS):
        work()
        marks.append(setting.now())
    return statistics.median(np.diff(marks).tolist())


Generate = Callable[[Sequence[str], int, Path | None], pool.Images]


def _eager_loop(setting: Setting, config: RunConfig) -> Generate:
    return pool.Loop(setting.model, config, setting.device).generate


def _compiled_loop(setting: Setting, config: RunConfig) -> Generate:
    """As diffusers' guide to fast inference has it."""
    loop = pool.Loop(setting.model, config, setting.device)
    pipeline: Any = loop.pipeline
    for network in (pipeline.unet, pipeline.vae):
        network.to(memory_format=torch.channels_last)
    pipeline.unet.compile()
    pipeline.vae.decode = torch.compile(pipeline.vae.decode)
    return loop.generate


def _ours(setting: Setting, config: RunConfig) -> Generate:
    return pool.Ours(setting.model, config, setting.device).generate


def _ours_compiled(setting: Setting, config: RunConfig) -> Generate:
    sampler = config.sampler.model_copy(update={"compile": True})
    return pool.Ours(setting.model, config.model_copy(update={"sampler": sampler}), setting.device).generate


POOL_SIDES: dict[str, Callable[[Setting, RunConfig], Generate]] = {
    "eager diffusers loop": _eager_loop, "compiled diffusers loop": _compiled_loop, "ours": _ours,
    "ours compiled": _ours_compiled}


def time_pool(setting: Setting, side: str) -> list[Row]:
    """A batch of images, the second time it is drawn: networks are loaded and compiled by then."""
    steps, batch = 2 if setting.is_tiny else SPEED_STEPS, setting.config.pool.batch_size
    config = setting.config.model_copy(update={
        "sampler": setting.config.sampler.model_copy(update={"steps": steps}),
        "pool": setting.config.pool.model_copy(update={"images_per_prompt": batch})})
    generate, seconds = POOL_SIDES[side](setting, config), 0.0
    for _ in range(2):
        with tempfile.TemporaryDirectory() as name:
            start = setting.now()
            read = generate(some_prompts(1), batch, Path(name))
            seconds = setting.now() - start
            read()
    return [Row(f"{side}, batch {batch}, {steps} steps", batch / seconds, "images/s")]


def time_scoring(setting: Setting) -> list[Row]:
    """PickScore's snippet one by one, and ours."""
    count, size = (4, "tiny") if setting.is_tiny else (64, "full")
    rows = score.compare(argparse.Namespace(
        clock="wall", source=None, size=size, device=setting.device, dtypes=["float32", "bfloat16"], images=count,
        images_per_prompt=20, batch=count // 2, width=setting.image_size[0], height=setting.image_size[1]))
    return [Row(f"{row.what}, {row.dtype}, batch {row.batch}", 1 / row.seconds_per_image, "images/s") for row in rows]


def time_dpo_step(setting: Setting) -> list[Row]:
    """The public example's step, and ours with the statistic matching loss, under autocast and in pure bf16."""
    preset = setting.config.dpo
    config = preset.model_copy(update={"max_steps": dpo_step.WARM_UP_STEPS + REPEATS, "mixed_precision": "bf16",
                                       "global_batch_size": None})
    plain = config.model_copy(update={"lambda_stat": 0.0})
    pure = config.model_copy(update={"autocast": False})
    options, batch = setting.options(), config.batch_size
    rows = [dpo_step.run_example(setting.model, setting.pairs, plain, options, setting.now),
            *(dpo_step.run_ours(setting.model, setting.pairs, settings, options, setting.now)
              for settings in (config, pure))]
    return [Row(f"{row.what}, {batch} pairs", row.seconds, "s a step") for row in rows]
