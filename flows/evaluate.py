"""Two models on the same prompts and seeds: who wins, by how much, and what a person should look at."""

from typing import Any, Literal

from prefect import flow
from prefect.runtime import flow_run
from prefect.states import State
from pydantic import Field

from flows.full import cancel_shard_runs
from flows.runner import ShardRunnerName, choose_runner
from flows.watch import answer_stop, watch_this_run
from hgdpo_core.comparison_run import ComparisonRun, weight_name
from hgdpo_core.errors import StoppedError
from hgdpo_core.execution.runner import Runner
from tasks.evaluate import compare_models, compare_weight
from tasks.generate import generate_evaluation
from tasks.prepare import prepare_comparison, show_comparison_plan
from tasks.report import publish_comparison
from tasks.score import score_evaluation
from tasks.times import StageTimes
from tasks.ui import explain_own_errors

Overrides = dict[str, Any]


def _run_name() -> str:
    given = flow_run.parameters
    return f"{_last_part(given.get('tuned'))} against {_last_part(given.get('target') or given.get('preset'))}"


def _last_part(source: str | None) -> str:
    return (source or "nothing").rstrip("/").rpartition("/")[2]


@flow(name="hgdpo-evaluate", flow_run_name=_run_name, validate_parameters=True,
      on_cancellation=[cancel_shard_runs])
def hgdpo_evaluate(
    tuned: str | None = Field(None, description="what is held against the target: a model, or a LoRA (folder or "
                              ".safetensors file)"),
    target: str | None = Field(None, description="diffusers folder, .safetensors file, hub id, or a LoRA worn by base"),
    base: str | None = Field(None, description="the model that wears the LoRAs; default: the target"),
    prompts: str | None = Field(None, description="prompt file, path or URL; default: the preset's held-out prompts"),
    scorers: list[str] | None = Field(None, description="judges by name, or name=source; default: the preset's"),
    images_per_prompt: int | None = Field(None, description="images of each prompt by each model; default: 1"),
    lora_weight: float | None = Field(None, description="weight of a LoRA; default: the preset's"),
    target_lora_weight: float | None = Field(None, description="weight of the target's LoRA; default: lora_weight"),
    lora_weights: list[float] | None = Field(None, description="further weights to try the tuned LoRA at"),
    preset: Literal["figures", "sd15"] = "figures",
    root: str | None = Field(None, description="object store, any fsspec URL; default: $HGDPO_ROOT, else output/full"),
    overrides: Overrides = Field({}, description='settings by dotted name, as {"sampler.steps": 20}'),
    plan_only: bool = Field(False, description="say what would be drawn and found, and stop"),
    shard_runner: ShardRunnerName = Field("auto", description="deployment: on workers; in_process: here; auto: on "
                                          "workers if started by one"),
) -> dict[str, Any] | State[Any]:
    """Compare any two models or LoRA weights; returns the summary. Finished images and scores are found again.

    Args:
        preset: its sampler, prompts and judges: figures is built in and small, sd15 is the paper's
    """
    explain_own_errors()
    times = StageTimes()
    with times.stage("prepare", makes=False):
        run = prepare_comparison(
            preset=preset, root=root, tuned=tuned, target=target, base=base, prompts=prompts, scorers=scorers,
            images_per_prompt=images_per_prompt, lora_weight=lora_weight, target_lora_weight=target_lora_weight,
            lora_weights=lora_weights, overrides=overrides)
    if plan_only:
        return {"plan": show_comparison_plan(run)}
    with watch_this_run() as watch:
        try:
            return _compare(run, choose_runner(shard_runner, run.config.workers, run.store, watch), times)
        except StoppedError as error:
            return answer_stop(watch, error)


def _compare(run: ComparisonRun, runner: Runner, times: StageTimes) -> dict[str, Any]:
    with times.stage("evaluation_images"):
        images = generate_evaluation(run, run.models, runner)
    with times.stage("evaluation"):
        scores = score_evaluation(run, images, runner)
        comparison = compare_models(run, images, scores)
        others = {who: compare_weight(run, images, scores, who) for who in images if who not in ("target", "tuned")}
    sweep = [others.get(weight_name(model), comparison) for model in run.sweep]
    return publish_comparison(run, images, comparison, sweep, times)
