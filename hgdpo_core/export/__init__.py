"""What leaves the project: a run's model (`run.py`), and triplets as files that other trainers read (`pairs.py`).

`layouts.py` holds what each of these trainers reads, with its source.
"""

from hgdpo_core.export.pairs import ExportedPairs, export_pairs
from hgdpo_core.export.run import BASE_NAME, CARD_NAME, PIPELINE_NAME, check_push, export_run, push_folder

__all__ = ["BASE_NAME", "CARD_NAME", "PIPELINE_NAME", "ExportedPairs", "check_push", "export_pairs", "export_run",
           "push_folder"]
