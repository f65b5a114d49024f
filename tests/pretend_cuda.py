"""A GPU to pretend: tensors that claim to be on cuda:0, compute on the CPU, and log where the host waits for them.

    with pretend_cuda() as log:
        network.to("cuda")(torch.zeros(1, 4, device="cuda")).sum().item()
    assert log.values == {"file.py:2": 1}

It shows: operations that mix devices (they raise, as on CUDA), reads of a GPU's tensor by numpy, every place where the
host waits for the GPU, that CUDA's code paths (autocast, GradScaler, gradient checkpointing) run, and their results up
to the arithmetic. It cannot show: kernels that CUDA lacks or has in other precisions, time, memory, streams, NCCL,
attention backends (the fused attention is plain products here) or bitsandbytes.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda", 0)
ROOT = Path(__file__).parents[1]
OWN = str(ROOT / "hgdpo_core")
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
MIX_DEVICES = {"_to_copy", "copy_", "set_", "lift_fresh", *INDEXED}
"""Operations that CUDA's tensors may share with the CPU's."""
READS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2"}
"""Operations whose result, or its shape, the host has to know; indexing by a mask is one too."""

IN_HALF = {"linear", "conv1d", "conv2d", "conv3d", "matmul", "__matmul__", "bmm", "baddbmm", "addmm", "mm",
           "scaled_dot_product_attention"}
IN_FLOAT32 = {"layer_norm", "group_norm", "softmax", "log_softmax", "mse_loss", "pow", "__pow__", "exp", "log", "sum",
              "prod", "cumsum", "norm", "softplus", "normalize", "rsqrt"}
IN_WIDEST = {"cat", "stack", "addcmul", "addcdiv", "dot"}
"""Of torch's list of what CUDA's autocast casts, what these networks use."""


@dataclass
class Log:
    """Where the host waited for the GPU, and how often: counters of `file:line`, this package's where it was involved.

    A copy to the device is one as well: it comes from pageable memory, so it waits for all that was launched before.
    """

    values: Counter = field(default_factory=Counter)
    """A number was read: item, bool, tolist, a data-dependent shape."""
    to_host: Counter = field(default_factory=Counter)
    to_device: Counter = field(default_factory=Counter)

    @property
    def waits(self) -> Counter:
        """Reads and copies to the host: all that cannot be queued."""
        return self.values + self.to_host

    def clear(self) -> None:
        for counter in (self.values, self.to_host, self.to_device):
            counter.clear()


class Pretended(torch.Tensor):
    """A tensor of the CPU, `held`, behind a shape on cuda:0."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor, requires_grad: bool = False):
        with torch._C._DisableTorchDispatch():
            shape = torch.empty_strided(held.size(), held.stride(), dtype=held.dtype, device="meta")
        made = torch.Tensor._make_subclass(cls, shape, requires_grad, dispatch_device=True,
                                           device_for_backend_keys=CUDA)
        made.held = held
        return made

    device = property(lambda _: CUDA)  # pyright: ignore[reportAssignmentType]
    is_cuda = property(lambda _: True)  # pyright: ignore[reportAssignmentType]
    is_meta = property(lambda _: False)  # pyright: ignore[reportAssignmentType]

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Pretended({self.held})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return ACTIVE[-1].__torch_dispatch__(function, types, args, kwargs)

    __torch_function__ = torch._C._disabled_torch_function_impl


ACTIVE: list["_Dispatch"] = []


def place() -> str:
    """file:line of the innermost frame of the package; else of the innermost that is neither of torch nor of this file.
    """
    found, frame = None, sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(OWN):
            return f"{Path(name).relative_to(ROOT).as_posix()}:{frame.f_lineno}"
        if found is None and name != __file__ and "/torch/" not in name and "<" not in name:
            found = f"{name.rpartition('site-packages/')[2].removeprefix(f'{ROOT}/')}:{frame.f_lineno}"
        frame = frame.f_back
    return found or "?"


