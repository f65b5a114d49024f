"""Where the work is computed: the device, its precisions, and its memory when that runs out."""

import gc
import os

import torch
from accelerate.utils.memory import should_reduce_batch_size

from hgdpo_core.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OUT_OF_MEMORY = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED",
                 "HIP out of memory")
"""Parts of the messages that libraries below torch raise as plain RuntimeError."""


def resolve_dtype(dtype: str) -> str:
    """`auto` as a named precision: bfloat16 where the machine is fast at it, else float32."""
    if dtype != "auto":
        return dtype
    if default_device().startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    return "bfloat16" if cpu_has_fast_bfloat16() else "float32"


def cpu_has_fast_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def default_device() -> str:
    """$HGDPO_DEVICE (cpu or cuda), else the accelerator torch sees, else the CPU; ConfigError for one not there."""
    found = "cuda" if torch.cuda.is_available() else "cpu"
    requested = os.environ.get("HGDPO_DEVICE") or found
    if requested not in ("cpu", "cuda"):
        raise ConfigError(f"HGDPO_DEVICE is {requested!r}: expected cpu or cuda (CUDA_VISIBLE_DEVICES says which GPU)")
    if requested == "cuda" != found:
        raise ConfigError(f"HGDPO_DEVICE asks for cuda, but torch {torch.__version__} sees no GPU here: make one "
                          "visible (driver, CUDA_VISIBLE_DEVICES, a CUDA build of torch), or use cpu")
    return requested


def device_name(device: str) -> str:
    """What a manifest records: the GPU's name, or cpu."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"


def use_cpu() -> bool:
    """Whether training runs on the CPU."""
    return default_device() == "cpu"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of a GPU or of the machine."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    return should_reduce_batch_size(error) or any(part in str(error) for part in OUT_OF_MEMORY)


def free_memory() -> None:
    """Give back what nothing refers to any more, also to the driver of the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
