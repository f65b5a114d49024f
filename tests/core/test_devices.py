"""The device of a machine whose GPU torch cannot use: one line, instead of weeks on a CPU."""

import subprocess

import pytest
import torch

from hgdpo_core import devices
from hgdpo_core.devices import default_device
from hgdpo_core.errors import ConfigError

BUILT = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.fixture(autouse=True)
def _plain_shell(monkeypatch):
    monkeypatch.delenv("HGDPO_DEVICE", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    devices._find_unused_gpu.cache_clear()
    yield
    devices._find_unused_gpu.cache_clear()


def nvidia_smi(monkeypatch, status: int, output: str) -> None:
    monkeypatch.setattr(devices.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(devices.subprocess, "run",
                        lambda command, **options: subprocess.CompletedProcess(command, status, output, ""))


def test_a_gpu_that_torch_does_not_see_is_one_line(monkeypatch):
    nvidia_smi(monkeypatch, 0, "NVIDIA H100 80GB HBM3, 470.57.02\nNVIDIA H100 80GB HBM3, 470.57.02\n")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ConfigError) as error:
        default_device()
    message = str(error.value)
    assert "NVIDIA H100 80GB HBM3, driver 470.57.02" in message and "built for CUDA 13.0" in message
    assert "TORCH_INDEX=https" in message and "HGDPO_DEVICE=cpu" in message and "\n" not in message
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ConfigError, match="built without CUDA, cannot use it"):
        default_device()


def test_so_it_is_where_the_driver_does_not_answer(monkeypatch, tmp_path):
    nvidia_smi(monkeypatch, 9, "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.")
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(devices, "Path", lambda folder: tmp_path)
    with pytest.raises(ConfigError, match="nvidia0, driver not known: nvidia-smi does not answer"):
        default_device()


@pytest.mark.parametrize(("name", "value"), [("HGDPO_DEVICE", "cpu"), ("CUDA_VISIBLE_DEVICES", ""),
                                             ("CUDA_VISIBLE_DEVICES", "-1")])
def test_who_asks_for_the_cpu_gets_it(monkeypatch, name, value):
    nvidia_smi(monkeypatch, 0, "NVIDIA H100 80GB HBM3, 470.57.02\n")
    monkeypatch.setenv(name, value)
    assert default_device() == "cpu"


def test_without_a_gpu_it_is_the_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr(devices.shutil, "which", lambda name: None)
    monkeypatch.setattr(devices, "Path", lambda folder: tmp_path)
    assert default_device() == "cpu"


@pytest.mark.parametrize(("capability", "built", "works"), [
    ((7, 5), BUILT, True), ((8, 0), BUILT, True), ((8, 9), BUILT, True), ((9, 0), BUILT, True),
    ((12, 1), BUILT, True),
    ((7, 0), BUILT, False),                             # V100: in builds for CUDA 12.6 and older alone
    ((6, 1), BUILT, False),
    ((13, 0), BUILT, True),                             # the driver compiles compute_120
    ((13, 0), ["sm_75", "sm_120"], False),
    ((10, 0), ["sm_80", "sm_90", "compute_80"], True),
    ((7, 5), ["sm_80", "compute_80"], False),
    ((9, 0), ["sm_80", "sm_90a"], True), ((10, 0), ["sm_80", "sm_90a", "compute_90a"], False),
])
def test_a_gpu_needs_code_that_runs_on_it(monkeypatch, capability, built, works):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    if works:
        assert default_device() == "cuda"
    else:
        with pytest.raises(ConfigError, match="Tesla V100 has compute capability .*built for CUDA 13.0, has code for "
                                              ".*TORCH_INDEX=.*HGDPO_DEVICE=cpu"):
            default_device()


def test_rocm_names_its_architectures_otherwise(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["gfx942"])
    monkeypatch.setattr(torch.version, "cuda", None)
    assert default_device() == "cuda"
