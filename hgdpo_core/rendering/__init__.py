"""Rendering of results: `grids.py` of images, `charts.py`, `tables.py`, `html.py` the page, `parts.py` its parts."""
