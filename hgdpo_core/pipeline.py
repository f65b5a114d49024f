"""The method, step after step, once: flows, plans, ablations, tests and benchmarks are its clients.

Each step makes what is missing of it through a runner and returns what later steps need; `run_all` is their order.
From a notebook, without Prefect: docs/NOTEBOOK.md.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

from hgdpo_core.config import ScorerConfig
from hgdpo_core.evaluate import Comparison, FacePairs, compare, plan_evaluation
from hgdpo_core.execution.runner import IN_PROCESS, Runner
from hgdpo_core.models import Model
from hgdpo_core.progress import Progress, StageProgress, StageTimes, silent_stages
from hgdpo_core.report.summary import ForeignData, Published, RankedData, write_run_report
from hgdpo_core.run import Run
from hgdpo_core.run.comparison import ComparisonRun
from hgdpo_core.stages import Stage
from hgdpo_core.stages.distances import DistanceStage
from hgdpo_core.stages.identities import IdentityStage
from hgdpo_core.stages.image_latents import ImageLatentStage, image_latent_folder
from hgdpo_core.stages.latents import LatentStage
from hgdpo_core.stages.pair_sets import PairSetStage, write_pair_card
from hgdpo_core.stages.pool import PoolPlan, plan_pool
from hgdpo_core.stages.prompt_embeds import PromptEmbedStage
from hgdpo_core.stages.scores import ScoreStage
from hgdpo_core.stages.triplets import TripletStage, write_dataset_card
from hgdpo_core.statistics.checks import RunWarning, check_run
from hgdpo_core.storage.shards import ShardFolder
from hgdpo_core.training.objective import find_objective
from hgdpo_core.training.parts import LogRow
from hgdpo_core.training.request import TrainRequest
from hgdpo_core.training.tune import Tuned
from hgdpo_core.training.validation import Validation

StageT = TypeVar("StageT", bound=Stage)
OnTraining = Callable[[TrainRequest], AbstractContextManager[Progress]]
"""Opens the progress of a training."""
Scores = Mapping[str, Mapping[str, ShardFolder]]
"""Name of the model -> name of the scorer, or judge of identity -> its numbers of the model's evaluation images."""


@dataclass(frozen=True)
class Made:
    """All that a run makes before its numbers are computed: models, and folders of shards."""

    target: Model
    """The target of all later steps: fine-tuned where there are images."""
    sft_log: list[LogRow]
    ranked: "Ranked | None"
    """The run's own pool; None for one that is trained on prompts alone, or on pairs of others."""
    pairs: PairSetStage | None
    """Pairs that others labelled, where the run is trained on them."""
    lora: Tuned
    images: dict[str, PoolPlan]
    """Evaluation images of "target" and "tuned"."""
    image_scores: Scores


@dataclass(frozen=True)
class Ranked:
    """A run's pool with its scores, best and worst, and the channel statistics by rank."""

    pool: PoolPlan
    scores: ShardFolder
    triplets: TripletStage
    distances: DistanceStage


@dataclass(frozen=True)
class Result:
    """A finished run: what it made, the comparison of both models, and warnings."""

    made: Made
    comparison: Comparison
    warnings: list[RunWarning]


def run_all(run: Run, runner: Runner = IN_PROCESS, on: StageProgress = silent_stages,
            times: StageTimes | None = None) -> Result:
    """The whole method; what exists is not made again. `times` keeps how long each step took, for `write_report`."""
    made = make_all(run, runner, on, times)
    comparison = compare_models(run, made.images, made.image_scores)
    return Result(made, comparison, check_tuning(run, made.lora, comparison))


def make_all(run: Run, runner: Runner = IN_PROCESS, on: StageProgress = silent_stages,
             times: StageTimes | None = None) -> Made:
    """All steps up to the scores of both models' images. A plan runs this too, with a runner that makes nothing."""
    times = times or StageTimes()
    on = times.watch(on)
    with times.stage("sft", makes=run.images is not None):
        target, sft_log = tune_target(run, runner, on)
    ranked = pairs = None
    if run.trains_on == "prompts":
        with times.stage("prompt_embeds"):
            data = embed_prompts(run, target, runner, on)
    else:
        if run.trains_on == "pairs":
            with times.stage("pairs"):
                triplets = pairs = read_pairs(run, runner, on)
        else:
            with times.stage("pool"):
                pool = make_pool(run, target, runner, on)
            with times.stage("score"):
                scores = score_pool(run, pool, runner, on)
            with times.stage("triplets"):
                triplets = make_triplets(run, pool, scores, runner, on)
            with times.stage("distances"):
                ranked = Ranked(pool, scores, triplets, measure_distances(run, pool, scores, target, runner, on))
        with times.stage("latents"):
            data = encode_triplets(run, triplets, target, runner, on)
    with times.stage(run.config.objective):
        lora = train_lora(run, target, data, runner, on)
    models = {"target": target, "tuned": lora.applied_to(target, run.config.evaluation.lora_weight)}
    with times.stage("evaluation_images"):
        images = generate_evaluation(run, models, runner, on)
    with times.stage("evaluation"):
        image_scores = score_evaluation(run, images, runner, on)
    return Made(target, sft_log, ranked, pairs, lora, images, image_scores)


