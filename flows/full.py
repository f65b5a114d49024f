"""The whole method, top to bottom: the user's model and prompts in, a LoRA, its proof and a report out."""

from typing import Any, Literal

from prefect import flow
from prefect.client.schemas.objects import FlowRun
from prefect.states import State
from pydantic import Field

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
    preset: Literal["figures", "sd15"] = "figures",
    root: str | None = Field(None, description="object store, any fsspec URL; default: $HGDPO_ROOT, else output/full"),
    prompts: str | None = Field(None, description="txt, csv, tsv, jsonl or parquet, path or URL; or a data set"),
    target: str | None = Field(None, description="your model: diffusers folder, .safetensors file or hub id"),
    images: str | None = Field(None, description="captioned images to fine-tune the model on first: a folder, "
                              ".tar or .parquet files, path or URL"),
    overrides: Overrides = Field({}, description='settings by dotted name, as {"dpo.beta": 1000}'),
    plan_only: bool = Field(False, description="say what the run would make and find, how long it takes, and stop"),
    probe: bool = Field(False, description="with plan_only: time a batch of each stage here; this loads the models"),
    shard_runner: ShardRunnerName = Field("auto", description="deployment: on workers, as shard runs that can be "
                                          "retried one by one; in_process: here; auto: on workers if started by one"),
) -> dict[str, Any] | State[Any]:
    """Tune a model without human labels (HG-DPO, arXiv:2405.20216v1); returns the summary.

    Args:
        preset: figures is built in and small, sd15 has the paper's settings for your own target and prompts
    """
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
