"""Compare two models on the same prompts and seeds: win rates with intervals, and a report."""

from typing import Any

from prefect import flow
from prefect.states import State

from flows import parameters as p
from flows.lifecycle import cancel_shard_runs, name_this_run, refuse_relative_paths, run_with
from flows.runner import ShardRunnerName
from hgdpo_core.execution.runner import Runner
from hgdpo_core.progress import StageProgress, StageTimes
from hgdpo_core.run.comparison import ComparisonRun, weight_name
from tasks.evaluate import compare_models, compare_weight, judge_identity
from tasks.generate import generate_evaluation
from tasks.people import make_study_of
from tasks.prepare import prepare_comparison, show_comparison_plan, show_settings
from tasks.report import conclude, publish_comparison
from tasks.score import score_evaluation
from tasks.ui import explain_own_errors, stage_progress


@flow(name="hgdpo-evaluate", on_cancellation=[cancel_shard_runs])
def hgdpo_evaluate(
    tuned: str | None = p.TUNED.field(),
    target: str | None = p.EVALUATION_TARGET.field(),
    base: str | None = p.BASE.field(),
    prompts: str | None = p.EVALUATION_PROMPTS.field(),
    scorers: list[str] | None = p.EVALUATION_SCORERS.field(),
    images_per_prompt: int | None = p.IMAGES_PER_PROMPT.field(),
    lora_weight: float | None = p.LORA_WEIGHT.field(),
    target_lora_weight: float | None = p.TARGET_LORA_WEIGHT.field(),
    lora_weights: list[float] | None = p.LORA_WEIGHTS.field(),
    concepts: str | None = p.CONCEPTS.field(),
    personaliser: str | None = p.PERSONALISER.field(),
    judges: list[str] | None = p.JUDGES.field(),
    preset: str = p.PRESET.field(),
    root: str | None = p.ROOT.field(),
    overrides: dict[str, Any] = p.OVERRIDES.field(),
    study: int | None = p.MAKE_STUDY.field(),
    plan_only: bool = p.PLAN_ONLY.field(),
    shard_runner: ShardRunnerName = p.SHARD_RUNNER.field(),
) -> dict[str, Any] | State[Any]:
    """Compare any two models or LoRA weights; returns the summary. Finished images and scores are used again."""
    explain_own_errors()
    refuse_relative_paths(root=root, tuned=tuned, target=target, base=base, prompts=prompts, concepts=concepts,
                          personaliser=personaliser)
    times = StageTimes()
    with times.stage("prepare", makes=False):
        run = prepare_comparison(
            preset=preset, root=root, tuned=tuned, target=target, base=base, prompts=prompts, scorers=scorers,
            images_per_prompt=images_per_prompt, lora_weight=lora_weight, target_lora_weight=target_lora_weight,
            lora_weights=lora_weights, concepts=concepts, personaliser=personaliser, judges=judges,
            overrides=overrides)
    name_this_run(run.config.tuned, "against", run.config.target.source, run.run_id)
    if plan_only:
        return {"plan": show_comparison_plan(run)}
    show_settings(run.config)
    return run_with(shard_runner, run.config.workers, run.store,
                    lambda runner: _compare(run, runner, study, times, times.watch(stage_progress)))


def _compare(run: ComparisonRun, runner: Runner, study: int | None, times: StageTimes,
             on: StageProgress) -> State[dict[str, Any]]:
    with times.stage("evaluation_images"):
        images = generate_evaluation(run, run.models, runner, on)
    with times.stage("evaluation"):
        scores = score_evaluation(run, images, runner, on)
        faces = judge_identity(run, images, runner, on) if run.people else None
        comparison = compare_models(run, images, scores, faces)
        others = {who: compare_weight(run, images, scores, who, faces) for who in images
                  if who not in ("target", "tuned")}
    if study:
        with times.stage("study"):
            make_study_of(run.store, comparison, study, on)
    sweep = [others.get(weight_name(model), comparison) for model in run.sweep]
    return conclude(publish_comparison(run, images, comparison, sweep, times))
