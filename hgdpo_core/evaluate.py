"""Target and tuned model compared: same prompts, same seeds; win rates, score changes, defects, colours, intervals."""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hgdpo_core.config import DrawingConfig, EvaluationConfig, PoolConfig, SamplerConfig
from hgdpo_core.config.base import content_hash
from hgdpo_core.errors import InputError
from hgdpo_core.images import decode_image
from hgdpo_core.metrics import ColourShift, WinRate, paired_scores, win_rate
from hgdpo_core.models import Model
from hgdpo_core.parallel import thread_map
from hgdpo_core.prompts import caption_of, concept_of, prompt_id
from hgdpo_core.scorers import defect_limit
from hgdpo_core.stages.identities import people_of, read_distances
from hgdpo_core.stages.pool import PoolPlan, plan_pool
from hgdpo_core.stages.scores import read_scores
from hgdpo_core.statistics import intervals
from hgdpo_core.statistics.clusters import Crossed
from hgdpo_core.statistics.colours import ColourChange, ColourHistograms, PromptColours, colour_change
from hgdpo_core.statistics.diversity import DIMENSIONS, thumbnail, variety_change
from hgdpo_core.statistics.identity import IdentityChange, clustered_win_rate, identity_change
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder


@dataclass(frozen=True)
class Comparison:
    """The numbers of an evaluation. Scores are averages over a prompt's images, in the order of `prompts`."""

    evaluation_id: str
    prompts: list[str]
    win_rates: dict[str, WinRate]
    target_scores: dict[str, list[float]]
    tuned_scores: dict[str, list[float]]
    colour_shift: ColourShift
    lora_weight: float | None
    """None where the tuned model has no LoRA."""
    images_per_prompt: int
    score_changes: dict[str, intervals.ScoreChange]
    win_rate_intervals: dict[str, intervals.Interval | None]
    """Bootstrap over prompts; only with several images per prompt, beside the exact interval, and without concepts."""
    defects: dict[str, intervals.DefectChange]
    """By scorers that detect defective images (their module declares DEFECT_BELOW)."""
    colour_change: ColourChange
    target_histograms: ColourHistograms
    tuned_histograms: ColourHistograms
    variety_change: intervals.Estimate
    """Percent by which the tuned model's images differ more from each other than the target's."""
    identity: Mapping[str, IdentityChange] = field(default_factory=dict)
    """By judges of identity, where the samples have concepts; all intervals are then over people and prompts."""

    @property
    def people(self) -> int:
        """How many people the samples are about; 0 without concepts."""
        return len({concept for prompt in self.prompts if (concept := concept_of(prompt))})

    def findings(self) -> dict[str, Any]:
        """All numbers as plain JSON values under the names of `summary.json`."""
        personal: dict[str, Any] = {} if not self.people else {
            "people": self.people, "identity": {name: change.as_dict() for name, change in self.identity.items()}}
        return {
            "win_rate": {name: rate.as_dict() for name, rate in self.win_rates.items()},
            "win_rate_bootstrap": {name: interval and {"ci_low": interval.low, "ci_high": interval.high}
                                   for name, interval in self.win_rate_intervals.items()},
            "score_change": {name: change.as_dict() for name, change in self.score_changes.items()},
            "defect_rate": {name: change.as_dict() for name, change in self.defects.items()},
            "colour_shift": self.colour_shift.as_dict(), "colour_change": self.colour_change.as_dict(),
            "variety_change": self.variety_change.as_dict(),
            "lora_weight": self.lora_weight, "images_per_prompt": self.images_per_prompt, **personal}


