"""Precisions by name: which of them a device can compute in, and how float32 is computed on NVIDIA GPUs.

torch's own defaults are float32 products (IEEE) and TF32 convolutions. They are never relied on: `set_float32`, which
loading a model and each call of a scorer use, is the only place that sets them. On a CPU it changes nothing.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch

from hgdpo_core.devices import device_name, resolve_dtype
from hgdpo_core.errors import ConfigError

CallableT = TypeVar("CallableT", bound=Callable[..., Any])
Float32 = Literal["ieee", "tf32"]
"""TF32: factors are rounded to 10 bits of mantissa (float32 has 23), sums are float32."""
PRODUCTS: Any = torch.backends.cuda.matmul
CONVOLUTIONS: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
TF32_CAPABILITY = (8, 0)  # Ampere


def set_float32(products: Float32 = "ieee", convolutions: Float32 = "tf32") -> None:
    """How float32 is computed from here on; by default as for a model that is sampled, encoded with or trained.

    Its convolutions are TF32, as every user of torch has them: a float32 VAE encodes several times faster so.
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

    `auto`: it is what `auto` was on the machine that planned; a GPU refuses a float32 that nobody asked for.
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
