"""How results are shown: `grids.py` of images, `charts.py`, `tables.py`, `html.py` the page, `parts.py` its pieces."""