def _map(change: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """The value with its tensors changed, also those in lists, tuples and dictionaries; torch's own map is slow."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        changed = [_map(change, item) for item in value]
        return changed if isinstance(value, list) else tuple(changed)
    if isinstance(value, dict):
        return {key: _map(change, item) for key, item in value.items()}
    return value


def _tensors(*values: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    _map(found.append, values)
    return found


def held(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.held if isinstance(tensor, Pretended) else tensor


def on_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _adopted(tensor: torch.Tensor) -> torch.Tensor:
    return Pretended(tensor) if tensor.ndim and not isinstance(tensor, Pretended) else tensor


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


class _Dispatch(TorchDispatchMode):
    """Every operation, on the CPU's data."""

    def __init__(self, log: Log):
        super().__init__()
        self.log = log

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = function._schema.name.partition("::")[2]
        if name == "device":  # as C++ asks: autograd would want a guard for CUDA, which builds for CPUs lack
            return torch.device("cpu")
        tensors, device = _tensors(args, kwargs), kwargs.get("device")
        pretended = any(isinstance(tensor, Pretended) for tensor in tensors)
        if not pretended and not on_cuda(device):
            return function(*args, **kwargs)
        if pretended and torch._C._current_graph_task_id() != -1:
            args, kwargs = _map(_adopted, (args, kwargs))  # autograd takes all for the CPU's: its zeros, its casts
            tensors, device = _tensors(args, kwargs), kwargs.pop("device", None) and CUDA
        others = [tensor for tensor in tensors if not isinstance(tensor, Pretended)]
        if pretended and name not in MIX_DEVICES and any(tensor.ndim for tensor in others):
            raise RuntimeError(f"{function} expects all tensors on one device, found cuda:0 and cpu at {place()}")
        if name in INDEXED and others and pretended:
            if not isinstance(args[0], Pretended):
                raise RuntimeError(f"{function}: a tensor of the CPU is indexed by one of cuda:0 at {place()}")
            self.log.to_device[place()] += 1
        masked = name in INDEXED and any(tensor.dtype == torch.bool for tensor in tensors[1:])
        if pretended and (name in READS or masked):
            self.log.values[place()] += 1
        if device is not None:
            kwargs["device"] = torch.device("cpu")
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        result = function(*_map(held, args), **_map(held, kwargs))
        if name in ("_to_copy", "copy_"):
            return self._copied(name, args, kwargs, device, result)
        if any(_is_written(returned) for returned in function._schema.returns):
            written = [args[i] if i < len(args) else kwargs[argument.name]
                       for i, argument in enumerate(function._schema.arguments) if _is_written(argument)]
            return tuple(written) if isinstance(result, tuple | list) else written[0]
        if on_cuda(device) if device is not None else pretended:
            return _map(Pretended, result)
        return result

    def _copied(self, name: str, args: Any, kwargs: Any, device: Any, result: torch.Tensor) -> torch.Tensor:
        if name == "copy_":
            target, source = (isinstance(tensor, Pretended) for tensor in args[:2])
            no_wait = kwargs.get("non_blocking") or args[2:3] == (True,)
        else:
            source = isinstance(args[0], Pretended)
            target = on_cuda(device) if device is not None else source
            no_wait = kwargs.get("non_blocking")
        if source != target and not no_wait:
            (self.log.to_device if target else self.log.to_host)[place()] += 1
        if name == "copy_":
            return args[0]
        return Pretended(result) if target else result


class _Functions(TorchFunctionMode):
    """What torch decides by device above the dispatcher."""

    def __init__(self, log: Log):
        super().__init__()
        self.log = log

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if function is torch.device or name == "__get__":
            return function(*args, **(kwargs or {}))
        args = tuple([_indexed(value) for value in args])
        kwargs = {key: _indexed(value) for key, value in (kwargs or {}).items()}
        if torch.is_autocast_enabled("cuda"):
            args, kwargs = _autocast(name, args, kwargs)
        if function is F.scaled_dot_product_attention:
            return _attention(function, *args, **kwargs)
        if args and isinstance(args[0], Pretended):
            if name in ("numpy", "__array__"):
                raise TypeError(f"can't convert cuda:0 device type tensor to numpy at {place()}")
            if name == "tolist":
                self.log.values[place()] += 1
                return args[0].held.detach().tolist()
            if name in ("cpu", "to"):
                return _moved(function, name, args, kwargs)
        return function(*args, **kwargs)


def _moved(function: Any, name: str, args: tuple, kwargs: dict) -> torch.Tensor:
    """`tensor.cpu()` and `tensor.to(...)`: C++ takes the tensor for one of the CPU, and would return it as it is."""
    tensor, *others = args
    others += [kwargs[key] for key in ("device", "dtype", "other") if kwargs.get(key) is not None]
    device, dtype = (torch.device("cpu") if name == "cpu" else None), None
    for value in others:
        if isinstance(value, str | torch.device):
            device = torch.device(value)
        elif isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, torch.Tensor):
            device, dtype = value.device, value.dtype
    if device is not None and device.type == "cpu":
        no_wait = kwargs.get("non_blocking", False) or True in [value for value in others if isinstance(value, bool)]
        return torch.ops.aten._to_copy(tensor, device=device, dtype=dtype, non_blocking=no_wait)
    return function(*args, **kwargs) if dtype is not None or kwargs.get("copy") else tensor


