"""Where the work is computed: the device, its memory when that runs out, and its precisions by name."""

import functools
import gc
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size

from hgdpo_core.errors import ConfigError

CallableT = TypeVar("CallableT", bound=Callable[..., Any])

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OUT_OF_MEMORY = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED",
                 "HIP out of memory")
"""Parts of the messages that libraries below torch raise as plain RuntimeError."""
OTHER_TORCH = "rm -rf .venv && make TORCH_INDEX=https://download.pytorch.org/whl/cu126 install"
Float32 = Literal["ieee", "tf32"]
"""TF32: factors are rounded to 10 bits of mantissa (float32 has 23), sums are float32."""
PRODUCTS: Any = torch.backends.cuda.matmul
CONVOLUTIONS: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
TF32_CAPABILITY = (8, 0)  # Ampere


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
    """$HGDPO_DEVICE (cpu or cuda), else the accelerator torch sees, else the CPU.

    ConfigError for one that is not there, and for a GPU that torch cannot use: it must not become weeks on a CPU.
    """
    requested = os.environ.get("HGDPO_DEVICE") or None
    if requested not in (None, "cpu", "cuda"):
        raise ConfigError(f"HGDPO_DEVICE is {requested!r}: expected cpu or cuda (CUDA_VISIBLE_DEVICES says which GPU)")
    if requested == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        _require_kernels()
        return "cuda"
    if requested == "cuda":
        raise ConfigError(f"HGDPO_DEVICE asks for cuda, but torch {torch.__version__} sees no GPU here: make one "
                          "visible (driver, CUDA_VISIBLE_DEVICES, a CUDA build of torch), or use cpu")
    if not _hides_gpus() and (gpu := _find_unused_gpu()) is not None:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise ConfigError(f"this machine has a GPU ({gpu}), but torch {torch.__version__}, {built}, cannot use it: "
                          f"update its driver, or install a torch that fits it ({OTHER_TORCH}), or set "
                          "HGDPO_DEVICE=cpu to compute on the CPU")
    return "cpu"


def _hides_gpus() -> bool:
    """Whether the user hides all GPUs: an empty list, or one that ends before its first."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return chosen is not None and chosen.strip().partition(",")[0] in ("", "-1", "NoDevFiles")


@functools.cache
def _find_unused_gpu() -> str | None:
    """An NVIDIA GPU of this machine, whatever torch sees: its name and driver, as far as nvidia-smi answers."""
    if shutil.which("nvidia-smi") is not None:
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        try:
            listed = subprocess.run(query, text=True, capture_output=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            listed = None
        if listed is not None and listed.returncode == 0 and listed.stdout.strip():
            return listed.stdout.splitlines()[0].strip().replace(", ", ", driver ")
    devices = sorted(str(path) for path in Path("/dev").glob("nvidia[0-9]*"))
    return f"{devices[0]}, driver not known: nvidia-smi does not answer" if devices else None


def _require_kernels() -> None:
    """ConfigError for a current NVIDIA GPU that no code in this build of torch runs on.

    `sm_XY` runs on the same major version from XY on; `compute_XY` is compiled by the driver for every later one
    (CUDA programming guide, compute capabilities); with the suffix `a` either is for that one alone.
    """
    built = torch.cuda.get_arch_list()
    if torch.version.cuda is None or not built:  # ROCm names its architectures otherwise
        return
    major, minor = torch.cuda.get_device_capability()
    if not any(_runs_on(code, 10 * major + minor) for code in built):
        raise ConfigError(f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}, but torch "
                          f"{torch.__version__}, built for CUDA {torch.version.cuda}, has code for {' '.join(built)} "
                          f"alone: install another torch ({OTHER_TORCH}), choose another GPU by CUDA_VISIBLE_DEVICES, "
                          "or set HGDPO_DEVICE=cpu to compute on the CPU")


def _runs_on(code: str, capability: int) -> bool:
    kind, _, version = code.partition("_")
    number = int(version.rstrip("af"))
    if version.endswith("a"):
        return number == capability
    same_major = number // 10 == capability // 10
    return number <= capability and (same_major if kind == "sm" or version.endswith("f") else True)


def device_name(device: str) -> str:
    """What a manifest records: the GPU's name, or cpu."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"


def use_cpu() -> bool:
    """Whether training runs on the CPU."""
    return default_device() == "cpu"


def use_gpu(number: int) -> None:
    """Make a GPU this process's own, before anything in it takes memory on another; nothing where there is none."""
    if os.environ.get("HGDPO_DEVICE") != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(number)


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


# -- precision by name


def set_float32(products: Float32 = "ieee", convolutions: Float32 = "tf32") -> None:
    """How float32 is computed on NVIDIA GPUs from here on, by default as a model is sampled, encoded with or trained.

    Convolutions are TF32, as every user of torch has them: a float32 VAE encodes several times faster so. Loading a
    model and each call of a scorer set it, and nothing else does: torch's own defaults are not relied on.
    """
    PRODUCTS.fp32_precision = products
    CONVOLUTIONS.fp32_precision = convolutions


@contextmanager
def float32_computed(precision: Float32) -> Iterator[None]:
    """Inside, products and convolutions in float32 are computed so."""
    before = PRODUCTS.fp32_precision, CONVOLUTIONS.fp32_precision
    set_float32(precision, precision)
    try:
        yield
    finally:
        PRODUCTS.fp32_precision, CONVOLUTIONS.fp32_precision = before


def in_own_float32(method: CallableT) -> CallableT:
    """A method that computes float32 as the attribute `float32` of its object says, whatever else the process does."""
    @functools.wraps(method)
    def computed(self: Any, *args: Any, **options: Any) -> Any:
        with float32_computed(self.float32):
            return method(self, *args, **options)

    return computed  # type: ignore[return-value]


def refuse_precision(setting: str, precision: str, device: str, *, auto: bool = False) -> None:
    """ConfigError where `device` cannot compute in a planned `precision`: float32, tf32, bfloat16 or float16.

    `auto`: it is what `auto` was on the machine that planned; a GPU refuses a float32 that was not asked for.
    """
    if not device.startswith("cuda"):
        if precision == "tf32":
            raise ConfigError(f"{setting} is tf32, which is arithmetic of NVIDIA GPUs, but this worker computes on the "
                              "CPU: set it to float32, or use workers with a GPU")
        return
    name = device_name(device)
    if precision == "tf32" and torch.cuda.get_device_capability(device) < TF32_CAPABILITY:
        raise ConfigError(f"{setting} is tf32, but {name} has no TF32 (Ampere and later have): set it to float32 or "
                          "float16, or use workers with another GPU")
    if precision == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError(f"{setting} is bfloat16, but {name} has no arithmetic for it: set it to float16 or float32, "
                          "or use workers with another GPU")
    if auto and precision == "float32":
        raise ConfigError(f"{setting} is auto, which is float32 on the machine that planned this, as it has no GPU, "
                          f"but this worker has {name}: start the run that planned it again with {setting} set to "
                          f"{resolve_dtype('auto')}, or to float32 if you want that")
