"""One arm with one training seed: triplets, LoRA, images, scores, results. Finished steps are not repeated."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pydantic import ValidationError

from hgdpo_core import pipeline
from hgdpo_core.ablate.arms import Arm, arm_config, evaluation_scorers
from hgdpo_core.ablate.program import Shared
from hgdpo_core.ablate.settings import World, feature_scorer
from hgdpo_core.built_in import FOREIGN_GUIDANCE, FOREIGN_SOURCE
from hgdpo_core.config import RunConfig, TargetConfig
from hgdpo_core.config.base import StageConfig, content_hash
from hgdpo_core.config.pair_source import PairSource
from hgdpo_core.errors import ConfigError
from hgdpo_core.evaluate import image_scores, plan_evaluation
from hgdpo_core.execution.runner import IN_PROCESS, Runner
from hgdpo_core.images import decode_image
from hgdpo_core.metrics import channel_means
from hgdpo_core.models import find_model
from hgdpo_core.models.published import find_record
from hgdpo_core.pair_sets import PairSet
from hgdpo_core.pair_sets.stand_ins import label_own, open_pairs
from hgdpo_core.parallel import thread_map
from hgdpo_core.progress import StageProgress, silent_stages
from hgdpo_core.prompts import PromptList, prompt_id, save_prompts
from hgdpo_core.run import Run
from hgdpo_core.scorers import defect_limit, find_scorer
from hgdpo_core.stages.distances import DistanceStage
from hgdpo_core.stages.features import FeatureStage, measure_spread
from hgdpo_core.stages.pair_sets import PairSetStage
from hgdpo_core.stages.pool import PoolPlan
from hgdpo_core.stages.triplets import TripletStage
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder
from hgdpo_core.training.tune import Tuned

FORMAT_VERSION = 1  # raise when the same arm would be measured differently
LAST_PART = 0.2  # of the training log, which `training` averages


class TrialResult(StageConfig):
    """What a trial of settings gave on validation prompts."""

    rate_factor: float
    length_factor: float
    win_rate: float
    """Against the target, by the ranking scorer; prompts without a difference count half."""


class WeightResult(StageConfig):
    """What a LoRA weight gave on validation prompts."""

    weight: float
    win_rate: float
    """As of a trial."""


class ArmRecord(StageConfig):
    """The results of an arm with one training seed; stored in `ablations/arms/`."""

    arm: dict[str, Any]
    seed: int
    triplets: int
    model_id: str
    evaluation_id: str
    win_rate: dict[str, dict[str, float | int | None]]
    gains: dict[str, list[float]]
    """Mean score of the tuned model minus that of the target, per prompt, by scorer."""
    defects: dict[str, list[float]]
    """Fraction of defective images, tuned minus target, per prompt, by scorers with a limit for defects."""
    colours: list[list[float]]
    """`channel_means` of each prompt's images, averaged."""
    colour_shift: dict[str, float | None]
    training: dict[str, float]
    """Means over the last fifth of the training log: loss and, of DPO, dpo_loss, stat_loss (unweighted) and
    implicit_accuracy."""
    warnings: list[str] = []
    """Names of the checks of a run that found something."""
    seconds: float | None = None
    """Of the training itself."""
    trials: list[TrialResult] = []
    """Of an arm whose settings are chosen; they are alike for all training seeds."""
    weights: list[WeightResult] = []
    """Of an arm whose LoRA weight is chosen."""


@dataclass(frozen=True)
class Diversity:
    """Mean pairwise distance of each prompt's images, and their pool."""

    pool: PoolPlan
    distances: list[float]


def run_arm(shared: Shared, arm: Arm, seed: int, stages: StageProgress = silent_stages,
            runner: Runner = IN_PROCESS) -> ArmRecord:
    """Train the arm with a seed and measure it against the target on the evaluation prompts.

    An existing record of the same settings, model, prompts and scorers is returned. Finished steps are not repeated,
    so a stopped arm continues where it stopped.
    """
    run = _arm_run(shared, arm, seed)
    key = f"ablations/arms/{_arm_id(shared, run.config, arm, run.pairs)}.json"
    cached = _read_record(run.store, key)
    if cached is not None:
        return cached
    trials = run_trials(shared, arm, stages, runner) if arm.chosen else []
    weights = try_weights(shared, arm, stages, runner) if arm.chosen_weight else []
    if weights:
        weight = max(weights, key=lambda tried: tried.win_rate).weight
        same = run_arm(shared, replace(arm, lora_weight=weight, chosen_weight=False), seed, stages, runner)
        record = same.model_copy(update={"arm": arm.identity(), "weights": weights})
        run.store.write_json(key, record.model_dump(mode="json"))
        return record
    tuned, triplets = train_arm(shared, arm, seed, stages, runner)
    prompts, model = run.evaluation_prompts.prompts, tuned.applied_to(shared.model, arm.lora_weight)
    images = pipeline.generate_evaluation(run, {"tuned": model}, runner, stages)["tuned"]
    scores = pipeline.score_evaluation(run, {"tuned": images}, runner, stages)["tuned"]
    target_scores = {name: shared.target_scores[name] for name in scores}
    result = pipeline.compare_models(run, {"target": shared.target_images, "tuned": images},
                                     {"target": target_scores, "tuned": scores})
    record = ArmRecord(
        arm=arm.identity(), seed=seed, triplets=triplets, model_id=tuned.model_id, evaluation_id=result.evaluation_id,
        win_rate={name: rate.as_dict() for name, rate in result.win_rates.items()},
        gains={name: np.subtract(result.tuned_scores[name], result.target_scores[name]).tolist() for name in scores},
        defects={name: _defect_difference(shared, name, images, scores[name], below) for name in scores
                 if (below := defect_limit(name)) is not None},
        colours=prompt_colours(images, prompts).round(6).tolist(), colour_shift=result.colour_shift.as_dict(),
        training=_last_means(tuned), warnings=[found.guard for found in pipeline.check_tuning(run, tuned, result)],
        seconds=_seconds(run.store, tuned), trials=trials)
    run.store.write_json(key, record.model_dump(mode="json"))
    return record


