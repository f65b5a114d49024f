"""Memory of the stages, counted on tensors without numbers of a narrow Stable Diffusion XL."""

import json

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from benchmarks import memory
from hgdpo_core.models.sdxl_files import CONFIGS

NARROW = {"unet": {"block_out_channels": (32, 64, 64), "transformer_layers_per_block": 1, "norm_num_groups": 8,
                   "attention_head_dim": (2, 4, 4), "cross_attention_dim": 80},
          "vae": {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4}}


def narrow(family, part, dtype):
    kind = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[part]
    with torch.device("meta"):
        return kind.from_config({**json.loads((CONFIGS / part / "config.json").read_text()), **NARROW[part]}).to(dtype)


def test_networks_count_once_and_images_alike(monkeypatch):
    monkeypatch.setattr(memory, "network", narrow)
    weights = {part: sum(weight.numel() for weight in narrow("sdxl", part, torch.float32).parameters())
               for part in NARROW}
    each = {}
    for stage, network, numbers in (
            ("sampling", "unet", 2), ("decoding", "vae", 2), ("encoding", "vae", 4), ("sft", "unet", 4),
            ("dpo", "unet", None), ("dpo without checkpoints", "unet", None)):
        (held, one), (same, two) = (memory.STAGES[stage]("sdxl", (128, 64), images) for images in (1, 2))
        assert held == same and held < one < two
        if numbers is not None:
            assert abs(held / (numbers * weights[network]) - 1) < 0.02  # and a few buffers
        each[stage] = two - one
    assert each["dpo"] < each["dpo without checkpoints"] / 2


def test_it_prints_a_row_for_each_stage(monkeypatch, capsys):
    monkeypatch.setattr(memory, "network", narrow)
    memory.main(["--families", "sdxl", "--stages", "sampling", "--size", "64x64"])
    assert capsys.readouterr().out.splitlines()[2].startswith("| sdxl | 64x64 | sampling |")
