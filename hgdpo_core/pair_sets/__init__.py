"""Preference pairs that others labelled, for training: found, filtered, read a few at a time.

`sets.py` is any such data set, `stand_ins.py` the built-in ones; `files.py` finds files; `tables.py` reads Parquet,
`indexed.py` JSON Lines and tars, `hpd.py` HPD v2; `rows.py` is one row and why it is not used; `words.py` finds prompts
about people, and unsafe ones.
"""

from hgdpo_core.pair_sets.sets import PairSet, open_pair_set

__all__ = ["PairSet", "open_pair_set"]
