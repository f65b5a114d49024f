"""The exact Stable Diffusion XL with random weights in bfloat16, on a CPU: small images, minutes, 8 GB of disk.

    pytest -m slow -k full_size --log-cli-level=INFO tests/core/sdxl/test_sdxl_full_size.py

Images are small because the CPU is slow, where it only emulates bfloat16 a hundred times; float32 would take twice the
memory. What was seen stands in docs/BENCHMARKS.md.
"""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from full_size import measured
from training_cases import train_dpo

from hgdpo_core.config import PoolConfig, SamplerConfig, TargetConfig
from hgdpo_core.config.presets import sdxl
from hgdpo_core.images import decode_image
from hgdpo_core.models import Model, find_model, load_backbone
from hgdpo_core.models.networks import empty_network
from hgdpo_core.models.sdxl_files import CONFIGS, PARTS
from hgdpo_core.stages.base import Worker
from hgdpo_core.stages.pool import plan_pool
from hgdpo_core.storage import Store
from hgdpo_core.training.data import PairBatch, epoch_order

BLOCK = 1_000_003  # numbers that are drawn and used again and again; a prime, so that no two rows are alike


def fill(network: torch.nn.Module) -> None:
    """Weights drawn as their fan-in asks, so that activations stay in range."""
    drawn = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    network.to(torch.bfloat16).to_empty(device="cpu")
    for name, tensor in network.state_dict().items():
        if tensor.ndim > 1:
            for part in tensor.view(-1).split(BLOCK):
                part.copy_(drawn[:len(part)]).mul_(tensor[0].numel() ** -0.5)
        elif tensor.is_floating_point():
            tensor.fill_(1.0 if name.endswith("weight") else 0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    """Written part by part, so that no two are in memory at once."""
    folder: Path = tmp_path_factory.mktemp("full-size") / "sdxl"
    shutil.copytree(CONFIGS, folder)
    with measured("weights of all parts drawn and written"):
        for part in PARTS:
            network = empty_network(CONFIGS, part, json.loads((CONFIGS / part / "config.json").read_text()))
            fill(network)
            network.save_pretrained(folder / part)
            del network
    with measured("found, checked, fingerprinted"):
        return find_model(TargetConfig(source=str(folder), dtype="bfloat16", family="sdxl"))


@pytest.mark.slow
def test_full_size_pool_image(model, tmp_path):
    """One image of 64x64 in 2 steps with guidance, decoded and stored, as a pool draws it."""
    plan = plan_pool(Store(str(tmp_path)), model, SamplerConfig(width=64, height=64, steps=2, guidance_scale=5.0),
                     PoolConfig(images_per_prompt=1, prompts_per_shard=1), ["a woman on a beach, full body"])
    with measured("one 64x64 image of 2 steps with guidance in bfloat16, loaded, decoded and stored"):
        assert plan.make(Worker()) == 1
    row = plan.folder.read(0).to_pylist()[0]
    image = decode_image(row["image"])
    assert image.size == (64, 64) and np.asarray(image).std() > 10


class Pair:
    """Random latents of one pair of 64x64 images, and embeddings of the real size."""

    def __len__(self) -> int:
        return 1

    def order(self, seed: int, epoch: int) -> list[int]:
        return epoch_order(1, seed, epoch)

    def batch(self, indices) -> PairBatch:
        draw = torch.Generator().manual_seed(1)
        winner, loser = torch.randn(2, 1, 4, 8, 8, generator=draw)
        return PairBatch(winner, loser, torch.randn(1, 77, 2048, generator=draw),
                         pooled=torch.randn(1, 1280, generator=draw))


@pytest.mark.slow
def test_full_size_dpo_step(model):
    """A pair through policy and reference, and a step of the LoRA, with gradient checkpointing."""
    with measured("loaded in bfloat16"):
        backbone = load_backbone(model, dtype="bfloat16")
        denoiser, schedule = backbone.denoiser, backbone.schedule
        del backbone  # text encoders and VAE
    config = sdxl("target", "prompts.txt").dpo.model_copy(
        update={"max_steps": 1, "batch_size": 1, "global_batch_size": None, "gradient_checkpointing": True,
                "mixed_precision": "bf16", "optimizer": "adamw", "warmup_steps": 0})
    with measured("one DPO step, one 64x64 pair, bf16, gradient checkpointing"):
        result = train_dpo(denoiser, schedule, Pair(), config)
    assert result.log[0]["dpo_loss"] == pytest.approx(math.log(2))  # policy and reference are still one
    trained = {name: value for name, value in denoiser.network.named_parameters() if value.requires_grad}
    assert len(trained) == 2 * 560 and sum(value.numel() for value in trained.values()) == 11_612_160
    assert any(bool(value.any()) for name, value in trained.items() if "lora_B" in name)
