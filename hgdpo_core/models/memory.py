"""Running out of memory, defined once, and how memory is freed."""

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

OUT_OF_MEMORY = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED",
                 "HIP out of memory")
"""Parts of the messages that libraries below torch raise as plain RuntimeError."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of a GPU or of the machine."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    return should_reduce_batch_size(error) or any(part in str(error) for part in OUT_OF_MEMORY)


def free_memory() -> None:
    """Free what nothing refers to any more, also for the driver of the GPU."""
    clear_device_cache(garbage_collection=True)