# -- the steps, in their order


def tune_target(run: Run, runner: Runner = IN_PROCESS, on: StageProgress = silent_stages,
                on_training: OnTraining | None = None, *, validate: bool = True) -> tuple[Model, list[LogRow]]:
    """The target for all later steps, and the training log: fine-tuned where there are images, else as it is.

    `validate`: generate validation images on the way, where the settings ask for any.
    """
    if run.images is None:
        return run.target, []
    stage = _made(image_latent_stage(run), runner, on)
    stage.refuse_if_empty()
    tuned = _train("sft", run, run.target, stage, runner, on, on_training, validate)
    return tuned.as_target(run.target), tuned.log


def image_latent_stage(run: Run) -> ImageLatentStage:
    """The latents of the images of a run that has some."""
    assert run.images is not None
    size = (run.config.sampler.width, run.config.sampler.height)
    folder = image_latent_folder(run.store, run.images, run.target, size, flips=run.config.sft.flip)
    return ImageLatentStage(run.images, folder, run.target)


def read_pairs(run: Run, runner: Runner = IN_PROCESS, on: StageProgress = silent_stages) -> PairSetStage:
    """Pairs that others labelled as triplets (Table 1), with the card of the data set; InputError if none is usable."""
    assert run.pairs is not None
    size = (run.config.sampler.width, run.config.sampler.height)
    stage = _made(PairSetStage.of(run.store, run.pairs, size), runner, on)
    stage.refuse_if_empty()
    write_pair_card(stage)
    return stage


def make_pool(run: Run, model: Model, runner: Runner = IN_PROCESS, on: StageProgress = silent_stages) -> PoolPlan:
    """N candidates for every training prompt (arXiv:2405.20216v1, Eq. 4)."""
    return _made(plan_run_pool(run, model), runner, on)


def plan_run_pool(run: Run, model: Model) -> PoolPlan:
    """The pool of a run's prompts, raced by its scorer where its settings ask for that."""
    config = run.config
    return plan_pool(run.store, model, config.sampler.plain, config.pool, run.prompts.prompts, config.scorer)


def score_pool(run: Run, pool: PoolPlan, runner: Runner = IN_PROCESS, on: StageProgress = silent_stages) -> ShardFolder:
    """The ranking scorer's scores of all candidates (Eq. 5)."""
    return _made(ScoreStage.of(pool, run.config.scorer, title="score"), runner, on).folder


def make_triplets(run: Run, pool: PoolPlan, scores: ShardFolder, runner: Runner = IN_PROCESS,
                  on: StageProgress = silent_stages) -> TripletStage:
    """Best and worst of every pool (Eq. 6) as Parquet, with the card of the data set."""
    stage = _made(TripletStage.of(pool, scores, run.prompts, run.config.triplets), runner, on)
    write_dataset_card(stage, run.config.licence)
    return stage


def measure_distances(run: Run, pool: PoolPlan, scores: ShardFolder, model: Model, runner: Runner = IN_PROCESS,
                      on: StageProgress = silent_stages) -> DistanceStage:
    """How far the channel statistics of worse images are from the best one's, in some pools (Figure 5b)."""
    return _made(DistanceStage.of(pool, scores, model), runner, on)


def encode_triplets(run: Run, triplets: TripletStage | PairSetStage, model: Model, runner: Runner = IN_PROCESS,
                    on: StageProgress = silent_stages) -> LatentStage:
    """Latents of the triplets' images and the prompts' text embeddings, for training."""
    return _made(LatentStage.of(triplets, model, flips=run.config.dpo.flip), runner, on)


def embed_prompts(run: Run, model: Model, runner: Runner = IN_PROCESS,
                  on: StageProgress = silent_stages) -> PromptEmbedStage:
    """Text embeddings of the training prompts, for an objective that is trained on prompts alone."""
    size = (run.config.sampler.width, run.config.sampler.height)
    return _made(PromptEmbedStage.of(run.store, run.prompts, model, size), runner, on)


def train_lora(run: Run, model: Model, data: LatentStage | PromptEmbedStage, runner: Runner = IN_PROCESS,
               on: StageProgress = silent_stages, on_training: OnTraining | None = None, *,
               validate: bool = True) -> Tuned:
    """A LoRA of the target by the run's objective: Diffusion-DPO with the statistic matching loss (Eq. 9), or another.

    `data`: of `encode_triplets`, or of `embed_prompts`. `validate`: as `tune_target`.
    """
    triplets = data.triplets if isinstance(data, LatentStage) else None
    return _train(run.config.objective, run, model, data, runner, on, on_training, validate, triplets)


