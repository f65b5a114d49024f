"""The plan of a run: what is missing, what exists, how long the work takes and how much storage it needs.

`planner.py` runs the pipeline without making anything, `training.py` plans and times its trainings, `rates.py` reads
the speed of past work, `table.py` is the result and its text.
"""

from hgdpo_core.plan.planner import plan_run

__all__ = ["plan_run"]
