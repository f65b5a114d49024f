"""Precisions: how float32 is computed is set, never left to torch, and a device refuses what it cannot do well."""

import numpy as np
import pytest
import torch

from hgdpo_core import devices
from hgdpo_core.config import PoolConfig, SamplerConfig, ScorerConfig, TargetConfig
from hgdpo_core.devices import float32_computed, refuse_precision, set_float32
from hgdpo_core.errors import ConfigError
from hgdpo_core.execution.jobs import cut, open_stage, write_recipe
from hgdpo_core.models import find_model, load_backbone
from hgdpo_core.scorers import load_configured_scorer
from hgdpo_core.stages.base import Worker
from hgdpo_core.stages.pool import plan_pool
from hgdpo_core.stages.scores import score_settings
from hgdpo_core.storage import Store

IMAGE = np.zeros((1, 32, 32, 3), np.uint8)


def float32():
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision


@pytest.fixture
def gpu(monkeypatch):
    """A function that makes refusals see a GPU of a capability; like a Tesla T4's by default."""
    def use(capability=(7, 5)):
        monkeypatch.setattr(devices, "default_device", lambda: "cuda")
        monkeypatch.setattr(devices, "device_name", lambda device: "Tesla T4")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: capability >= (8, 0))

    return use


@pytest.fixture(autouse=True)
def _torch_as_before():
    before = float32()
    torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision = "none", "none"
    yield
    torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision = before


def test_loading_a_model_sets_how_float32_is_computed(target_folder):
    load_backbone(find_model(TargetConfig(source=str(target_folder), dtype="float32")))
    assert float32() == ("ieee", "tf32")


@pytest.mark.parametrize("name", ["pickscore", "tinted"])
@pytest.mark.parametrize(("dtype", "computed"), [("float32", "ieee"), ("tf32", "tf32"), ("bfloat16", "ieee")])
def test_a_scorer_computes_float32_as_it_is_set_and_nothing_else_does(
        judge_folder, monkeypatch, name, dtype, computed):
    from hgdpo_core import scorers

    monkeypatch.setattr(scorers, "refuse_precision", lambda *_: None)  # a CPU has no TF32
    scorer = load_configured_scorer(ScorerConfig(name=name, source=str(judge_folder), dtype=dtype), "cpu")
    model, seen = getattr(scorer, "base", scorer).model, []
    model.vision_model.register_forward_hook(lambda *_: seen.append(float32()))
    model.text_model.register_forward_hook(lambda *_: seen.append(float32()))
    set_float32()
    scorer.score(IMAGE, ["a man"])
    scorer.embed_images(IMAGE)
    assert seen == [(computed, computed)] * 3 and float32() == ("ieee", "tf32")


def test_float32_is_as_before_after_an_error():
    set_float32()
    with pytest.raises(KeyError), float32_computed("tf32"):
        raise KeyError
    assert float32() == ("ieee", "tf32")


def test_only_another_precision_is_part_of_the_id_of_scores():
    assert [score_settings("pool", ScorerConfig(dtype=dtype), "weights")["dtype"] for dtype in ("float32", "tf32")] == [
        "float32", "tf32"]


def test_tf32_is_refused_where_there_is_none(judge_folder, gpu):
    tf32 = ScorerConfig(source=str(judge_folder), dtype="tf32")
    with pytest.raises(ConfigError, match="dtype of scorer pickscore is tf32, .* computes on the CPU: set it to"):
        load_configured_scorer(tf32, "cpu")
    gpu()
    with pytest.raises(ConfigError, match="is tf32, but Tesla T4 has no TF32"):
        load_configured_scorer(tf32, "cuda")


def test_a_gpu_without_bfloat16_refuses_it(gpu):
    gpu()
    with pytest.raises(ConfigError, match=r"target.dtype is bfloat16, but Tesla T4 has no arithmetic for it"):
        refuse_precision("target.dtype", "bfloat16", "cuda")
    refuse_precision("target.dtype", "float16", "cuda")
    refuse_precision("target.dtype", "bfloat16", "cpu")
    gpu((8, 0))
    for name in ("tf32", "bfloat16", "float16", "float32"):
        refuse_precision("target.dtype", name, "cuda")


@pytest.mark.parametrize(("capability", "better"), [((7, 5), "float16"), ((8, 0), "bfloat16")])
def test_a_gpu_refuses_the_float32_that_auto_was_on_a_machine_without_one(
        tmp_path, target_folder, monkeypatch, gpu, capability, better):
    monkeypatch.setattr(devices, "cpu_has_fast_bfloat16", lambda: False)

    def planned(dtype):
        model = find_model(TargetConfig(source=str(target_folder), dtype=dtype))
        stage = plan_pool(Store(str(tmp_path)), model, SamplerConfig(width=32, height=32, steps=1),
                          PoolConfig(images_per_prompt=1, prompts_per_shard=1), ["a man"])
        write_recipe(stage)
        return stage, open_stage(cut(stage, stage.find_missing())[0])

    stage, opened = planned("auto")
    gpu(capability)
    with pytest.raises(ConfigError, match="target.dtype is auto, which is float32 on the machine that planned this.*but"
                                          f" this worker has Tesla T4: .* with target.dtype set to {better}, or"):
        opened.load(Worker("cuda"))
    named, opened = planned("float32")
    assert named.pool_id == stage.pool_id and not opened.model.auto_dtype
    refuse_precision("target.dtype", opened.model.dtype, "cuda", auto=opened.model.auto_dtype)
