"""The report of a run as one HTML file: no network, no script, light and dark mode, readable on phones and by readers.

data.py holds the data of the page, page.py assembles it; numbers.py, images.py and training.py are its sections,
samples.py selects the images; summary.py writes the page and `summary.json`; model_card.py is the card of an export.
"""

from hgdpo_core.rendering.parts import encode_data_uri
from hgdpo_core.report.data import ReportData
from hgdpo_core.report.headline import headline, read_interval
from hgdpo_core.report.page import MAX_BYTES, render_report

__all__ = ["MAX_BYTES", "ReportData", "encode_data_uri", "headline", "read_interval", "render_report"]
