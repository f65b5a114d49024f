"""Shared by all tests: one thread (tiny models lose by more), no network, no terminal bars, tiny models made once."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parent))  # for tiny.py

import pretend_cuda
import pytest
import tiny
import torch
from accelerate import PartialState

if not torch.cuda.is_available():  # a GPU that this torch cannot use is an error, also of the processes tests start
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(autouse=True, scope="session")
def _threads():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """No test reads or fills the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def target_folder(tmp_path_factory) -> Path:
    return tiny.save_target(tmp_path_factory.mktemp("models") / "target")


@pytest.fixture(scope="session")
def judge_folder(tmp_path_factory) -> Path:
    return tiny.save_judge(tmp_path_factory.mktemp("models") / "judge")


@pytest.fixture
def cuda(monkeypatch):
    """One GPU, pretended: the log of where the host waits for it."""
    monkeypatch.delenv("HGDPO_DEVICE", raising=False)
    PartialState._reset_state()  # the device of an earlier training in this process
    with pretend_cuda.pretend_cuda() as log:
        yield log
    PartialState._reset_state()
