"""Compare the two models on the held-out prompts, and check for what a good win rate may hide."""

from collections.abc import Mapping

from prefect.logging import get_run_logger

from hgdpo_core import pipeline
from hgdpo_core.comparison_run import ComparisonRun
from hgdpo_core.evaluate import Comparison
from hgdpo_core.run import Run
from hgdpo_core.stages.pool import PoolPlan
from hgdpo_core.statistics.checks import RunWarning
from hgdpo_core.training.tune import Tuned
from tasks.options import stage_task
from tasks.ui import show_table, show_text


@stage_task("evaluate a weight")
def compare_weight(run: ComparisonRun, images: Mapping[str, PoolPlan], scores: pipeline.Scores,
                   who: str) -> Comparison:
    """The tuned LoRA at one weight of a sweep; only the comparison at the chosen weight is shown in full."""
    result = pipeline.compare_models(run, images, scores, who)
    rates = {name: rate.rate for name, rate in result.win_rates.items()}
    get_run_logger().info("LoRA weight %s: win rates %s", result.lora_weight, rates)
    return result


@stage_task("evaluate")
def compare_models(run: Run | ComparisonRun, images: Mapping[str, PoolPlan], scores: pipeline.Scores) -> Comparison:
    """Win rates, score changes, defects and colours, with intervals; kept in `evaluations/`."""
    result = pipeline.compare_models(run, images, scores)
    findings = result.findings()
    changes = {name: {"change": row["mean"], "change_low": row["ci_low"], "change_high": row["ci_high"],
                      "sign_test_p": row["sign_test_p"]} for name, row in findings["score_change"].items()}
    rows = [{"scorer": name, **rate, **changes[name]} for name, rate in findings["win_rate"].items()]
    show_table("win-rates", rows, "Tuned model against target, held-out prompts, same seeds; 95 % intervals")
    if result.defects:
        show_table("defects", [{"scorer": name, **row} for name, row in findings["defect_rate"].items()],
                   "Fraction of defective images; the difference is tuned minus target")
    colours = [{"what": name, **row} for name, row in findings["colour_change"].items() if isinstance(row, dict)]
    show_table("colour-shift", colours, "Colours of the tuned model against the target's; 95 % intervals")
    for row in rows:
        get_run_logger().info("Win rate by %s: %s", row["scorer"], {k: v for k, v in row.items() if k != "scorer"})
    for name, row in findings["defect_rate"].items():
        get_run_logger().info("Defective images by %s: %s", name, row)
    return result


@stage_task("checks")
def check_tuning(run: Run, lora: Tuned, comparison: Comparison) -> list[RunWarning]:
    """The warnings of the run; they are logged, and shown in the UI."""
    warnings = pipeline.check_tuning(run, lora, comparison)
    for warning in warnings:
        get_run_logger().warning(warning.message)
    show_text("warnings", "\n".join(f"- {warning.message}" for warning in warnings) or "No check raised a warning.",
              "Warnings of the checks")
    return warnings