def run_trials(shared: Shared, arm: Arm, stages: StageProgress = silent_stages,
               runner: Runner = IN_PROCESS) -> list[TrialResult]:
    """The arm's trials: one training each with the first seed, compared with the target on validation prompts."""
    assert shared.validation is not None
    scorer, results = shared.ablation.run.config.scorer.name, []
    for rate, length in shared.ablation.settings.trials:
        tried = replace(arm, rate_factor=rate, length_factor=length, chosen=False, chosen_weight=False)
        gains = np.array(run_arm(shared.validation, tried, 0, stages, runner).gains[scorer])
        results.append(TrialResult(rate_factor=rate, length_factor=length, win_rate=_won(gains)))
    return results


def try_weights(shared: Shared, arm: Arm, stages: StageProgress = silent_stages,
                runner: Runner = IN_PROCESS) -> list[WeightResult]:
    """The arm's LoRA of the first seed at each weight, compared with the target on validation prompts."""
    assert shared.validation is not None
    scorer, plain, results = shared.ablation.run.config.scorer.name, chosen_arm(shared, arm, stages, runner), []
    for weight in dict.fromkeys([arm.lora_weight, *shared.ablation.settings.lora_weights]):
        tried = replace(plain, lora_weight=weight, chosen_weight=False)
        gains = np.array(run_arm(shared.validation, tried, 0, stages, runner).gains[scorer])
        results.append(WeightResult(weight=weight, win_rate=_won(gains)))
    return results


def _won(gains: np.ndarray) -> float:
    return float(np.mean((1 + np.sign(gains)) / 2))


def chosen_arm(shared: Shared, arm: Arm, stages: StageProgress = silent_stages, runner: Runner = IN_PROCESS) -> Arm:
    """The arm with the settings that won its trials, the earlier of equals; itself where nothing is chosen."""
    if not arm.chosen:
        return arm
    best = max(run_trials(shared, arm, stages, runner), key=lambda trial: trial.win_rate)
    return replace(arm, rate_factor=best.rate_factor, length_factor=best.length_factor, chosen=False)


def _seconds(store: Store, tuned: Tuned) -> float | None:
    record = find_record(store, tuned.model_id)
    return record["seconds"] if record else None


def _defect_difference(shared: Shared, scorer: str, images: PoolPlan, scores: ShardFolder,
                       below: float) -> list[float]:
    prompts = shared.ablation.run.evaluation_prompts.prompts
    tuned, target = ((image_scores(folder, plan, prompts) < below).mean(axis=1)
                     for folder, plan in ((scores, images), (shared.target_scores[scorer], shared.target_images)))
    return (tuned - target).tolist()


def _arm_run(shared: Shared, arm: Arm, seed: int) -> Run:
    """The ablation's run with the arm's settings and prompts."""
    run = shared.ablation.run
    config = arm_config(run.config, arm, seed)
    pairs = open_pairs(config.pairs, run.store) if config.pairs is not None else None
    return replace(run, config=config, prompts=PromptList(run.prompts.prompts[:arm.prompts]), pairs=pairs)


def train_arm(shared: Shared, arm: Arm, seed: int, stages: StageProgress = silent_stages,
              runner: Runner = IN_PROCESS) -> tuple[Tuned, int]:
    """The arm's LoRA, and the number of its training triplets; 0 for an objective that is trained on prompts."""
    run = _arm_run(shared, chosen_arm(shared, arm, stages, runner), seed)
    save_prompts(run.store, run.prompts)
    if run.trains_on == "prompts":
        embeds = pipeline.embed_prompts(run, shared.model, runner, stages)
        return pipeline.train_lora(run, shared.model, embeds, runner, stages, validate=False), 0
    triplets = _triplets(shared, arm, run, stages, runner)
    latents = pipeline.encode_triplets(run, triplets, shared.model, runner, stages)
    lora = pipeline.train_lora(run, shared.model, latents, runner, stages, validate=False)
    return lora, triplets.counts().triplets


