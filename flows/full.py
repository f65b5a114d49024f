"""The whole method, top to bottom: the user's model and prompts in, a LoRA, its proof and a report out."""

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import FlowRun
from prefect.states import State

from flows import parameters as p
from flows.children import cancel_children
from flows.runner import ShardRunnerName, choose_runner
from flows.watch import answer_stop, watch_this_run
from hgdpo_core.errors import StoppedError
from hgdpo_core.execution.runner import Runner
from hgdpo_core.pipeline import Made, Result
from hgdpo_core.run import Run
from tasks.checks import check_tuning
from tasks.evaluate import compare_models
from tasks.generate import generate_evaluation, make_pool
from tasks.prepare import prepare, show_plan
from tasks.report import publish
from tasks.score import score_evaluation, score_pool
from tasks.sft import tune_target
from tasks.times import StageTimes
from tasks.train import train_lora
from tasks.triplets import encode_triplets, make_triplets, measure_distances
from tasks.ui import explain_own_errors

Overrides = dict[str, Any]


def cancel_shard_runs(flow: Any, flow_run: FlowRun, state: State[Any]) -> None:
    """Hook: without it the shard runs of a cancelled run would go on, and those that wait would still start."""
    cancel_children(flow_run.id)


@flow(name="hgdpo", flow_run_name="{preset}", validate_parameters=True, on_cancellation=[cancel_shard_runs])
def hgdpo(
    preset: str = p.PRESET.field(),
    root: str | None = p.ROOT.field(),
    prompts: str | None = p.PROMPTS.field(),
    target: str | None = p.TARGET.field(),
    images: str | None = p.IMAGES.field(),
    overrides: Overrides = p.OVERRIDES.field(),
    plan_only: bool = p.PLAN_ONLY.field(),
    probe: bool = p.PROBE.field(),
    shard_runner: ShardRunnerName = p.SHARD_RUNNER.field(),
) -> dict[str, Any] | State[Any]:
    """Tune a model without human labels (HG-DPO, arXiv:2405.20216v1); returns the summary."""
    explain_own_errors()
    times = StageTimes()
    with times.stage("prepare", makes=False):
        run = prepare(preset, root, prompts, target, images, overrides, plan_only)
    if plan_only:
        return {"plan": show_plan(run, probe)}
    with watch_this_run() as watch:
        try:
            return _run(run, choose_runner(shard_runner, run.config.workers, run.store, watch), times)
        except StoppedError as error:
            return answer_stop(watch, error)


def _run(run: Run, runner: Runner, times: StageTimes) -> dict[str, Any]:
    """The steps of `hgdpo_core.pipeline.run_all`, one task each."""
    with times.stage("sft", makes=run.images is not None):
        target, sft_log = tune_target(run, runner)
    with times.stage("pool"):
        pool = make_pool(run, target, runner)
    with times.stage("score"):
        scores = score_pool(run, pool, runner)
    with times.stage("triplets"):
        triplets = make_triplets(run, pool, scores, runner)
    with times.stage("latents"):
        latents = encode_triplets(run, triplets, target, runner)
    with times.stage("dpo"):
        lora = train_lora(run, target, triplets, latents, runner)
    with times.stage("distances"):
        distances = measure_distances(run, pool, scores, target, runner)

    models = {"target": target, "tuned": lora.applied_to(target, run.config.evaluation.lora_weight)}
    with times.stage("evaluation_images"):
        images = generate_evaluation(run, models, runner)
    with times.stage("evaluation"):
        image_scores = score_evaluation(run, images, runner)
        comparison = compare_models(run, images, image_scores)
        warnings = check_tuning(run, lora, comparison)
    made = Made(target, sft_log, pool, scores, triplets, lora, images, image_scores, distances)
    return publish(run, Result(made, comparison, warnings), times)
