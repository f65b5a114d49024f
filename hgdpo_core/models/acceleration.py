"""Faster sampling that changes the low bits of images: compiled networks, and the kernel of attention.

Both are settings of the sampler, off by default and part of a pool's id where they are on. A worker that cannot do them
refuses them, before it loads a model; nothing falls back.
"""

import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hgdpo_core.config import Attention, SamplerConfig
from hgdpo_core.devices import DTYPES, device_name, is_out_of_memory
from hgdpo_core.errors import ConfigError, first_line
from hgdpo_core.storage.scratch import cache_folder

KERNELS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
           "efficient": SDPBackend.EFFICIENT_ATTENTION}
HEAD = 40  # width of the heads in which SD 1.5's attention spends most
CACHE = "TORCHINDUCTOR_CACHE_DIR"


def attention_by(name: Attention) -> AbstractContextManager[object]:
    """Inside, attention tries this kernel first. The VAE's heads of 512 fit none but `efficient` and plain products."""
    if name == "native":
        return nullcontext()
    return sdpa_kernel([KERNELS[name], *KERNELS.values(), SDPBackend.MATH], set_priority=True)


def refuse_acceleration(sampler: SamplerConfig, dtype: str, device: str) -> None:
    """ConfigError, in one line, where this machine has no compiler or no such kernel for `dtype`."""
    _refuse_attention(sampler.attention, dtype, device)
    if sampler.compile and (missing := _missing_for_compile(device)):
        raise ConfigError(f"sampler.compile is on, but {missing}: install it on every worker, or set sampler.compile "
                          "to false")


def _refuse_attention(name: Attention, dtype: str, device: str) -> None:
    if name == "native":
        return
    if not device.startswith("cuda"):
        raise ConfigError(f"sampler.attention is {name}, a kernel of NVIDIA GPUs, but this worker computes on the CPU: "
                          "set it to native, or use workers with a GPU")
    heads = torch.zeros(1, 8, 64, HEAD, dtype=DTYPES[dtype], device=device)
    try:
        with sdpa_kernel(KERNELS[name]):
            scaled_dot_product_attention(heads, heads, heads)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise ConfigError(f"sampler.attention is {name}, but {device_name(device)} has no such kernel for {dtype} "
                          f"({first_line(error)}): set it to native") from None


def _missing_for_compile(device: str) -> str | None:
    if device.startswith("cuda"):
        from torch.utils._triton import has_triton

        if not has_triton():
            return "torch finds no Triton for this GPU"
        found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
        return None if found else "this worker has no C compiler (gcc or clang), which Triton needs"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "this worker has no C++ compiler (g++ or clang++), which torch.compile needs"
    return None


def share_compiled(attention: Attention) -> None:
    """Keep compiled code in the user's cache, for all shard runs of a machine, unless $TORCHINDUCTOR_CACHE_DIR is set.

    A folder for each kernel of attention: torch's key of a graph does not name it.
    """
    ours = cache_folder("compiled")
    if Path(os.environ.get(CACHE) or ours / attention).parent == ours:
        os.environ[CACHE] = str(ours / attention)
