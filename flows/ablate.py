"""The paper's comparisons on any preset, from one shared pool: its tables with intervals, its numbers beside."""

from typing import Any

from prefect import flow
from prefect.states import State

from flows import parameters as p
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
    preset: str = p.PRESET.field(),
    root: str | None = p.ROOT.field(),
    prompts: str | None = p.PROMPTS.field(),
    target: str | None = p.TARGET.field(),
    images: str | None = p.IMAGES.field(),
    overrides: Overrides = p.OVERRIDES.field(),
    seeds: int = p.SEEDS.field(),
    worlds: list[World] | None = p.WORLDS.field(),
    comparisons: list[Comparison] | None = p.COMPARISONS.field(),
    split: Split = p.SPLIT.field(),
    plan_only: bool = p.PLAN_ONLY.field(),
    shard_runner: ShardRunnerName = p.SHARD_RUNNER.field(),
) -> dict[str, Any] | State[Any]:
    """Measure the paper's ablations (arXiv:2405.20216v1, Tables 2, 3, 5, 6, Figures 5b, 6, 8); returns all numbers."""
    explain_own_errors()
    settings = {"seeds": seeds, "worlds": worlds, "comparisons": comparisons, "split": split}
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
