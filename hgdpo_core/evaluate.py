"""Target against tuned model: same prompts, same seeds, win rates by every scorer, colour shift, pairs to look at."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hgdpo_core.config import EvaluationConfig, PoolConfig, SamplerConfig, content_hash
from hgdpo_core.errors import InputError
from hgdpo_core.generate import PoolPlan, plan_pool
from hgdpo_core.images import decode_image
from hgdpo_core.metrics import ColourShift, ColourStatistics, WinRate, win_rate
from hgdpo_core.models import Model
from hgdpo_core.prompts import prompt_id
from hgdpo_core.shards import ShardFolder
from hgdpo_core.storage import Store


@dataclass(frozen=True)
class Comparison:
    """What an evaluation found. Scores are means over a prompt's images, in the order of `prompts`."""

    evaluation_id: str
    prompts: list[str]
    win_rates: dict[str, WinRate]
    target_scores: dict[str, list[float]]
    tuned_scores: dict[str, list[float]]
    colour_shift: ColourShift
    lora_weight: float


def plan_evaluation(store: Store, model: Model, sampler: SamplerConfig, pool: PoolConfig, config: EvaluationConfig,
                    prompts: Sequence[str]) -> PoolPlan:
    """The pool of one model's images for an evaluation: `images_per_prompt` each, seeds from evaluation.seed."""
    settings = pool.model_copy(update={"images_per_prompt": config.images_per_prompt, "seed": config.seed})
    return plan_pool(store, model, sampler, settings, prompts)


def refuse_seen_prompts(evaluation: Sequence[str], training: Sequence[str]) -> None:
    """InputError when a prompt of the evaluation occurs in training."""
    seen = sorted(set(evaluation) & set(training))
    if seen:
        raise InputError(f"{len(seen)} of {len(evaluation)} evaluation prompts occur in training, the first is "
                         f"{seen[0]!r}: evaluate on prompts the model was not tuned on")


def compare(store: Store, target: PoolPlan, tuned: PoolPlan, target_scores: Mapping[str, ShardFolder],
            tuned_scores: Mapping[str, ShardFolder], prompts: Sequence[str], config: EvaluationConfig) -> Comparison:
    """Win rates of the tuned model over the target, and its colour shift; kept in `evaluations/<id>/`."""
    identity = {"target": target.folder.key, "tuned": tuned.folder.key, "prompts": list(prompts),
                "scores": {name: [target_scores[name].key, tuned_scores[name].key] for name in target_scores}}
    evaluation_id = f"{len(prompts)}-{content_hash(identity)}"
    means_target = {name: mean_scores(folder, target, prompts) for name, folder in target_scores.items()}
    means_tuned = {name: mean_scores(folder, tuned, prompts) for name, folder in tuned_scores.items()}
    result = Comparison(
        evaluation_id, list(prompts),
        {name: win_rate(np.array(means_tuned[name]), np.array(means_target[name])) for name in target_scores},
        means_target, means_tuned,
        colour_statistics(tuned, prompts).shift_from(colour_statistics(target, prompts)),
        config.lora_weight)
    store.write_json(f"evaluations/{evaluation_id}/config.json", {**identity, "config": config.model_dump(mode="json")})
    store.write_json(f"evaluations/{evaluation_id}/result.json", {
        "lora_weight": config.lora_weight,
        "win_rate": {name: rate.as_dict() for name, rate in result.win_rates.items()},
        "colour_shift": result.colour_shift.as_dict(), "prompts": list(prompts), "target_scores": means_target,
        "tuned_scores": means_tuned})
    return result


def mean_scores(scores: ShardFolder, plan: PoolPlan, prompts: Sequence[str]) -> list[float]:
    """A prompt's mean score over its images, in the order of `prompts`."""
    values: dict[str, list[float]] = {}
    for index in plan.indices:
        table = scores.read(index)
        for key, score in zip(table["prompt_id"].to_pylist(), table["score"].to_pylist(), strict=True):
            values.setdefault(key, []).append(score)
    return [float(np.mean(values[prompt_id(prompt)])) for prompt in prompts]


def colour_statistics(plan: PoolPlan, prompts: Sequence[str]) -> ColourStatistics:
    """Colour sums over all images of the prompts, read shard by shard."""
    wanted = {prompt_id(prompt) for prompt in prompts}
    statistics = ColourStatistics()
    for index in plan.indices:
        rows = plan.folder.read(index)
        for key, image in zip(rows["prompt_id"].to_pylist(), rows["image"], strict=True):
            if key in wanted:
                statistics.update(np.asarray(decode_image(image.as_py()))[None])
    return statistics


def read_images(plan: PoolPlan, prompts: Sequence[str]) -> dict[str, bytes]:
    """First image (index 0) of each of a few prompts, as encoded bytes."""
    wanted = {prompt_id(prompt): prompt for prompt in prompts}
    found: dict[str, bytes] = {}
    for shard in plan.shards:
        if not wanted.keys() & set(shard.prompt_ids):
            continue
        for row in plan.folder.read(shard.index).select(["prompt_id", "index", "image"]).to_pylist():
            if row["index"] == 0 and row["prompt_id"] in wanted:
                found[wanted[row["prompt_id"]]] = row["image"]
    return found
