"""The object store under every stage: a local folder or any fsspec URL, with the same guarantees for both.

`store.py` gives the guarantees; `local.py` and `remote.py` carry out one request each; `failures.py` decides what is
tried again and explains the rest; `roots.py` reads roots, refuses secrets and connects; `keys.py` names objects;
`ranges.py` makes a file of ranged reads; `scratch.py` gives temporary folders; `dry.py` is the store of plans.
"""

from hgdpo_core.storage.dry import DryStore
from hgdpo_core.storage.failures import MissingKeyError
from hgdpo_core.storage.keys import is_temporary
from hgdpo_core.storage.roots import PARALLEL_REQUESTS
from hgdpo_core.storage.scratch import scratch_folder
from hgdpo_core.storage.store import Store

__all__ = ["PARALLEL_REQUESTS", "DryStore", "MissingKeyError", "Store", "is_temporary", "scratch_folder"]
