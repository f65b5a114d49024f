"""Scoring existing pools again, on request or every night.

`requested.py`: which scorers are requested. `plan.py`: what is missing. `score.py`: scores and ranks it.
`rescore_run.py`: the record of one such run. `drift.py`: how rankings changed; `drift_measure.py` computes it from the
store, `drift_report.py` renders it. `score_images.py`: image files outside any store.
"""

from hgdpo_core.rescore.score import Ranking, rank_again, score_missing, score_stage, summarise_pools

__all__ = ["Ranking", "score_stage", "rank_again", "score_missing", "summarise_pools"]
