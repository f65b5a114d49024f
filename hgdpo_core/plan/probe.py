"""Timed probes: a little of each stage's work on this machine's device, thrown away. Each loads the stage's model."""

import gc
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from hgdpo_core.config import DpoConfig, PoolConfig, SamplerConfig, ScorerConfig, SftConfig
from hgdpo_core.models import DTYPES, Model, default_device, load_pipeline
from hgdpo_core.models.image_generator import ImageGenerator
from hgdpo_core.models.sampling import encode_latents
from hgdpo_core.scorers import load_scorer
from hgdpo_core.stages.latents import ENCODE_BATCH, embedding_shapes
from hgdpo_core.training import epoch_order
from hgdpo_core.training.data import ImageBatch, PairBatch
from hgdpo_core.training.dpo import train_dpo
from hgdpo_core.training.sft import train_sft

MAX_SECONDS = 60.0  # of timed drawing; a machine that is slower than this gets a smaller batch
STEPS = 3


class Drawing(NamedTuple):
    """What an image costs: seconds, and bytes as it is stored (None where a whole image would have taken too long)."""

    seconds: float
    bytes: int | None


def draw(model: Model, sampler: SamplerConfig, pool: PoolConfig, prompt: str) -> Drawing:
    """A batch in 1 and in 3 sampling steps, reckoned up to all steps; and one image in all of them, if time allows."""
    _free()
    generator = ImageGenerator(model, sampler, pool, default_device())

    def drawn(images: int, steps: int) -> list[dict]:
        generator.sampler = sampler.model_copy(update={"steps": steps})
        generator.pool = pool.model_copy(update={"images_per_prompt": images, "batch_size": images})
        return list(generator.generate([prompt]))

    def timed(images: int, steps: int) -> float:
        return _timed(lambda: drawn(images, steps))

    timed(1, 1)  # what loads late, compiles or is chosen by trying
    single = timed(1, 1)
    images = max(1, min(pool.batch_size, int(MAX_SECONDS / (4 * single))))
    one, three = timed(images, 1), timed(images, STEPS)
    step = max(0.0, three - one) / (STEPS - 1)
    finished = drawn(1, sampler.steps) if single * sampler.steps <= MAX_SECONDS else ()
    return Drawing(seconds=(one + (sampler.steps - 1) * step) / images,
                   bytes=len(finished[0]["image"]) if finished else None)


def score_seconds(scorer: ScorerConfig, size: tuple[int, int], prompt: str) -> float:
    """Seconds an image of (width, height): one batch of noise, after one image that warms up."""
    _free()
    judge = load_scorer(scorer.name, source=scorer.source, device=default_device(), dtype=DTYPES[scorer.dtype])
    images = np.random.default_rng(0).integers(0, 256, (scorer.batch_size, size[1], size[0], 3), dtype=np.uint8)
    judge.score(images[:1], [prompt])
    seconds = _timed(lambda: judge.score(images, [prompt] * len(images)))
    return seconds / len(images)


def encode_seconds(model: Model, size: tuple[int, int]) -> float:
    """Seconds for the latents of one image: one batch of noise, after one image that warms up."""
    _free()
    pipeline = load_pipeline(model, default_device(), vae_dtype="float32")
    pixels = torch.rand(ENCODE_BATCH, 3, size[1], size[0], generator=torch.Generator().manual_seed(0)) * 2 - 1
    encode_latents(pipeline.vae, pixels[:1])
    seconds = _timed(lambda: encode_latents(pipeline.vae, pixels))
    return seconds / ENCODE_BATCH


def step_seconds(model: Model, config: DpoConfig | SftConfig, size: tuple[int, int]) -> float:
    """Seconds of one optimizer step on noise: the later ones of a few, in memory, without a checkpoint."""
    _free()
    pipeline = load_pipeline(model, default_device(), dtype="float32")
    shapes = embedding_shapes(pipeline, size)
    moments: list[float] = []
    config = config.model_copy(update={"max_steps": STEPS, "flip": False})  # flips cost when latents are made

    def clock(done: int, total: int, unit: str) -> None:
        moments.append(time.monotonic())

    latents, embeds = tuple(shapes["latent_shape"]), tuple(shapes["embeds_shape"])
    if isinstance(config, DpoConfig):
        train_dpo(pipeline.unet, pipeline.scheduler.config, _NoisePairs(latents, embeds), config, checkpoints=None,
                  progress=clock)
    else:
        train_sft(pipeline.unet, pipeline.scheduler.config, _NoiseImages(latents, embeds), config,
                  torch.zeros(1, *embeds), checkpoints=None, progress=clock)
    return (moments[-1] - moments[1]) / (STEPS - 1)  # the first moment is before, the second after the first step


class _Noise:
    """Endless random samples."""

    def __init__(self, latent_shape: tuple[int, ...], embeds_shape: tuple[int, ...]):
        self.latent_shape, self.embeds_shape = latent_shape, embeds_shape

    def __len__(self) -> int:
        return 1024

    def order(self, seed: int, epoch: int) -> Sequence[int]:
        return epoch_order(len(self), seed, epoch)


class _NoisePairs(_Noise):
    def batch(self, indices: Sequence[int]) -> PairBatch:
        count = len(indices)
        return PairBatch(torch.randn(count, *self.latent_shape), torch.randn(count, *self.latent_shape),
                         torch.randn(count, *self.embeds_shape))


class _NoiseImages(_Noise):
    def batch(self, indices: Sequence[int]) -> ImageBatch:
        return ImageBatch(torch.randn(len(indices), *self.latent_shape),
                          torch.randn(len(indices), *self.embeds_shape))


def _timed(work: Callable[[], object]) -> float:
    start = time.monotonic()
    work()
    return time.monotonic() - start


def _free() -> None:
    """One model at a time: what the last probe loaded goes before the next one loads."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
