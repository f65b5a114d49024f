"""The pretended GPU of the tests raises as CUDA does, and sees every place where the host waits."""

import inspect

import pytest
import torch
import torch.nn.functional as F

from hgdpo_core.devices import default_device, device_name

FILE = "tests/core/test_pretend_cuda.py"


def test_a_gpu_is_seen_and_tensors_claim_to_be_there(cuda):
    assert default_device() == "cuda" and device_name("cuda") == "NVIDIA pretended"
    x = torch.zeros(2, 3, device="cuda")
    assert x.device == torch.device("cuda", 0) and x.is_cuda and (x + 1).device == x.device
    assert x.new_ones(2).is_cuda and torch.randn_like(x).is_cuda and x[0, :2].is_cuda
    assert not torch.zeros(2).is_cuda and not x.cpu().is_cuda and not torch.zeros(2, device="cpu").is_cuda
    assert torch.equal(x.cpu() + 1, torch.ones(2, 3))


@pytest.mark.parametrize("mix", [
    lambda x: x + torch.ones(2, 3), lambda x: torch.cat([x, torch.ones(1, 3)]), lambda x: F.linear(x, torch.ones(4, 3)),
    lambda x: torch.where(torch.ones(2, 3) > 0, x, x), lambda x: torch.ones(2, 3).mul_(x),
    lambda x: F.scaled_dot_product_attention(x[None], x[None], torch.ones(1, 2, 3)),
    lambda x: torch.ones(2)[x[:, 0].long()]])
def test_operations_that_mix_devices_raise(cuda, mix):
    with pytest.raises(RuntimeError, match=f"at {FILE}:[0-9]+"):
        mix(torch.zeros(2, 3, device="cuda"))


def test_numpy_cannot_read_a_gpu_and_one_number_of_the_cpu_may_be_mixed_in(cuda):
    x = torch.zeros(2, 3, device="cuda")
    with pytest.raises(TypeError, match="cuda:0 .* numpy"):
        x.numpy()
    assert (x + torch.tensor(2.0)).cpu().tolist() == [[2.0] * 3] * 2
    assert not cuda.values


@pytest.mark.parametrize("read", [
    lambda x: x.sum().item(), lambda x: x.tolist(), lambda x: bool(x.any()), lambda x: 1 if x.sum() > 3 else 0,
    lambda x: x.nonzero(), lambda x: x[x > 3], lambda x: torch.equal(x, x), lambda x: f"{float(x.mean())}"])
def test_numbers_that_the_host_reads_are_counted_with_their_line(cuda, read):
    read(torch.zeros(2, 3, device="cuda"))
    assert list(cuda.values) == [f"{FILE}:{read.__code__.co_firstlineno}"]
    assert not cuda.to_host and not cuda.to_device


def test_copies_wait_unless_they_need_not(cuda):
    x = torch.zeros(2, 3, device="cuda")
    x.cpu(), x.to("cpu"), torch.empty(2, 3).copy_(x)
    assert cuda.to_host == {f"{FILE}:{inspect.currentframe().f_lineno - 1}": 3}
    torch.zeros(2).to("cuda"), x.copy_(torch.ones(2, 3)), x[torch.tensor([1])]
    assert cuda.to_device == {f"{FILE}:{inspect.currentframe().f_lineno - 1}": 3}
    cuda.clear()
    x.to("cpu", non_blocking=True), torch.zeros(2).to("cuda", non_blocking=True)
    x.copy_(x + 1), x.to("cuda"), x.bfloat16(), torch.zeros(2).to("cpu")
    assert not cuda.waits and not cuda.to_device


def test_a_network_moves_learns_and_comes_back(cuda):
    """As on the CPU, bit by bit."""
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.GroupNorm(2, 4)).to(device)
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
        for _ in range(2):
            network(torch.ones(5, 3, device=device)).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        assert next(network.parameters()).device.type == device
        results.append(torch.cat([tensor.flatten() for tensor in network.to("cpu").state_dict().values()]))
    assert torch.equal(*results) and not cuda.values


def test_autocast_multiplies_in_half_precision_and_sums_in_float32(cuda):
    x, weight = torch.ones(2, 4, 4, device="cuda"), torch.ones(4, 4, device="cuda", requires_grad=True)
    with torch.autocast("cuda", dtype=torch.float16):
        product = F.linear(x, weight)
        assert product.dtype == F.scaled_dot_product_attention(x, x, x).dtype == torch.float16
        assert F.group_norm(product, 2).dtype == torch.cat([x, product]).dtype == torch.float32
        assert F.linear(torch.ones(2, 4), torch.ones(4, 4)).dtype == torch.float32  # the CPU's own autocast is off
    product.sum().backward()
    assert weight.grad.dtype == torch.float32 and weight.grad.is_cuda
