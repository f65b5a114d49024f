"""Train an InstantBooth adapter on images of people, beside a frozen target, for personalised comparisons."""

from typing import Any

from prefect import flow
from prefect.states import State

from flows import parameters as p
from flows.lifecycle import cancel_shard_runs, name_this_run, refuse_relative_paths, run_with
from flows.runner import ShardRunnerName
from hgdpo_core.execution.runner import Runner
from hgdpo_core.personalise import PersonaliseRun
from hgdpo_core.progress import StageProgress, StageTimes
from tasks.personalise import (
    conclude_adapter,
    encode_people,
    prepare_personalise,
    show_personalise_plan,
    train_adapter,
)
from tasks.prepare import show_settings
from tasks.ui import explain_own_errors, stage_progress


@flow(name="hgdpo-personalise", on_cancellation=[cancel_shard_runs])
def hgdpo_personalise(
    images: str | None = p.PEOPLE_IMAGES.field(),
    target: str | None = p.ADAPTER_TARGET.field(),
    run_id: str | None = p.TARGET_RUN.field(),
    preset: str = p.ADAPTER_PRESET.field(),
    root: str | None = p.ROOT.field(),
    overrides: dict[str, Any] = p.OVERRIDES.field(),
    plan_only: bool = p.PLAN_ONLY.field(),
    shard_runner: ShardRunnerName = p.SHARD_RUNNER.field(),
) -> dict[str, Any] | State[Any]:
    """Train an adapter that reads a person's image; returns the summary. Finished latents and steps are used again."""
    explain_own_errors()
    refuse_relative_paths(root=root, images=images, target=target)
    times = StageTimes()
    with times.stage("prepare", makes=False):
        run = prepare_personalise(preset=preset, root=root, images=images, target=target, run_id=run_id,
                                  overrides=overrides)
    name_this_run("adapter", run.config.images, run.config.target.source, run.run_id)
    if plan_only:
        return {"plan": show_personalise_plan(run)}
    show_settings(run.config)
    return run_with(shard_runner, run.config.workers, run.store,
                    lambda runner: _train(run, runner, times, times.watch(stage_progress)))


def _train(run: PersonaliseRun, runner: Runner, times: StageTimes, on: StageProgress) -> State[dict[str, Any]]:
    with times.stage("latents"):
        stage = encode_people(run, runner, on)
    with times.stage("adapter"):
        adapter = train_adapter(run, runner, on)
    return conclude_adapter(run, stage, adapter, times)
