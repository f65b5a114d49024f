"""Checks for problems that a good win rate or a falling loss may hide."""

from prefect import task
from prefect.logging import get_run_logger

from hgdpo_core import pipeline
from hgdpo_core.evaluate import Comparison
from hgdpo_core.run import Run
from hgdpo_core.statistics.checks import Alarm
from hgdpo_core.training.tune import Tuned
from tasks.options import STAGE
from tasks.ui import show_text


@task(name="checks", **STAGE)
def check_tuning(run: Run, lora: Tuned, comparison: Comparison) -> list[Alarm]:
    """The warnings of the run; they are logged, and shown in the UI."""
    warnings = pipeline.check_tuning(run, lora, comparison)
    for warning in warnings:
        get_run_logger().warning(warning.message)
    show_text("warnings", "\n".join(f"- {warning.message}" for warning in warnings) or "No check raised a warning.",
              "Warnings of the checks")
    return warnings