def _autocast(name: str, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """What CUDA's autocast does to the arguments of a function; its dispatch key is not set for tensors like ours."""
    tensors = [tensor for tensor in _tensors(args, kwargs) if _is_cast(tensor)]
    dtype = torch.get_autocast_dtype("cuda") if name in IN_HALF else torch.float32 if name in IN_FLOAT32 else None
    if name in IN_WIDEST and len({tensor.dtype for tensor in tensors}) > 1:
        dtype = torch.float32
    if dtype is None or not tensors:
        return args, kwargs
    return _map(lambda tensor: tensor.to(dtype) if _is_cast(tensor) else tensor, (args, kwargs))


def _is_cast(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, Pretended) and tensor.is_floating_point()


def _indexed(value: Any) -> Any:
    """"cuda" with its number: without one, torch would ask the driver for the current device."""
    if isinstance(value, torch.device) and value.type == "cuda" or isinstance(value, str) and value == "cuda":
        return CUDA
    return value


def _attention(function, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **others):
    """Plain products: there is no fused kernel to dispatch to."""
    given = [tensor for tensor in (query, key, value, attn_mask) if tensor is not None]
    if not isinstance(query, Pretended):
        return function(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **others)
    if not all(isinstance(tensor, Pretended) for tensor in given):
        raise RuntimeError(f"attention expects all tensors on one device, found cuda:0 and cpu at {place()}")
    with torch.autocast("cuda", enabled=False):
        weights = query.float() @ key.float().transpose(-1, -2) * (scale or query.shape[-1] ** -0.5)
        if is_causal:
            weights = weights + torch.full(weights.shape[-2:], -torch.inf, device=weights.device).triu(1)
        if attn_mask is not None:
            masked = attn_mask.dtype == torch.bool
            weights = weights.masked_fill(~attn_mask, -torch.inf) if masked else weights + attn_mask.float()
        return (weights.softmax(-1) @ value.float()).to(query.dtype)


CUDA_CALLS: dict[str, Any] = {
    "is_available": lambda: True, "is_bf16_supported": lambda including_emulation=True: True,
    "get_device_name": lambda device=None: "NVIDIA pretended", "empty_cache": lambda: None, "device_count": lambda: 1,
    "current_device": lambda: 0, "set_device": lambda device: None, "synchronize": lambda device=None: None,
    "_lazy_init": lambda: None, "get_device_capability": lambda device=None: (9, 0),
    "max_memory_allocated": lambda device=None: 0, "reset_peak_memory_stats": lambda device=None: None,
}


def _group_by_device(tensors: list, with_indices: bool = False, *, group=torch._C._group_tensors_by_device_and_dtype):
    """With the device that Python sees; for foreach functions."""
    grouped = group(tensors, with_indices)
    return {(lists[0][0][0].device, dtype): lists for (_, dtype), lists in grouped.items()}


@contextlib.contextmanager
def pretend_cuda() -> Iterator[Log]:
    """Inside, torch sees one GPU; the log of what was waited for."""
    torch._C._ensureCUDADeviceGuardSet()
    log = Log()
    dispatch = _Dispatch(log)
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    with contextlib.ExitStack() as stack:
        for name, replacement in CUDA_CALLS.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, replacement))
        stack.enter_context(mock.patch.object(torch._C, "_group_tensors_by_device_and_dtype", _group_by_device))
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        torch.__future__.set_swap_module_params_on_conversion(True)  # Module.to: the same parameter becomes one of ours
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swaps)
        ACTIVE.append(dispatch)
        stack.callback(ACTIVE.pop)
        functions, run_backward = _Functions(log), torch.autograd._engine_run_backward

        def backward(*args: Any, **kwargs: Any) -> Any:
            with functions:  # backward is a function too, so torch has left the mode: checkpointing calls the network
                return run_backward(*args, **kwargs)

        stack.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", backward))
        stack.enter_context(functions)
        stack.enter_context(dispatch)
        yield log
