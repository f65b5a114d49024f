"""The whole method, top to bottom: from the user's model and prompts to a LoRA, its evaluation and a report."""

from typing import Any

from prefect import flow
from prefect.states import State

from flows import parameters as p
from flows.lifecycle import cancel_shard_runs, name_this_run, refuse_relative_paths, run_with
from flows.runner import ShardRunnerName
from hgdpo_core.execution.runner import Runner
from hgdpo_core.pipeline import Made, Ranked, Result
from hgdpo_core.progress import StageProgress, StageTimes
from hgdpo_core.run import Run
from tasks.evaluate import check_tuning, compare_models
from tasks.generate import generate_evaluation, make_pool
from tasks.people import make_study_of
from tasks.prepare import prepare, show_plan, show_settings
from tasks.report import conclude, publish
from tasks.score import score_evaluation, score_pool
from tasks.training import train_lora, tune_target
from tasks.triplets import embed_prompts, encode_triplets, make_triplets, measure_distances, read_pairs
from tasks.ui import explain_own_errors, stage_progress


@flow(name="hgdpo", on_cancellation=[cancel_shard_runs])
def hgdpo(
    preset: str = p.PRESET.field(),
    root: str | None = p.ROOT.field(),
    prompts: str | None = p.PROMPTS.field(),
    target: str | None = p.TARGET.field(),
    images: str | None = p.IMAGES.field(),
    overrides: dict[str, Any] = p.OVERRIDES.field(),
    study: int | None = p.MAKE_STUDY.field(),
    plan_only: bool = p.PLAN_ONLY.field(),
    probe: bool = p.PROBE.field(),
    shard_runner: ShardRunnerName = p.SHARD_RUNNER.field(),
) -> dict[str, Any] | State[Any]:
    """Tune a model without human labels (HG-DPO, arXiv:2405.20216v1); returns the summary."""
    explain_own_errors()
    refuse_relative_paths(root=root, prompts=prompts, target=target, images=images)
    times = StageTimes()
    with times.stage("prepare", makes=False):
        run = prepare(preset=preset, root=root, prompts=prompts, target=target, images=images, overrides=overrides,
                      dry=plan_only)
    name_this_run(preset, target or run.config.target.source, run.run_id)
    if plan_only:
        return {"plan": show_plan(run, probe)}
    show_settings(run.config)
    return run_with(shard_runner, run.config.workers, run.store,
                    lambda runner: _run(run, runner, study, times, times.watch(stage_progress)))


def _run(run: Run, runner: Runner, study: int | None, times: StageTimes, on: StageProgress) -> State[dict[str, Any]]:
    """The steps of `hgdpo_core.pipeline.run_all`, one task each."""
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
        comparison = compare_models(run, images, image_scores)
        warnings = check_tuning(run, lora, comparison)
    if study:
        with times.stage("study"):
            make_study_of(run.store, comparison, study, on)
    made = Made(target, sft_log, ranked, pairs, lora, images, image_scores)
    return conclude(publish(run, Result(made, comparison, warnings), times))