def plan_evaluation(store: Store, model: Model, sampler: SamplerConfig, pool: DrawingConfig, config: EvaluationConfig,
                    prompts: Sequence[str]) -> PoolPlan:
    """The pool of one model's images for an evaluation: `images_per_prompt` each, seeds from evaluation.seed.

    Latent normalisation, where the sampler has it on, is for models with a LoRA; others are sampled without it.
    Prompts are read in `evaluation.prompt_syntax`, whatever the syntax of the training prompts.
    """
    drawing = {name: getattr(pool, name) for name in DrawingConfig.model_fields}  # its steps and race are a pool's own
    settings = PoolConfig.model_validate({**drawing, "images_per_prompt": config.images_per_prompt,
                                          "seed": config.seed})
    return plan_pool(store, model.reading(config.prompt_syntax), sampler if model.lora else sampler.plain, settings,
                     prompts)


def refuse_seen_prompts(evaluation: Sequence[str], training: Sequence[str]) -> None:
    """InputError when a prompt of the evaluation is one of training to a text encoder."""
    if seen := seen_prompts(evaluation, training):
        raise InputError(f"{len(seen)} of {len(evaluation)} evaluation prompts occur in training (case and "
                         f"spaces aside), the first is {seen[0]!r}: evaluate on prompts the model was not tuned on")


def seen_prompts(prompts: Sequence[str], others: Sequence[str]) -> list[str]:
    """Which prompts are among others to a text encoder, which reads neither case nor the number of spaces; sorted."""
    known = set(map(_as_read, others))
    return sorted(prompt for prompt in set(prompts) if _as_read(prompt) in known)


def _as_read(prompt: str) -> str:
    """As CLIP's tokenizer reads a text before it cuts it into tokens."""
    return " ".join(unicodedata.normalize("NFC", prompt).lower().split())


def compare(store: Store, target: PoolPlan, tuned: PoolPlan, target_scores: Mapping[str, ShardFolder],
            tuned_scores: Mapping[str, ShardFolder], prompts: Sequence[str], config: EvaluationConfig,
            faces: "FacePairs | None" = None) -> Comparison:
    """The tuned model against the target, by every scorer and in colour; kept in `evaluations/<id>/`.

    `faces`: both models' identity distances, where the prompts are samples with concepts.
    """
    identity = {"target": target.folder.key, "tuned": tuned.folder.key, "prompts": list(prompts),
                "scores": {name: [target_scores[name].key, tuned_scores[name].key] for name in target_scores}}
    if faces is not None:
        identity |= {"concepts": people_of(prompts), "captions": list(map(caption_of, prompts)), "margin": faces.margin,
                     "identities": {name: [folder.key for folder in both] for name, both in faces.folders.items()}}
    evaluation_id = f"{len(prompts)}-{content_hash(identity)}"
    before = {name: image_scores(folder, target, prompts) for name, folder in target_scores.items()}
    after = {name: image_scores(folder, tuned, prompts) for name, folder in tuned_scores.items()}
    (target_colours, target_thumbnails), (tuned_colours, tuned_thumbnails) = (
        look_at_images(plan, prompts) for plan in (target, tuned))
    crossed = faces.clusters(prompts) if faces else None
    result = Comparison(
        evaluation_id, list(prompts),
        {name: faces.win_rate(after[name], before[name], prompts) if faces else win_rate(after[name], before[name])
         for name in before},
        {name: scores.mean(axis=1).tolist() for name, scores in before.items()},
        {name: scores.mean(axis=1).tolist() for name, scores in after.items()},
        tuned_colours.total().shift_from(target_colours.total()), tuned.model.lora and tuned.model.lora.weight,
        images_per_prompt=config.images_per_prompt,
        score_changes={name: intervals.score_change(after[name], before[name], crossed) for name in before},
        win_rate_intervals={name: intervals.win_rate_interval(after[name], before[name]) for name in before
                            if config.images_per_prompt > 1 and faces is None},
        defects={name: intervals.defect_change(after[name], before[name], below, crossed) for name in before
                 if (below := defect_limit(name)) is not None},
        colour_change=colour_change(tuned_colours.statistics, target_colours.statistics, crossed),
        target_histograms=target_colours.histograms, tuned_histograms=tuned_colours.histograms,
        variety_change=variety_change(tuned_thumbnails, target_thumbnails, crossed),
        identity={} if faces is None else faces.changes(target, tuned, prompts))
    store.write_json(f"evaluations/{evaluation_id}/config.json", {**identity, "config": config.model_dump(mode="json")})
    store.write_json(f"evaluations/{evaluation_id}/result.json", {
        **result.findings(), "prompts": list(prompts), "target_scores": result.target_scores,
        "tuned_scores": result.tuned_scores, "colour_histograms": {
            "target": result.target_histograms.as_dict(), "tuned": result.tuned_histograms.as_dict()}})
    return result


