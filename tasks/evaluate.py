"""Compare the two models on the held-out prompts, and check for what a good win rate may hide."""

from collections.abc import Mapping

from prefect.logging import get_run_logger

from hgdpo_core import pipeline
from hgdpo_core.evaluate import Comparison
from hgdpo_core.execution.runner import Runner
from hgdpo_core.metrics import WinRate
from hgdpo_core.progress import StageProgress
from hgdpo_core.rendering.parts import percent, percent_interval, signed, signed_interval
from hgdpo_core.run import Run
from hgdpo_core.run.comparison import ComparisonRun
from hgdpo_core.scorers import scorer_title
from hgdpo_core.scorers.identity import judge_title
from hgdpo_core.stages.pool import PoolPlan
from hgdpo_core.statistics.checks import RunWarning
from hgdpo_core.statistics.identity import IdentityChange
from hgdpo_core.statistics.intervals import DefectChange
from hgdpo_core.training.tune import Tuned
from tasks.assets import show_asset
from tasks.options import stage_task
from tasks.ui import describe_row, show_table, show_text


@stage_task("evaluate a weight")
def compare_weight(run: ComparisonRun, images: Mapping[str, PoolPlan], scores: pipeline.Scores,
                   who: str, identities: pipeline.Scores | None = None) -> Comparison:
    """The tuned LoRA at one weight of a sweep; only the comparison at the chosen weight is shown in full."""
    result = pipeline.compare_models(run, images, scores, who, identities)
    for name, rate in result.win_rates.items():
        get_run_logger().info("LoRA weight %s: %s", result.lora_weight, describe_row(_rate_row(name, rate)))
    return result


@stage_task("evaluate")
def compare_models(run: Run | ComparisonRun, images: Mapping[str, PoolPlan], scores: pipeline.Scores,
                   identities: pipeline.Scores | None = None) -> Comparison:
    """Win rates, score changes, defects, colours and identity, with intervals; kept in `evaluations/`."""
    result = pipeline.compare_models(run, images, scores, identities=identities)
    rates = [_rate_row(name, rate) for name, rate in result.win_rates.items()]
    show_table("win-rates", rates, "Tuned model against target, held-out prompts, same seeds")
    defects = [_defect_row(name, change) for name, change in result.defects.items()]
    if defects:
        show_table("defects", defects, "Fraction of defective images; the difference is tuned minus target")
    change = result.colour_change
    channels = {"hue, degrees": change.hue_degrees, "hue, %": change.hue_percent,
                "saturation, %": change.saturation_percent, "value, %": change.value_percent}
    colours = [{"channel": name, "change": "not defined" if shift.value is None else signed(shift.value, 2),
                "95 % interval": signed_interval(shift.ci_low, shift.ci_high, 2)} for name, shift in channels.items()]
    show_table("colour-shift", colours, "Colours of the tuned model against the target's")
    sources = [folder.key for folders in scores.values() for folder in folders.values()]
    show_asset(run.store, f"evaluations/{result.evaluation_id}", "evaluation", sources, prompts=len(result.prompts),
               **{f"win_rate_{name}": rate.rate for name, rate in result.win_rates.items() if rate.rate is not None})
    faces = [_identity_row(name, change) for name, change in result.identity.items()]
    if faces:
        show_table("identity", faces, "Identity by the tuned model against the target, both personalised")
    for row in (*rates, *defects, *faces):
        get_run_logger().info(describe_row(row))
    return result


def _defect_row(name: str, change: DefectChange) -> dict[str, str]:
    low, high = (None if end is None else 100 * end for end in (change.ci_low, change.ci_high))
    return {"scorer": scorer_title(name), "target": percent(change.target), "tuned": percent(change.tuned),
            "difference": f"{signed(100 * change.difference, 1)} points",
            "95 % interval": signed_interval(low, high, 1)}


def _identity_row(name: str, change: IdentityChange) -> dict[str, str]:
    return {"judge": judge_title(name), "win rate": percent(change.win_rate.rate),
            "90 % interval": percent_interval(change.low, change.high),
            "identity": f"{change.verdict} (margin {100 * change.margin:g} points)",
            "images without a face": f"{change.faceless['target']} target, {change.faceless['tuned']} tuned"}


@stage_task("identity")
def judge_identity(run: ComparisonRun, images: Mapping[str, PoolPlan], runner: Runner,
                   on: StageProgress) -> pipeline.Scores | None:
    """Distances of the images' faces from their concepts', by each judge of identity; None without concepts."""
    return pipeline.judge_identity(run, images, runner, on)


def _rate_row(name: str, rate: WinRate) -> dict[str, str]:
    return {"scorer": scorer_title(name), "win rate": percent(rate.rate),
            "95 % interval": percent_interval(rate.ci_low, rate.ci_high),
            "wins, losses, ties": f"{rate.wins:,}, {rate.losses:,}, {rate.ties:,}", "prompts": f"{rate.n:,}"}


@stage_task("checks")
def check_tuning(run: Run, lora: Tuned, comparison: Comparison) -> list[RunWarning]:
    """The warnings of the run; they are logged, and shown in the UI."""
    warnings = pipeline.check_tuning(run, lora, comparison)
    for warning in warnings:
        get_run_logger().warning(warning.message)
    show_text("warnings", "\n".join(f"- {warning.message}" for warning in warnings) or "No check raised a warning.",
              "Warnings of the checks")
    return warnings
