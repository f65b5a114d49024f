"""Timed probes: a little of a stage's work on this machine's device, thrown away. Each loads the stage's model."""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, get_args

import numpy as np
import torch

from hgdpo_core.config import Attention, PoolConfig, SamplerConfig, ScorerConfig
from hgdpo_core.devices import default_device, device_name, free_memory
from hgdpo_core.errors import ConfigError
from hgdpo_core.models import Model, load_backbone
from hgdpo_core.models.image_generator import ImageGenerator
from hgdpo_core.models.racing import relative_cost
from hgdpo_core.scorers import load_configured_scorer
from hgdpo_core.stages.base import Probe

MAX_SECONDS = 60.0  # of timed sampling; a machine that is slower than this gets a smaller batch
STEPS = 3
ENCODE_BATCH = 16


def probe_generation(model: Model, sampler: SamplerConfig, pool: PoolConfig, prompt: str) -> Probe:
    """A batch in 1 and in 3 sampling steps, reckoned up to all steps; and one image in all of them, if time allows.

    On a GPU other kernels of attention are timed too, and compiled sampling by the fastest, for advice.
    """
    device = default_device()
    probe = _probe_sampler(model, sampler, pool, prompt, device)
    if not device.startswith("cuda"):
        return probe
    seconds: dict[tuple[Attention, bool], float] = {(sampler.attention, sampler.compile): probe.seconds}

    def attempt(attention: Attention, compile: bool) -> None:
        other = sampler.model_copy(update={"attention": attention, "compile": compile})
        if (attention, compile) not in seconds:
            with suppress(ConfigError):  # this machine has no such kernel, or no compiler
                seconds[attention, compile] = _probe_sampler(model, other, pool, prompt, device, whole=False).seconds

    for attention in get_args(Attention):
        attempt(attention, sampler.compile)
    attempt(min(seconds, key=seconds.__getitem__)[0], not sampler.compile)  # by the fastest kernel alone: minutes
    measured = sorted((value, f"sampler.attention={attention} sampler.compile={str(compiled).lower()}")
                      for (attention, compiled), value in seconds.items())
    return probe._replace(advice=f"seconds an image on {device_name(device)}: " + ", ".join(
        f"{name} {value:.3g}" for value, name in measured) + ": the first is the fastest; another choice than yours "
        "makes another pool")


def _probe_sampler(model: Model, sampler: SamplerConfig, pool: PoolConfig, prompt: str, device: str, *,
                   whole: bool = True) -> Probe:
    """`whole`: one image in all steps too."""
    free_memory()
    generator = ImageGenerator(model, sampler, pool, device)

    def generated(images: int, steps: int) -> list[dict[str, Any]]:
        generator.sampler = sampler.model_copy(update={"steps": steps})
        generator.pool = pool.model_copy(update={"images_per_prompt": images, "batch_size": images})
        return list(generator.generate([prompt]))

    def timed(images: int, steps: int) -> float:
        return _timed(lambda: generated(images, steps))

    timed(1, 1)  # what loads late, compiles or is chosen by trying
    single = timed(1, 1)
    images = max(1, min(pool.batch_size, int(MAX_SECONDS / (4 * single))))
    if sampler.compile:
        timed(images, 1)  # compiles for this batch
    one, three = timed(images, 1), timed(images, STEPS)
    step = max(0.0, three - one) / (STEPS - 1)
    finished = generated(1, sampler.steps) if whole and single * sampler.steps <= MAX_SECONDS else ()
    return Probe(seconds=(one + (sampler.steps - 1) * step) / images,
                 bytes=len(finished[0]["image"]) if finished else None, decoding=max(0.0, one - step) / images)


def probe_race(model: Model, sampler: SamplerConfig, pool: PoolConfig, scorer: ScorerConfig, prompt: str) -> Probe:
    """One candidate of a raced pool: its share of the steps, of the images decoded at each cut and at the end, and of
    the scores at the cuts."""
    image = probe_generation(model, sampler, pool, prompt)
    score = probe_scoring(scorer, (sampler.width, sampler.height), prompt).seconds
    candidates = pool.images_per_prompt
    predicted = candidates + sum(cut.keep for cut in pool.race[:-1])
    sampling = relative_cost(pool.race, candidates, sampler.steps) * (image.seconds - image.decoding)
    return image._replace(seconds=sampling + (
        (predicted + pool.images_kept) * image.decoding + predicted * score) / candidates)


def probe_scoring(scorer: ScorerConfig, size: tuple[int, int], prompt: str) -> Probe:
    """One batch of noise of (width, height) pixels, after one image that warms up."""
    free_memory()
    loaded = load_configured_scorer(scorer, default_device())
    images = np.random.default_rng(0).integers(0, 256, (scorer.batch_size, size[1], size[0], 3), dtype=np.uint8)
    loaded.score(images[:1], [prompt])
    return Probe(_timed(lambda: loaded.score(images, [prompt] * len(images))) / len(images))


def probe_encoding(model: Model, size: tuple[int, int]) -> Probe:
    """The latents of one batch of noise, after one image that warms up."""
    free_memory()
    codec = load_backbone(model, default_device(), codec_dtype="float32").codec
    pixels = torch.rand(ENCODE_BATCH, 3, size[1], size[0], generator=torch.Generator().manual_seed(0)) * 2 - 1
    codec.encode(pixels[:1])
    return Probe(_timed(lambda: codec.encode(pixels)) / ENCODE_BATCH)


def _timed(work: Callable[[], object]) -> float:
    start = time.monotonic()
    work()
    return time.monotonic() - start
