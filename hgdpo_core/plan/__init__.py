"""What a run will make and find, how long it takes, how large it gets.

`planner.py` walks the road without making anything, `training.py` plans the trainings on it, `rates.py` and `probe.py`
say how fast work goes, `table.py` is the result and its text.
"""

from hgdpo_core.plan.planner import plan_run

__all__ = ["plan_run"]
