"""The paper's comparisons on any preset, from one shared pool: its tables with intervals, its numbers beside."""

from typing import Any, Literal

from prefect import flow
from prefect.states import State
from pydantic import Field

from flows.full import cancel_shard_runs
from flows.runner import ShardRunnerName, choose_runner
from flows.watch import answer_stop, watch_this_run
from hgdpo_core.ablate.cost import plan_ablation
from hgdpo_core.ablate.program import Ablation
from hgdpo_core.ablate.settings import Comparison, Split, World
from hgdpo_core.errors import StoppedError
from hgdpo_core.execution.runner import Runner
from tasks.ablate import labelled_arms, measure, prepare_ablation, publish_ablation, share
from tasks.ui import explain_own_errors

Overrides = dict[str, Any]


@flow(name="hgdpo-ablate", flow_run_name="ablations, {preset}", validate_parameters=True,
      on_cancellation=[cancel_shard_runs])
def hgdpo_ablate(
    preset: Literal["figures", "sd15"] = "figures",
    root: str | None = Field(None, description="object store, any fsspec URL; default: $HGDPO_ROOT, else output/full"),
    prompts: str | None = Field(None, description="prompt file: txt, csv, tsv, jsonl or parquet, path or URL"),
    target: str | None = Field(None, description="your model: diffusers folder, .safetensors file or hub id"),
    images: str | None = Field(None, description="folder of captioned images to fine-tune the model on first"),
    overrides: Overrides = Field({},
                                 description='settings by dotted name, as {"ablation.pool_sizes": [2, 20]}'),
    seeds: int = Field(3, ge=1, description="trainings of every arm"),
    worlds: list[World] | None = Field(
        None, description="plain: the run's own judge ranks the pools; tinted: the same judge, fond of warm tints; "
                          "default: both for figures, plain otherwise"),
    comparisons: list[Comparison] = Field(
        ["pool_size", "loser_rank", "dataset_size", "statistics", "beta", "lora_weight"],
        description="which tables and figures of the paper to measure"),
    split: Split = Field("test", description="figures prompts to measure on; choose settings on validation"),
    plan_only: bool = Field(False, description="say what the ablation would do and how long it takes, and stop"),
    shard_runner: ShardRunnerName = Field("auto", description="deployment: on workers; in_process: here; auto: on "
                                          "workers if started by one"),
) -> dict[str, Any] | State[Any]:
    """Measure the paper's ablations (arXiv:2405.20216v1, Tables 2, 3, 5, 6, Figures 5b, 6, 8); returns all numbers.

    Args:
        preset: figures is built in and small, sd15 has the paper's settings for your own target and prompts
    """
    explain_own_errors()
    settings: dict[str, Any] = {"seeds": seeds, "comparisons": comparisons, "split": split}
    if worlds is not None:
        settings["worlds"] = worlds
    ablation = prepare_ablation(preset, root, prompts, target, images, overrides, settings)
    if plan_only:
        return {"plan": plan_ablation(ablation)}
    run = ablation.run
    with watch_this_run() as watch:
        try:
            return _measure_all(ablation, choose_runner(shard_runner, run.config.workers, run.store, watch))
        except StoppedError as error:
            return answer_stop(watch, error)


def _measure_all(ablation: Ablation, runner: Runner) -> dict[str, Any]:
    shared = share(ablation, runner)
    rows = [measure(shared, arm, label, seed, runner)
            for arm, label in labelled_arms(ablation) for seed in ablation.seeds]
    return publish_ablation(shared, rows, runner)
