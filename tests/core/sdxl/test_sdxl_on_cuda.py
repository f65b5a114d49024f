"""Stable Diffusion XL on a pretended GPU: pool and training, its VAE in float16, autocast, memory format, waits."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from on_cuda import POOL, SAMPLER, check_steps, drawn, on_cpu
from training_cases import train_dpo, train_sft, weights

from hgdpo_core.config import DpoConfig, SftConfig, TargetConfig
from hgdpo_core.models import Conditioning, find_model, load_backbone
from hgdpo_core.models.image_generator import ImageGenerator
from hgdpo_core.training.data import ImageBatch, PairBatch, epoch_order

COPIES = 22  # ids and weights of three texts for each encoder, ids for pooled embeddings; noise, timesteps; sizes
GUARD = "overflows in float16: it decodes in float32"


def find(folder, dtype="float32", **settings):
    return find_model(TargetConfig(source=str(folder), dtype=dtype, negative_prompt="a dog", **settings))


@pytest.mark.parametrize(("dtype", "syntax"), [("float32", "a1111"), ("bfloat16", "plain")])
def test_a_pool_waits_once_a_batch_and_for_its_pixels(cuda, sdxl_folder, dtype, syntax):
    model = find(sdxl_folder, dtype, prompt_syntax=syntax)
    ours = drawn(model, "cuda", cuda, copies=COPIES)
    assert np.abs(ours - drawn(model, "cpu")).max() <= (1 if dtype == "float32" else 12)


def test_its_vae_decodes_float16_images_in_float32(cuda, sdxl_folder, tmp_path, caplog):
    """Said once, and waited for no more often; a VAE whose config does not ask for it decodes in float16."""
    with caplog.at_level(logging.WARNING):
        ours = drawn(find(sdxl_folder, "float16"), "cuda", cuda, copies=COPIES)
    assert sum(GUARD in record.message for record in caplog.records) == 1
    assert np.abs(ours - drawn(find(sdxl_folder), "cpu")).max() <= 12
    caplog.clear()
    shutil.copytree(sdxl_folder / "vae", tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps({**config, "force_upcast": False}))
    for vae, dtype in ((None, torch.float32), (str(tmp_path / "vae"), torch.float16)):
        backbone = load_backbone(find(sdxl_folder, "float16", vae=vae), "cuda")
        network = backbone.denoiser.network
        assert (backbone.codec.vae.dtype, network.dtype, network.device.type) == (dtype, torch.float16, "cuda")
    assert sum(GUARD in record.message for record in caplog.records) == 1


def test_compiled_sampling_is_in_channels_last(sdxl_folder, monkeypatch):
    """On the CPU: the pretended GPU knows no memory formats."""
    monkeypatch.setattr(torch, "compile", lambda call, **options: call)
    generator = ImageGenerator(find(sdxl_folder), SAMPLER.model_copy(update={"compile": True}), POOL, "cpu")
    backbone = generator.backbone
    assert backbone.denoiser.is_compiled
    for part in (backbone.denoiser.network, backbone.codec.vae.decoder):
        assert part.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


class Samples:
    """Random latents in memory, as `training_cases` has them, with pooled embeddings, and of images with sizes."""

    def __init__(self, kind, size=3):
        draw = torch.Generator().manual_seed(3)
        self.kind = kind
        self.winners, self.losers = torch.randn(2, size, 4, 4, 4, generator=draw)
        self.embeds, self.pooled = (torch.randn(size, *shape, generator=draw) for shape in ((24, 80), (40,)))

    def __len__(self):
        return len(self.winners)

    def order(self, seed, epoch):
        return epoch_order(len(self), seed, epoch)

    def batch(self, indices):
        embeds, pooled = self.embeds[indices], self.pooled[indices]
        if self.kind == "dpo":
            return PairBatch(self.winners[indices], self.losers[indices], embeds, pooled=pooled)
        sizes = torch.tensor([[64.0, 48.0, 0.0, 8.0, 32.0, 32.0]]).repeat(len(embeds), 1)
        return ImageBatch(self.winners[indices], embeds, pooled=pooled, sizes=sizes)


def trained(folder, kind, **settings):
    """The network after a step, and the log."""
    backbone = load_backbone(find(folder), "cpu")
    shared = {"batch_size": 2, "learning_rate": 1e-2, "max_steps": 1, **settings}
    if kind == "dpo":
        config = DpoConfig(lora_rank=4, beta=20.0, lambda_stat=10.0, **shared)
        result = train_dpo(backbone.denoiser, backbone.schedule, Samples(kind), config)
    else:
        empty = Conditioning(torch.zeros(1, 24, 80), pooled=torch.zeros(1, 40))
        config = SftConfig(caption_dropout=0.5, **shared)
        result = train_sft(backbone.denoiser, backbone.schedule, Samples(kind), config, empty)
    return backbone.denoiser.network.cpu(), result


@pytest.mark.parametrize(("kind", "precision", "checkpointing"), [
    ("dpo", "no", False), ("dpo", "bf16", True), ("dpo", "fp16", True), ("sft", "no", True), ("sft", "bf16", False)])
def test_a_step_waits_once(cuda, sdxl_folder, kind, precision, checkpointing):
    settings = {"mixed_precision": precision, "gradient_checkpointing": checkpointing}
    network, result = trained(sdxl_folder, kind, **settings)
    check_steps(cuda, result, fp16=precision == "fp16")
    assert all(weight.isfinite().all() for weight in network.parameters())
    if precision == "no":
        with on_cpu():
            other, expected = trained(sdxl_folder, kind, **settings)
        np.testing.assert_allclose([row["loss"] for row in result.log], [row["loss"] for row in expected.log], 1e-4)
        if kind == "dpo":
            torch.testing.assert_close(weights(network), weights(other), rtol=0, atol=1e-3)
