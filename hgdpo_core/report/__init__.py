"""One run as one HTML file: no network, no script, light and dark, fit for a phone and a screen reader.

data.py holds what the page shows, page.py puts it together; numbers.py, pictures.py and training.py are its sections,
samples.py chooses the images; summary.py writes the page and `summary.json`; model_card.py is the page of an export.
"""

from hgdpo_core.rendering.parts import encode_data_uri
from hgdpo_core.report.data import ReportData
from hgdpo_core.report.headline import headline, read_interval
from hgdpo_core.report.page import MAX_BYTES, render_report

__all__ = ["MAX_BYTES", "ReportData", "encode_data_uri", "headline", "read_interval", "render_report"]