def generate_evaluation(run: Run | ComparisonRun, models: Mapping[str, Model], runner: Runner = IN_PROCESS,
                        on: StageProgress = silent_stages) -> dict[str, PoolPlan]:
    """The held-out prompts by each model, under its name, with the seeds that every model gets."""
    config = run.config
    plans = {who: plan_evaluation(run.store, model, config.sampler, config.pool, config.evaluation,
                                  run.samples).titled(f"evaluation images, {who}") for who, model in models.items()}
    runner.make(list(plans.values()), on)
    return plans


def score_evaluation(run: Run | ComparisonRun, images: Mapping[str, PoolPlan], runner: Runner = IN_PROCESS,
                     on: StageProgress = silent_stages) -> dict[str, dict[str, ShardFolder]]:
    """Each model's images by each scorer of the evaluation."""
    return score_images_by(run.config.evaluation.scorers, images, runner, on)


def score_images_by(scorers: Sequence[ScorerConfig], images: Mapping[str, PoolPlan], runner: Runner = IN_PROCESS,
                    on: StageProgress = silent_stages) -> dict[str, dict[str, ShardFolder]]:
    """Name of the pool -> name of the scorer -> scores."""
    stages = {(who, scorer.name): ScoreStage.of(pool, scorer, title=f"{scorer.name}, {who}")
              for scorer in scorers for who, pool in images.items()}
    runner.make(list(stages.values()), on)
    return {who: {scorer.name: stages[who, scorer.name].folder for scorer in scorers} for who in images}


def judge_identity(run: ComparisonRun, images: Mapping[str, PoolPlan], runner: Runner = IN_PROCESS,
                   on: StageProgress = silent_stages) -> Scores | None:
    """How far each image's face is from its concept's, by each judge of identity; None without concepts."""
    if run.config.concepts is None:
        return None
    judges = run.config.concepts.judges
    stages = {(who, judge.name): IdentityStage.of(pool, judge, run.detector, title=f"{judge.name}, {who}")
              for judge in judges for who, pool in images.items()}
    runner.make(list(stages.values()), on)
    return {who: {judge.name: stages[who, judge.name].folder for judge in judges} for who in images}


def compare_models(run: Run | ComparisonRun, images: Mapping[str, PoolPlan], scores: Scores,
                   tuned: str = "tuned", identities: Scores | None = None) -> Comparison:
    """Win rates, score changes, defects and colours of a model against the target; kept in `evaluations/`.

    `identities`: of `judge_identity`, for models that were given concepts.
    """
    faces = None
    if identities is not None and isinstance(run, ComparisonRun) and run.config.concepts is not None:
        faces = FacePairs({name: (folder, identities[tuned][name]) for name, folder in identities["target"].items()},
                          run.sample_prompts, run.config.concepts.margin)
    return compare(run.store, images["target"], images[tuned], scores["target"], scores[tuned], run.samples,
                   run.config.evaluation, faces)


def check_tuning(run: Run, lora: Tuned, comparison: Comparison) -> list[RunWarning]:
    """What a good win rate or a falling loss may hide."""
    return check_run(lora.log, comparison.win_rates, comparison.defects, comparison.variety_change,
                     run.config.training_scorer, find_objective(lora.objective).checks)


def write_report(run: Run, result: Result, times: StageTimes | None = None) -> Published:
    """`summary.json` and `report.html` in `runs/<run_id>/`."""
    made, times = result.made, times or StageTimes()
    data = None if made.pairs is None else ForeignData(made.pairs)
    if (ranked := made.ranked) is not None:
        data = RankedData(ranked.pool, ranked.scores, ranked.distances.read(), ranked.triplets.folder,
                          ranked.triplets.counts())
    return write_run_report(run, data, made.lora, made.sft_log, made.images, result.comparison, result.warnings,
                            seconds=times.seconds, cached=times.cached)


def _made(stage: StageT, runner: Runner, on: StageProgress) -> StageT:
    runner.make([stage], on)
    return stage


def _train(kind: str, run: Run, model: Model, latents: Stage, runner: Runner,
           on: StageProgress, on_training: OnTraining | None, validate: bool,
           triplets: ShardFolder | None = None) -> Tuned:
    config = find_objective(kind).settings(run.config)
    validation = Validation.of_run(run.config, config, run.evaluation_prompts.prompts) if validate else None
    request = TrainRequest.of(kind, model, latents.folder, latents.indices, config, triplets=triplets,
                              copy_to_store=runner.copy_to_store, validation=validation)
    with (on_training(request) if on_training else on(kind)) as progress:
        return runner.train(request, progress)
