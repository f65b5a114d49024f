"""Look for what a good win rate or a falling loss may hide."""

from prefect import task
from prefect.logging import get_run_logger

from hgdpo_core.evaluate import Comparison
from hgdpo_core.run import Run
from hgdpo_core.statistics.checks import Alarm, check_run
from hgdpo_core.training.tune import Tuned
from tasks.options import STAGE
from tasks.ui import show_text


@task(name="guards", **STAGE)
def guard(run: Run, lora: Tuned, comparison: Comparison) -> list[Alarm]:
    """The alarms of the run; each is in the log, and all are in the UI."""
    alarms = check_run(lora.log, comparison.win_rates, comparison.defects, comparison.variety_change,
                       run.config.training_judge)
    for alarm in alarms:
        get_run_logger().warning(alarm.message)
    show_text("warnings", "\n".join(f"- {alarm.message}" for alarm in alarms) or "No guard raised an alarm.",
              "What the guards found")
    return alarms
