"""Compare the two models on the held-out prompts."""

from prefect import task
from prefect.logging import get_run_logger

from hgdpo_core.evaluate import Comparison, compare
from hgdpo_core.generate import PoolPlan
from hgdpo_core.run import Run
from hgdpo_core.shards import ShardFolder
from tasks.options import STAGE
from tasks.ui import show_table


@task(name="evaluate", **STAGE)
def judge(run: Run, target: PoolPlan, tuned: PoolPlan, target_scores: dict[str, ShardFolder],
          tuned_scores: dict[str, ShardFolder]) -> Comparison:
    """Win rates by every scorer, colour shift; kept in `evaluations/`."""
    result = compare(run.store, target, tuned, target_scores, tuned_scores, run.evaluation_prompts.prompts,
                     run.config.evaluation)
    rows = [{"scorer": name, **rate.as_dict()} for name, rate in result.win_rates.items()]
    show_table("win-rates", rows, "Tuned model against target, held-out prompts, same seeds")
    show_table("colour-shift", [result.colour_shift.as_dict()], "Colour shift of the tuned model (percent, degrees)")
    for row in rows:
        get_run_logger().info("Win rate by %s: %s", row["scorer"], {k: v for k, v in row.items() if k != "scorer"})
    return result
