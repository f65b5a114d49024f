"""Memory that runs out is recognised in every form, and a network's is free when its work is done."""

import gc
import weakref

import pytest
import tiny_scorers
import torch
from PIL import Image

from hgdpo_core.config import PoolConfig, SamplerConfig, TargetConfig
from hgdpo_core.devices import is_out_of_memory
from hgdpo_core.models import find_model
from hgdpo_core.models.image_generator import ImageGenerator
from hgdpo_core.scorers import load_scorer

MESSAGES = [
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.11 GiB of which 1 MiB is free",
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input.",
    "HIP out of memory. Tried to allocate 2.00 GiB",
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9",
]
OTHERS = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: no kernel image is available for execution on the device"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"), ValueError("CUDA out of memory"),
]


@pytest.mark.parametrize("message", MESSAGES)
def test_memory_that_runs_out_is_recognised(message):
    assert is_out_of_memory(RuntimeError(message))


def test_what_else_goes_wrong_is_not():
    assert is_out_of_memory(torch.OutOfMemoryError("whatever it says"))
    assert not [error for error in OTHERS if is_out_of_memory(error)]


@pytest.fixture
def no_collector():
    """Without the garbage collector nothing in a circle of references is ever freed."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("name", ["pickscore", *tiny_scorers.SAVE])
def test_a_scorers_weights_go_with_it(no_collector, judge_folder, tmp_path, name):
    source = judge_folder if name == "pickscore" else tiny_scorers.SAVE[name](tmp_path)
    scorer = load_scorer(name, source=str(source))
    scorer.score([Image.new("RGB", (40, 40))], ["a cat"])
    network = scorer.model if hasattr(scorer, "model") else scorer.vision
    weight = weakref.ref(next(network.parameters()))
    del network, scorer
    assert weight() is None


def test_a_generators_weights_go_with_it(no_collector, target_folder):
    model = find_model(TargetConfig(source=str(target_folder), dtype="float32"))
    sampler = SamplerConfig(width=32, height=32, steps=1)
    generator = ImageGenerator(model, sampler, PoolConfig(images_per_prompt=1), "cpu")
    assert len(list(generator.generate(["a cat"]))) == 1
    weight = weakref.ref(next(generator.backbone.denoiser.parameters()))
    del generator
    assert weight() is None