@dataclass(frozen=True)
class FacePairs:
    """What a personalised comparison has beside scores: both models' identity distances, and what recurs in samples."""

    folders: Mapping[str, tuple[ShardFolder, ShardFolder]]
    """Name of the judge -> distances of target and tuned model."""
    prompts: Sequence[str]
    """Of each sample, as they were written: with one person's words or another's a prompt is the same."""
    margin: float

    def clusters(self, samples: Sequence[str]) -> Crossed:
        """What recurs in samples: people and prompts."""
        return Crossed.of(people_of(samples), self.prompts)

    def win_rate(self, after: np.ndarray, before: np.ndarray, samples: Sequence[str]) -> WinRate:
        """Of scores [P, K], with its interval over people and prompts."""
        a, b = (side.mean(axis=1) for side in paired_scores("win_rate", after, before))
        return clustered_win_rate(a > b, a < b, int((a == b).sum()), people_of(samples), self.prompts)

    def changes(self, target: PoolPlan, tuned: PoolPlan, samples: Sequence[str]) -> dict[str, IdentityChange]:
        """What each judge finds."""
        people = people_of(samples)
        return {name: identity_change(read_distances(before, target, samples), read_distances(after, tuned, samples),
                                      people, self.prompts, self.margin)
                for name, (before, after) in self.folders.items()}


def image_scores(scores: ShardFolder, plan: PoolPlan, prompts: Sequence[str]) -> np.ndarray:
    """Scores of all images, float64 [P, K]: row i is `prompts[i]`, column j the image of index j."""
    values: dict[str, dict[int, float]] = {}
    for index in plan.indices:
        values |= read_scores(scores.read(index))
    images = range(plan.pool.images_per_prompt)
    return np.array([[values[prompt_id(prompt)][image] for image in images] for prompt in prompts], dtype=np.float64)


def look_at_images(plan: PoolPlan, prompts: Sequence[str]) -> tuple[PromptColours, np.ndarray]:
    """Colours and thumbnails [P, K, D] of all images of the prompts, read shard by shard."""
    positions = {prompt_id(prompt): position for position, prompt in enumerate(prompts)}
    colours = PromptColours.of(len(prompts))
    thumbnails = np.zeros((len(prompts), plan.pool.images_per_prompt, DIMENSIONS), dtype=np.float32)
    for index in plan.indices:
        rows = plan.folder.read(index)
        images = [image for image in zip(*(rows[name] for name in ("prompt_id", "index", "image")), strict=True)
                  if image[0].as_py() in positions]
        decoded = thread_map(lambda image: np.asarray(decode_image(image[2].as_py())), images)
        for (key, number, _), image in zip(images, decoded, strict=True):
            colours.add(positions[key.as_py()], image)
            thumbnails[positions[key.as_py()], number.as_py()] = thumbnail(image)
    return colours, thumbnails


def read_images(plan: PoolPlan, prompts: Sequence[str]) -> dict[str, bytes]:
    """First image (index 0) of each of a few prompts, as encoded bytes."""
    texts = {prompt_id(prompt): prompt for prompt in prompts}
    rows = (row for shard in plan.shards if texts.keys() & set(shard.prompt_ids)
            for row in plan.folder.read(shard.index).select(["prompt_id", "index", "image"]).to_pylist())
    return {texts[row["prompt_id"]]: row["image"] for row in rows if row["index"] == 0 and row["prompt_id"] in texts}
