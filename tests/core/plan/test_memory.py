"""Memory of the stages: counted weights of a model's files, activations per pixel, what fits a card."""

import json

import pytest
from headers import write_header

from hgdpo_core.config.presets import build_config
from hgdpo_core.models import Model
from hgdpo_core.plan.memory import ARCHITECTURES, CARDS, GIB, USED, estimate_memory

TEXT = {"text_encoder": 123_060_480, "text_encoder_2": 694_659_840}
CODEC, ATTENTION = 83_653_863, 1_451_520  # of SDXL's UNet, inputs and outputs of attention's linear layers


@pytest.fixture
def model(tmp_path):
    """As large as the public SDXL."""
    layer = (ATTENTION - 1, 1)
    write_header(tmp_path / "unet" / "diffusion_pytorch_model.safetensors",
                 {"a.to_q.weight": layer, "rest": (ARCHITECTURES["sdxl"].denoiser - layer[0],)})
    write_header(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", {"all": (CODEC,)})
    for part, numbers in TEXT.items():
        write_header(tmp_path / part / "model.safetensors", {"all": (numbers,)})
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    return Model(tmp_path, "fingerprint", "bfloat16")


def config(**settings):
    return build_config("sdxl", target="t", prompts="p", images="i").model_copy(update=settings)


def estimated(model, **settings):
    return {stage.stage: stage for stage in estimate_memory(config(**settings), model)}


def test_what_is_counted_is_exact(model):
    stages = estimated(model)
    assert list(stages) == ["latents of SFT", "SFT", "sampling", "latents of DPO", "DPO"]
    unet, text = ARCHITECTURES["sdxl"].denoiser, sum(TEXT.values())
    assert stages["sampling"].fixed == 2 * (unet + text + CODEC)
    assert stages["latents of DPO"].fixed == 2 * (unet + text) + 4 * CODEC
    assert stages["SFT"].fixed == 10 * unet  # float32 weights and gradients, moments of 8 bits
    assert estimated(model, sft=config().sft.model_copy(update={"optimizer": "adamw"}))["SFT"].fixed == 16 * unet
    assert stages["DPO"].fixed == 2 * unet + 8 * ATTENTION * (4 + 4 + 2)  # rank 8, moments of 8 bits
    assert stages["sampling"].each == 832 * 1216 * 1536  # the decoder's
    float16 = estimated(Model(model.path, "fingerprint", "float16"))
    assert float16["sampling"].each == 832 * 1216 * 3072
    whole = estimated(model, dpo=config().dpo.model_copy(update={"gradient_checkpointing": False}))
    assert whole["DPO"].each > 5 * stages["DPO"].each


def test_what_fits(model):
    for stage in estimated(model).values():
        for card in CARDS:
            most, room = stage.largest(card), USED * card * GIB
            assert stage.bytes(most) <= room < stage.bytes(most + 1) or not most and room < stage.bytes(1)
    sft = estimated(model)["SFT"]
    assert sft.largest(24) == 0 and sft.largest(40) > 4
    assert sft.describe() == (
        "memory of SFT, estimated: 23.9 GiB and 0.65 for each image, 26.5 for a batch of 4; images at once: none in "
        "24 GB, 18 in 40 GB, 74 in 80 GB")


def test_other_architectures_are_not_estimated(target_folder):
    assert estimate_memory(config(), Model(target_folder, "fingerprint", "bfloat16")) == []
