"""The whole method, top to bottom: the user's model and prompts in, a LoRA, its proof and a report out."""

from typing import Any, Literal

from prefect import flow
from prefect.client.schemas.objects import FlowRun
from prefect.states import State
from pydantic import Field

import hgdpo_core.execution.imports  # noqa: F401, first: it brings the heavy ones quickly
from flows.children import cancel_children
from flows.runner import ShardRunnerName, choose_runner
from flows.watch import answer_stop, watch_this_run
from hgdpo_core.errors import StoppedError
from hgdpo_core.execution.runner import Runner
from hgdpo_core.run import Run
from tasks.evaluate import judge
from tasks.generate import draw_evaluation, draw_pool
from tasks.guard import guard
from tasks.prepare import prepare, show_plan
from tasks.report import publish
from tasks.score import score, score_evaluation
from tasks.sft import fine_tune
from tasks.times import StageTimes
from tasks.train import train
from tasks.triplets import encode, measure_latents, rank
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
            return _take_the_road(run, choose_runner(shard_runner, run.config.workers, run.store, watch), times)
        except StoppedError as error:
            return answer_stop(watch, error)


def _take_the_road(run: Run, runner: Runner, times: StageTimes) -> dict[str, Any]:
    with times.stage("sft", makes=run.images is not None):
        model, sft_log = fine_tune(run, runner)
    with times.stage("pool"):
        pool = draw_pool(run, model, runner)
    with times.stage("score"):
        scores = score(run, pool, run.config.scorer, runner)
    with times.stage("triplets"):
        triplets = rank(run, pool, scores)
    with times.stage("latents"):
        latents = encode(run, triplets, model, runner)
    with times.stage("dpo"):
        lora = train(run, model, triplets, latents, runner)

    tuned_model = model.with_lora(lora.path, run.config.evaluation.lora_weight)
    with times.stage("evaluation_images"):
        images = draw_evaluation(run, {"target": model, "tuned": tuned_model}, runner)
    with times.stage("evaluation"):
        judged = score_evaluation(run, images, runner)
        comparison = judge(run, images["target"], images["tuned"], judged["target"], judged["tuned"])
        alarms = guard(run, lora, comparison)
        distances = measure_latents(run, pool, scores, model, runner)
    return publish(run, pool, scores, distances, triplets, lora, sft_log, images, comparison, alarms, times)
