"""Racing (ours): only candidates that will be ranked first or last are finished.

Generating is nearly all of a pool's cost, and training uses two images of a pool. Part of the way the solver predicts
each candidate's clean image; the ranking scorer scores these, the best and the worst go on, and the others end there.
The images that are finished are those that the whole pool would hold, up to the arithmetic of other batches.
"""

import copy
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from hgdpo_core.config import RaceCut
from hgdpo_core.models.backbone import Conditioning
from hgdpo_core.models.image_generator import Candidate, ImageGenerator, Sampled, chunks, equally_long
from hgdpo_core.models.sampling import Trajectory, guide, initial_noise
from hgdpo_core.progress import ShouldStop, never_stop

Score = Callable[[np.ndarray, list[str]], Sequence[float]]
"""Scores of images, uint8 [B, H, W, 3], for their B prompts; higher is better."""


class Ended(NamedTuple):
    """A candidate that a cut left out: no image was finished."""

    prompt: str
    index: int
    seed: int
    step: int
    """Steps that it was sampled for."""
    score: float
    """Of its predicted image."""


def race(generator: ImageGenerator, prompts: Sequence[str], score: Score,
         should_stop: ShouldStop = never_stop) -> Iterator[dict | Ended]:
    """Each candidate of the prompts, as a row of `ImageGenerator.generate` or as one that ended, in no fixed order.

    All candidates of equally long embeddings go together from cut to cut, in batches cut at fixed positions, so the
    same prompts give the same bits. Their latents are in memory at once: some 0.3 MB a candidate at 704x1024.
    """
    texts = generator.backbone.text.encode(prompts)
    for candidates in equally_long([text.length for text in texts], generator.pool.images_per_prompt):
        yield from _Race(generator, prompts, texts, score, should_stop).run(candidates)


class _Race:
    """The race of some prompts, whose embeddings are equally long."""

    def __init__(self, generator: ImageGenerator, prompts: Sequence[str], texts: Sequence[Conditioning], score: Score,
                 should_stop: ShouldStop):
        self.generator, self.prompts, self.texts, self.score = generator, prompts, texts, score
        self.should_stop, self.scale = should_stop, generator.sampler.guidance_scale

    def run(self, candidates: Sequence[Candidate]) -> Iterator[dict | Ended]:
        size, latents = self.generator.pool.batch_size, dict[Candidate, Trajectory]()
        for cut in self.generator.pool.race:
            scores: dict[Candidate, float] = {}
            jobs = [functools.partial(self._try, batch, latents, cut) for batch in chunks(candidates, size)]
            reached: dict[Candidate, Trajectory] = {}
            for batch, trajectory, pixels in self.generator.compute(jobs, self.should_stop):
                values = self.score(pixels, [self.prompts[number] for number, _ in batch])
                scores |= dict(zip(batch, values, strict=True))
                reached |= {candidate: trajectory.rows([row]) for row, candidate in enumerate(batch)}
            survivors = _choose(scores, cut.keep)
            yield from (self._ended(candidate, cut.after, scores[candidate]) for candidate in candidates
                        if candidate not in survivors)
            candidates = [candidate for candidate in candidates if candidate in survivors]
            latents = {candidate: reached[candidate] for candidate in candidates}
        jobs = [functools.partial(self._finish, batch, latents) for batch in chunks(candidates, size)]
        yield from self.generator.rows(self.prompts, self.generator.compute(jobs, self.should_stop))

    def _try(self, batch: Sequence[Candidate], latents: dict[Candidate, Trajectory],
             cut: RaceCut) -> tuple[Sequence[Candidate], Trajectory, np.ndarray]:
        """A batch on its way to a cut, and its predicted images."""
        trajectory = self._advance(batch, latents, cut.after)
        return batch, trajectory, self.generator.decode(trajectory.predicted, len(batch)).pixels

    def _finish(self, batch: Sequence[Candidate], latents: dict[Candidate, Trajectory]) -> Sampled:
        trajectory = self._advance(batch, latents, self.generator.sampler.steps)
        return batch, self.generator.decode(trajectory.latents, len(batch))

    def _advance(self, batch: Sequence[Candidate], latents: dict[Candidate, Trajectory], until: int) -> Trajectory:
        filled, backbone = self.generator.filled(batch), self.generator.backbone
        prompts = Conditioning.join([self.texts[number] for number, _ in filled])
        if latents:
            trajectory = Trajectory.join([latents[candidate] for candidate in filled])
        else:
            seeds = [self.generator.seed(self.prompts[number], index) for number, index in filled]
            noise = initial_noise(seeds, *backbone.latent_shape((self.generator.sampler.width,
                                                                 self.generator.sampler.height)))
            trajectory = Trajectory.begin(copy.deepcopy(self.generator.solver), noise, prompts.embeds,
                                          self.generator.sampler.steps)
        with self.generator.attention():
            conditioning = guide(prompts, backbone.text.negative(prompts.length), self.scale)
            trajectory.advance(backbone.denoiser, conditioning, self.scale, until)
        return trajectory

    def _ended(self, candidate: Candidate, step: int, score: float) -> Ended:
        prompt, index = self.prompts[candidate[0]], candidate[1]
        return Ended(prompt, index, self.generator.seed(prompt, index), step, score)


def _choose(scores: dict[Candidate, float], keep: int) -> set[Candidate]:
    """The best and the worst `keep` candidates of each prompt, half each, of an odd number one more of the best.

    Ties go to the lower number. Candidates whose score is not finite count as neither.
    """
    chosen: set[Candidate] = set()
    for number in {number for number, _ in scores}:
        own = [candidate for candidate in scores if candidate[0] == number]
        ranked = sorted((each for each in own if math.isfinite(scores[each])), key=lambda each: (-scores[each], each))
        middle = len(ranked) - len(ranked) // 2
        ranked[middle:middle] = [each for each in own if not math.isfinite(scores[each])]
        chosen |= {*ranked[:keep - keep // 2], *ranked[len(ranked) - keep // 2:]}
    return chosen


def relative_cost(cuts: Iterable[RaceCut], images: int, steps: int) -> float:
    """Steps that a raced pool of N = `images` takes, as a fraction of a whole one's; decoding and scoring aside."""
    taken, done, left = 0, 0, images
    for cut in cuts:
        taken, done, left = taken + left * (cut.after - done), cut.after, cut.keep
    return (taken + left * (steps - done)) / (images * steps)
