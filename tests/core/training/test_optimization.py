"""Optimizers, the warm-up, and the precision of a GPU."""

import logging
import sys
from types import ModuleType

import pytest
import torch

from hgdpo_core.config import SftConfig
from hgdpo_core.errors import ConfigError
from hgdpo_core.training.optimization import make_optimizer, warm_up_schedule
from hgdpo_core.training.parts import resolve_precision


def config(**settings) -> SftConfig:
    return SftConfig(**{"batch_size": 1, "learning_rate": 0.5, **settings})


def parameter(size: int = 4096) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.linspace(-1, 1, size))


def test_adamw_takes_every_setting():
    optimizer = make_optimizer([parameter()], config(adam_betas=(0.8, 0.9), weight_decay=0.1))
    group = optimizer.param_groups[0]
    assert type(optimizer) is torch.optim.AdamW
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.5, (0.8, 0.9), 0.1)


@pytest.mark.parametrize(("size", "dtype"), [(4096, torch.uint8), (4095, torch.float32)])
def test_adam8bit_keeps_8_bit_states_from_4096_elements_on(size, dtype):
    pytest.importorskip("bitsandbytes")
    weight = parameter(size)
    optimizer = make_optimizer([weight], config(optimizer="adam8bit"))
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert optimizer.state[weight]["state1"].dtype == dtype


def test_weight_decay_means_the_same_in_both():
    pytest.importorskip("bitsandbytes")
    results = []
    for name in ("adamw", "adam8bit"):
        weight = parameter()
        optimizer = make_optimizer([weight], config(optimizer=name, weight_decay=0.2))
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        results.append(weight.detach())
    torch.testing.assert_close(results[0], parameter().detach() * (1 - 0.5 * 0.2))
    torch.testing.assert_close(results[1], results[0])


def test_without_bitsandbytes_adamw_stands_in_and_the_log_says_so(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with caplog.at_level(logging.WARNING):
        optimizer = make_optimizer([parameter()], config(optimizer="adam8bit"))
    assert type(optimizer) is torch.optim.AdamW
    assert "bitsandbytes" in caplog.text


def break_native_library(monkeypatch, error: Exception) -> None:
    class AdamW8bit(torch.optim.AdamW):
        def step(self, closure=None):
            assert self.param_groups[0]["params"][0].numel() == 4096
            raise error

    module = ModuleType("bitsandbytes.optim")
    module.AdamW8bit = AdamW8bit  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)


@pytest.mark.parametrize("error", [
    RuntimeError("Configured CUDA binary not found at libbitsandbytes_cuda130.so\nand many lines more"),
    OSError("libcudart.so.12: cannot open shared object file"), AttributeError("cadam8bit_blockwise_grad_fp32"),
])
def test_so_it_does_where_the_first_step_of_bitsandbytes_fails(monkeypatch, caplog, error):
    break_native_library(monkeypatch, error)
    weight = parameter()
    with caplog.at_level(logging.WARNING):
        optimizer = make_optimizer([weight], config(optimizer="adam8bit"))
    assert type(optimizer) is torch.optim.AdamW and torch.equal(weight, parameter()) and weight.grad is None
    assert str(error).splitlines()[0] in caplog.messages[0] and "\n" not in caplog.messages[0]


def test_memory_that_runs_out_is_no_fault_of_bitsandbytes(monkeypatch):
    break_native_library(monkeypatch, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a lot."))
    with pytest.raises(torch.OutOfMemoryError):
        make_optimizer([parameter()], config(optimizer="adam8bit"))


@pytest.mark.parametrize(("warmup", "rates"), [(0, [0.5] * 5), (4, [0.125, 0.25, 0.375, 0.5, 0.5])])
def test_the_learning_rate_is_constant_after_a_linear_warm_up(warmup, rates):
    optimizer = make_optimizer([parameter()], config())
    schedule = warm_up_schedule(optimizer, warmup)
    seen = []
    for _ in rates:
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert seen == rates


@pytest.mark.parametrize(("capability", "precision"), [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16"),
                                                       ((7, 0), "fp16"), ((6, 1), "no")])
def test_a_gpu_without_bf16_trains_in_fp16_where_that_is_fast(monkeypatch, capability, precision):
    """T4 is 7.5, V100 7.0. Torch says of both that they have bf16: it emulates it."""
    monkeypatch.delenv("HGDPO_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: including_emulation or capability >= (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    assert resolve_precision("auto") == precision and resolve_precision("fp16") == "fp16"
    if precision == "bf16":
        assert resolve_precision("bf16") == "bf16"
    else:
        with pytest.raises(ConfigError, match="bf16 is only emulated on Tesla T4: use auto, fp16 or no"):
            resolve_precision("bf16")
