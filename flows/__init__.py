"""The stages in order. `full.py` is the whole road; start there."""
