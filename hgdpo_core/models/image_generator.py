"""A loaded model that generates images: text embeddings, batches across prompts, sampling, decoding, encoding."""

import copy
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import groupby
from typing import TypeVar

import numpy as np
import torch

from hgdpo_core.config import PoolConfig, SamplerConfig
from hgdpo_core.errors import StoppedError
from hgdpo_core.images import encode_image
from hgdpo_core.models.acceleration import attention_by, refuse_acceleration, share_compiled
from hgdpo_core.models.backbone import Conditioning, Decoded, load_backbone
from hgdpo_core.models.model import Model
from hgdpo_core.models.personaliser import PersonalText
from hgdpo_core.models.sampling import initial_noise, sample_latents
from hgdpo_core.parallel import count_threads, parallel_map
from hgdpo_core.progress import ShouldStop, never_stop
from hgdpo_core.prompts import caption_of, concept_of, image_seed, prompt_id
from hgdpo_core.prompts.concepts import Concept

logger = logging.getLogger(__name__)

T = TypeVar("T")

ENCODER_THREADS = 2

Candidate = tuple[int, int]
"""The number of its prompt, and its own among that prompt's images."""
Sampled = tuple[Sequence[Candidate], Decoded]
"""A batch and its images."""


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

    def learn(self, concepts: Iterable[Concept]) -> None:
        """Read the concepts of samples that will be generated, once each; of a model that reads none, nothing."""
        text, adapter = self.backbone.text, self.model.personaliser
        if adapter is not None and isinstance(text, PersonalText):
            for concept in concepts:
                text.learn(concept.id, concept.crops(adapter.config.crop))

    def generate(self, prompts: Sequence[str], should_stop: ShouldStop = never_stop) -> Iterator[dict]:
        """Rows of SCHEMA for every candidate of the prompts: in order, but prompts with longer embeddings last.

        Beside those columns: `in_float32`, whether the image could be decoded in float32 only; `concept` and `caption`,
        None without.

        Batches cross prompts of equally long embeddings and are cut at fixed positions, so a shard gives the same bits.
        One batch is encoded while the next is sampled; on a CPU a small model samples a batch per core.
        """
        texts = self.backbone.text.encode(prompts)
        lengths = [text.length for text in texts]
        batches = _cut_batches(lengths, self.pool.images_per_prompt, self.pool.batch_size)
        jobs = [functools.partial(self._sample_batch, prompts, texts, batch) for batch in batches]
        yield from self.rows(prompts, self.compute(jobs, should_stop))

    def compute(self, jobs: Sequence[Callable[[], T]], should_stop: ShouldStop) -> Iterator[T]:
        """What each job, a batch, returns; StoppedError before one when the work should end."""
        def stoppable() -> Iterator[Callable[[], T]]:
            for job in jobs:
                if should_stop():
                    raise StoppedError("stopped while generating a pool; finished shards are kept")
                yield job

        # too few to fill the cores: each takes them all
        return parallel_map(stoppable(), self.threads if len(jobs) >= self.threads else 1)

    def rows(self, prompts: Sequence[str], batches: Iterable[Sampled]) -> Iterator[dict]:
        """The rows of finished batches; one is encoded while the next is sampled."""
        waiting: list[Future[dict]] = []
        with ThreadPoolExecutor(ENCODER_THREADS) as executor:
            for batch, decoded in batches:
                yield from (future.result() for future in waiting)
                waiting = [executor.submit(self._row, prompts[number], index, image, row in decoded.in_float32)
                           for row, ((number, index), image) in enumerate(zip(batch, decoded.pixels, strict=True))]
            yield from (future.result() for future in waiting)

    def seed(self, prompt: str, index: int) -> int:
        """The seed of a prompt's candidate."""
        return image_seed(self.pool.seed, prompt, index)

    def _sample_batch(self, prompts: Sequence[str], texts: Sequence[Conditioning],
                      batch: Sequence[Candidate]) -> Sampled:
        seeds = [self.seed(prompts[number], index) for number, index in batch]
        return batch, self.sample(Conditioning.join([texts[number] for number, _ in batch]), seeds)

    def sample(self, prompts: Conditioning, seeds: Sequence[int]) -> Decoded:
        """B images for the conditioning of B prompts and one seed per image."""
        backbone, rows = self.backbone, self.filled(range(len(seeds)))
        prompts = Conditioning.join([prompts, *[prompts[-1:]] * (len(rows) - len(seeds))])
        noise = initial_noise([seeds[row] for row in rows],
                              *backbone.latent_shape((self.sampler.width, self.sampler.height)))
        negative = backbone.text.negative(prompts.length)
        solver = copy.deepcopy(self.solver)  # it remembers steps, and other batches may be sampled beside this one
        with self.attention():
            latents = sample_latents(backbone.denoiser, solver, prompts, negative, noise,
                                     steps=self.sampler.steps, guidance_scale=self.sampler.guidance_scale,
                                     reference=self.reference)
        return self.decode(latents, len(seeds))

    def filled(self, batch: Sequence[T]) -> Sequence[T]:
        """A batch as networks are given it: compiled ones get full batches, filled up with the last, for one shape."""
        surplus = max(0, self.pool.batch_size - len(batch)) if self.sampler.compile else 0
        return [*batch, *[batch[-1]] * surplus] if surplus else batch

    def decode(self, latents: torch.Tensor, count: int) -> Decoded:
        """The first `count` images of scaled latents."""
        with self.attention():
            pixels, in_float32 = self.backbone.codec.decode(latents)
        return Decoded(pixels[:count], [row for row in in_float32 if row < count])

    def attention(self) -> AbstractContextManager[object]:
        """Inside, attention is computed by the kernel that the settings name."""
        return attention_by(self.sampler.attention)

    def _row(self, prompt: str, index: int, pixels: np.ndarray, in_float32: bool) -> dict:
        return {"prompt_id": prompt_id(prompt), "prompt": prompt, "concept": concept_of(prompt),
                "caption": caption_of(prompt), "index": index, "seed": self.seed(prompt, index),
                "image": encode_image(pixels, self.pool.image_format),
                "width": self.sampler.width, "height": self.sampler.height, "in_float32": in_float32}


def _cut_batches(lengths: Sequence[int], images: int, size: int) -> Iterator[Sequence[Candidate]]:
    """Every candidate in batches of at most `size`, each of one embedding length."""
    for candidates in equally_long(lengths, images):
        yield from chunks(candidates, size)


def equally_long(lengths: Sequence[int], images: int) -> Iterator[list[Candidate]]:
    """Every candidate, those whose embeddings are equally long together."""
    order = sorted(range(len(lengths)), key=lambda number: lengths[number])
    for _, numbers in groupby(order, key=lambda number: lengths[number]):
        yield [(number, index) for number in numbers for index in range(images)]


def chunks(items: Sequence[T], size: int) -> Iterable[Sequence[T]]:
    return (items[start:start + size] for start in range(0, len(items), size))
