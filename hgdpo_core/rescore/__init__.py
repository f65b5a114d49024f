"""Scoring again, by hand or every night.

`wanted.py` says which scorers, `plan.py` what is missing, `score.py` makes it, `night.py` keeps the record; `drift.py`
is the arithmetic of what changed, `drift_measure.py` takes it from the store, `drift_report.py` writes it.
"""

from hgdpo_core.rescore.score import Ranking, rank_again, score_missing, score_stage, summarise_pools

__all__ = ["Ranking", "score_stage", "rank_again", "score_missing", "summarise_pools"]
