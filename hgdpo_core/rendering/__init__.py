"""How results are shown: `grids.py` of images, `charts.py`, and HTML (`html.py` the page, `parts.py` its pieces)."""
