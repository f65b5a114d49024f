"""Quick imports of torch, diffusers, transformers and peft, for a process that will need them."""

import gc
import importlib
import logging
import os


def load_libraries() -> None:
    """Import all that the stages need, first of all, and leave it out of garbage collection from then on.

    It makes 600 000 objects that live as long as the process. Python's garbage collector would traverse them repeatedly
    while they are made, and once more at the end: 2 of 8 s and 2 s more, for every shard run. For a process of its
    own: whatever else is alive by then is left out too.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it warns of kernels that are not used
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():  # the second: before torch 2.9
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # no pieces of GPU memory too small for a batch
    gc.disable()
    try:
        importlib.import_module("hgdpo_core.execution.jobs")  # reaches every stage, and so all of them
    finally:
        gc.freeze()
        gc.enable()
