"""A loaded model that generates images: text embeddings, batches across prompts, sampling, decoding, encoding."""

import copy
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from typing import TypeVar

import numpy as np

from hgdpo_core.config import PoolConfig, SamplerConfig
from hgdpo_core.errors import StoppedError
from hgdpo_core.images import encode_image
from hgdpo_core.models.acceleration import attention_by, refuse_acceleration, share_compiled
from hgdpo_core.models.backbone import Conditioning, Decoded, load_backbone
from hgdpo_core.models.model import Model
from hgdpo_core.models.sampling import initial_noise, sample_latents
from hgdpo_core.parallel import count_threads, parallel_map
from hgdpo_core.progress import ShouldStop, never_stop
from hgdpo_core.prompts import image_seed, prompt_id

logger = logging.getLogger(__name__)

T = TypeVar("T")

ENCODER_THREADS = 2

Sampled = tuple[Sequence[tuple[int, int]], list[int], Decoded]
"""A batch of (prompt number, image index), its seeds and its images."""


class ImageGenerator:
    """A loaded model that generates candidates; one per process."""

    def __init__(self, model: Model, sampler: SamplerConfig, pool: PoolConfig, device: str):
        refuse_acceleration(sampler, model.dtype, device)
        self.device, self.model, self.sampler, self.pool = device, model, sampler, pool
        self.backbone = load_backbone(model, device)
        base = replace(model, lora=None)
        self.reference = load_backbone(base, device).denoiser if sampler.latent_normalisation else None
        self.solver = self.backbone.schedule.solver()
        self.threads = 1 if sampler.compile else count_threads(self.backbone.denoiser, device)
        if sampler.compile:
            share_compiled(sampler.attention)
            for part in (self.backbone.denoiser, self.reference, self.backbone.codec):
                if part is not None:
                    part.compile_for_sampling()

    def generate(self, prompts: Sequence[str], should_stop: ShouldStop = never_stop) -> Iterator[dict]:
        """Rows of SCHEMA for every candidate of the prompts: in order, but prompts with longer embeddings last.

        `in_float32`, beside those columns: whether the image could be decoded in float32 only.

        Batches cross prompts of equally long embeddings and are cut at fixed positions, so a shard gives the same bits.
        One batch is encoded while the next is sampled; on a CPU a small model samples a batch per core.
        """
        texts = self.backbone.text.encode(prompts)
        lengths = [text.length for text in texts]
        batches = list(_cut_batches(lengths, self.pool.images_per_prompt, self.pool.batch_size))
        threads = self.threads if len(batches) >= self.threads else 1  # too few to fill the cores: each takes them all

        def jobs() -> Iterator[Callable[[], Sampled]]:
            for batch in batches:
                if should_stop():
                    raise StoppedError("stopped while generating a pool; finished shards are kept")
                yield functools.partial(self._sample_batch, prompts, texts, batch)

        waiting: list[Future[dict]] = []
        with ThreadPoolExecutor(ENCODER_THREADS) as executor:
            for batch, seeds, decoded in parallel_map(jobs(), threads):
                yield from (future.result() for future in waiting)
                waiting = [executor.submit(self._row, prompts[number], index, seed, image, row in decoded.in_float32)
                           for row, ((number, index), seed, image) in enumerate(
                               zip(batch, seeds, decoded.pixels, strict=True))]
            yield from (future.result() for future in waiting)

    def _sample_batch(self, prompts: Sequence[str], texts: Sequence[Conditioning],
                      batch: Sequence[tuple[int, int]]) -> Sampled:
        seeds = [image_seed(self.pool.seed, prompts[number], index) for number, index in batch]
        return batch, seeds, self.sample(Conditioning.join([texts[number] for number, _ in batch]), seeds)

    def sample(self, prompts: Conditioning, seeds: Sequence[int]) -> Decoded:
        """B images for the conditioning of B prompts and one seed per image.

        Compiled networks are given full batches, so that they are compiled for one shape: the last image fills them up.
        """
        backbone, count = self.backbone, len(seeds)
        surplus = max(0, self.pool.batch_size - count) if self.sampler.compile else 0
        if surplus:
            prompts = Conditioning.join([prompts, *[prompts[-1:]] * surplus])
            seeds = [*seeds, *[seeds[-1]] * surplus]
        noise = initial_noise(seeds, *backbone.latent_shape((self.sampler.width, self.sampler.height)))
        negative = backbone.text.negative(prompts.length)
        solver = copy.deepcopy(self.solver)  # it remembers steps, and other batches may be sampled beside this one
        with attention_by(self.sampler.attention):
            latents = sample_latents(backbone.denoiser, solver, prompts, negative, noise,
                                     steps=self.sampler.steps, guidance_scale=self.sampler.guidance_scale,
                                     reference=self.reference)
            pixels, in_float32 = backbone.codec.decode(latents)
        return Decoded(pixels[:count], [row for row in in_float32 if row < count])

    def _row(self, prompt: str, index: int, seed: int, pixels: np.ndarray, in_float32: bool) -> dict:
        return {"prompt_id": prompt_id(prompt), "prompt": prompt, "index": index, "seed": seed,
                "image": encode_image(pixels, self.pool.image_format),
                "width": self.sampler.width, "height": self.sampler.height, "in_float32": in_float32}


def _cut_batches(lengths: Sequence[int], images: int, size: int) -> Iterator[Sequence[tuple[int, int]]]:
    """(prompt number, image index) of every image in batches of at most `size`, each of one embedding length."""
    order = sorted(range(len(lengths)), key=lambda number: lengths[number])
    for _, numbers in groupby(order, key=lambda number: lengths[number]):
        yield from chunks([(number, index) for number in numbers for index in range(images)], size)


def chunks(items: Sequence[T], size: int) -> Iterable[Sequence[T]]:
    return (items[start:start + size] for start in range(0, len(items), size))
