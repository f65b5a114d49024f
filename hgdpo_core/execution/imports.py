"""Import this first in a process that is going to work: it imports torch, diffusers, transformers and peft, quickly.

They make 600 000 objects that live as long as the process. Python's garbage collector would walk them again and again
while they are made, and once more at the end: 2 of 8 s and 2 s more, for every shard run.
"""

import gc
import importlib
import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it complains of kernels that nobody asked for
gc.disable()
try:
    importlib.import_module("hgdpo_core.execution.jobs")  # reaches every stage, and so all of them
finally:
    gc.freeze()  # set aside what is there
    gc.enable()