def _triplets(shared: Shared, arm: Arm, run: Run, stages: StageProgress,
              runner: Runner) -> TripletStage | PairSetStage:
    if arm.data == "own":
        pool = pipeline.plan_run_pool(run, shared.model)
        return pipeline.make_triplets(run, pool, shared.scores[arm.world], runner, stages)
    if arm.data == "foreign_pool":
        model = find_model(TargetConfig(source=FOREIGN_SOURCE, dtype=run.config.target.dtype))
        sampler = run.config.sampler.model_copy(update={"guidance_scale": FOREIGN_GUIDANCE})
        foreign = replace(run, config=run.config.model_copy(update={"sampler": sampler}))
        pool = pipeline.make_pool(foreign, model, runner, stages)
        return pipeline.make_triplets(run, pool, pipeline.score_pool(run, pool, runner, stages), runner, stages)
    if arm.data == "labelled":
        folder = label_own(run.store, shared.model, run.config, run.prompts)
        run = replace(run, pairs=open_pairs(PairSource(source=str(folder)), run.store))
    return pipeline.read_pairs(run, runner, stages)


def measure_diversity(shared: Shared, arm: Arm | None, seed: int, stages: StageProgress = silent_stages,
                      runner: Runner = IN_PROCESS) -> Diversity:
    """How much the images of a prompt differ, for an arm's model or, with None, for the target (paper Figure 8).

    1 - cosine of image features (of the scorer's image tower), averaged over all pairs of a prompt.
    """
    run, settings = shared.ablation.run, shared.ablation.settings
    config, model = run.config, shared.model
    if arm is not None:
        config = arm_config(run.config, arm, seed)
        model = train_arm(shared, arm, seed, stages, runner)[0].applied_to(shared.model, arm.lora_weight)
    evaluation = config.evaluation.model_copy(update={"images_per_prompt": settings.diversity_images})
    prompts = run.evaluation_prompts.prompts[:settings.diversity_prompts]
    pool = plan_evaluation(run.store, model, config.sampler, config.pool, evaluation, prompts).titled("images")
    features = FeatureStage.of(pool, feature_scorer(run.config), title="features")
    for stage in (pool, features):
        runner.make([stage], stages)
    return Diversity(pool, measure_spread(features.folder, pool.indices, prompts))


def measure_rank_distances(shared: Shared, world: World, stages: StageProgress = silent_stages,
                           runner: Runner = IN_PROCESS) -> np.ndarray:
    """Figure 5b: `read_distances` of the pool as ranked by the world's scorer, float64 [pools, N - 1, 2].

    Whole shards are measured, with at least `distance_pools` pools if there are so many.
    """
    pools = shared.ablation.settings.distance_pools
    stage = DistanceStage.of(shared.pool, shared.scores[world], shared.model, pools)
    runner.make([stage], stages)
    return stage.read()


def prompt_colours(plan: PoolPlan, prompts: Sequence[str]) -> np.ndarray:
    """`channel_means` averaged over each prompt's images, float64 [P, 8]."""
    positions = {prompt_id(prompt): row for row, prompt in enumerate(prompts)}
    sums = np.zeros((len(prompts), 8))
    for index in plan.indices:
        rows = plan.folder.read(index)
        images = [image for image in zip(rows["prompt_id"], rows["image"], strict=True)
                  if image[0].as_py() in positions]
        means = thread_map(lambda image: channel_means(np.asarray(decode_image(image[1].as_py()))), images)
        for (key, _), mean in zip(images, means, strict=True):
            sums[positions[key.as_py()]] += mean
    return sums / plan.pool.images_per_prompt


def _arm_id(shared: Shared, config: RunConfig, arm: Arm, pairs: PairSet | None = None) -> str:
    """A hash of all that determines an arm's results; batch sizes and the like may enter it too."""
    run, chosen = shared.ablation.run, dict[str, Any]()
    if pairs is not None:
        chosen["pairs"] = [pairs.name, pairs.revision]
    if arm.chosen and shared.validation is not None:
        chosen = {"trials": [list(trial) for trial in shared.ablation.settings.trials],
                  "validation": shared.validation.ablation.run.evaluation_prompts.id}
    if arm.chosen_weight:
        chosen["weights"] = list(shared.ablation.settings.lora_weights)
    return content_hash({
        "format_version": FORMAT_VERSION, "arm": arm.identity(), "config": config.identity("run"),
        "model": shared.model.identity(), "prompts": run.prompts.id, "evaluation_prompts": run.evaluation_prompts.id,
        "scores": shared.scores[arm.world].key,
        "judges": [find_scorer(scorer.name, scorer.source) for scorer in evaluation_scorers(run.config, arm.world)],
        **chosen})


def _read_record(store: Store, key: str) -> ArmRecord | None:
    if not store.exists(key):
        return None
    try:
        return ArmRecord.model_validate(store.read_json(key))
    except ValidationError:
        raise ConfigError(f"{store.url(key)} is not a record of this version: delete it and run again") from None


def _last_means(tuned: Tuned) -> dict[str, float]:
    rows = tuned.log[-max(1, round(LAST_PART * len(tuned.log))):]
    return {name: float(np.mean([row[name] for row in rows]))
            for name in ("loss", "dpo_loss", "stat_loss", "implicit_accuracy") if name in rows[0]}
