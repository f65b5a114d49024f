"""The paper's comparisons with any preset, from one shared pool: tables with intervals beside the paper's numbers."""

from typing import Any

from prefect import flow
from prefect.states import State

from flows import parameters as p
from flows.lifecycle import cancel_shard_runs, name_this_run, refuse_relative_paths, run_with
from flows.runner import ShardRunnerName
from hgdpo_core.ablate.arms import arm_labels
from hgdpo_core.ablate.cost import plan_ablation
from hgdpo_core.ablate.program import Ablation
from hgdpo_core.ablate.settings import Comparison, Split, World
from hgdpo_core.execution.runner import Runner
from tasks.ablate import make_shared, measure, prepare_ablation, publish_ablation
from tasks.ui import explain_own_errors


@flow(name="hgdpo-ablate", on_cancellation=[cancel_shard_runs])
def hgdpo_ablate(
    preset: str = p.PRESET.field(),
    root: str | None = p.ROOT.field(),
    prompts: str | None = p.PROMPTS.field(),
    target: str | None = p.TARGET.field(),
    images: str | None = p.IMAGES.field(),
    overrides: dict[str, Any] = p.OVERRIDES.field(),
    seeds: int = p.SEEDS.field(),
    worlds: list[World] | None = p.WORLDS.field(),
    comparisons: list[Comparison] | None = p.COMPARISONS.field(),
    split: Split = p.SPLIT.field(),
    plan_only: bool = p.PLAN_ONLY.field(),
    shard_runner: ShardRunnerName = p.SHARD_RUNNER.field(),
) -> dict[str, Any] | State[Any]:
    """Measure the paper's comparisons (arXiv:2405.20216v1, Tables 1-3, 5, 6, Figures 5-8, 17); all numbers."""
    explain_own_errors()
    refuse_relative_paths(root=root, prompts=prompts, target=target, images=images)
    settings = {"seeds": seeds, "worlds": worlds, "comparisons": comparisons, "split": split}
    ablation = prepare_ablation(preset=preset, root=root, prompts=prompts, target=target, images=images,
                                overrides=overrides, settings=settings)
    name_this_run("ablations", preset, target or ablation.run.config.target.source, ablation.ablation_id)
    if plan_only:
        return {"plan": plan_ablation(ablation)}
    run = ablation.run
    return run_with(shard_runner, run.config.workers, run.store, lambda runner: _measure_all(ablation, runner))


def _measure_all(ablation: Ablation, runner: Runner) -> dict[str, Any]:
    shared = make_shared(ablation, runner)
    rows = [measure(shared, arm, label, seed, runner)
            for arm, label in arm_labels(ablation.tables).items() for seed in ablation.seeds]
    return publish_ablation(shared, rows, runner)
