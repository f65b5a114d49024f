"""Pictures of pictures: `showcase.py` chooses, `grids.py` lays out, `plots.py` draws charts; `page.py` frames them all.
"""
