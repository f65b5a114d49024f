"""Files of Stable Diffusion XL: folders and single files, what they say of themselves, LoRAs for other tools."""

import json
import re

import ldm
import pytest
import tiny
import torch
from diffusers import StableDiffusionXLPipeline
from headers import write_header
from safetensors.torch import load_file, save_file

from hgdpo_core.config import TargetConfig
from hgdpo_core.errors import ModelError
from hgdpo_core.models import find_model, load_backbone, load_pipeline
from hgdpo_core.models.files import LORA_NAME, find_files
from hgdpo_core.models.lora import add_lora, lora_state, save_lora, write_kohya_lora
from hgdpo_core.models.networks import empty_network
from hgdpo_core.models.sdxl import SDXL
from hgdpo_core.models.sdxl_files import CONFIGS, PARTS, check_configs


@pytest.fixture(scope="module")
def pipeline(sdxl_folder):
    return StableDiffusionXLPipeline.from_pretrained(sdxl_folder, add_watermarker=False)


def find(source, **settings):
    return find_model(TargetConfig(source=str(source), dtype="float32", **settings))


@pytest.mark.parametrize(("marks", "prediction", "zero_snr"), [
    ((), "epsilon", False), (("v_pred",), "v_prediction", False), (("v_pred", "ztsnr"), "v_prediction", True)])
def test_a_single_file_is_its_folder(pipeline, sdxl_folder, tmp_path, marks, prediction, zero_snr):
    model = find(ldm.save_sdxl_file(pipeline, tmp_path / "photo.safetensors", *marks),
                 component_configs=str(sdxl_folder), family="sdxl")
    loaded = load_pipeline(model, kind=SDXL)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        own, expected = (getattr(one, name).state_dict() for one in (loaded, pipeline))
        assert own.keys() == expected.keys()
        assert all(torch.equal(own[key], expected[key]) for key in own), name
    config = loaded.scheduler.config
    assert (config.prediction_type, config.rescale_betas_zero_snr) == (prediction, zero_snr)
    load_backbone(model).schedule.require_trainable()


def test_epsilon_with_zero_terminal_snr_cannot_be_trained(pipeline, sdxl_folder, tmp_path):
    model = find(ldm.save_sdxl_file(pipeline, tmp_path / "x.safetensors", "ztsnr"), component_configs=str(sdxl_folder))
    with pytest.raises(ModelError, match="the last timestep is pure noise"):
        load_backbone(model).schedule.require_trainable()


def test_models_of_another_family_are_named_both_ways(pipeline, sdxl_folder, target_folder, tmp_path):
    file = ldm.save_sdxl_file(pipeline, tmp_path / "photo.safetensors")
    for source in (file, sdxl_folder):
        with pytest.raises(ModelError, match="XL family, .* for a model of the SD 1.5 family: use --preset sdxl"):
            find(source, family="sd15")
    with pytest.raises(ModelError, match="SD 1.5 family, .* Stable Diffusion XL family: use --preset sd15"):
        find(target_folder, family="sdxl")


def broken(path, change):
    state = load_file(path)
    change(state)
    save_file(state, path)
    return path


@pytest.mark.parametrize(("change", "message"), [
    (lambda state: state.pop("conditioner.embedders.1.model.transformer.resblocks.1.mlp.c_fc.bias"),
     "lacks text_encoder_2's transformer.resblocks.1.mlp.c_fc.bias"),
    (lambda state: state.pop("conditioner.embedders.0.transformer.text_model.final_layer_norm.bias"),
     "lacks text_encoder's final_layer_norm.bias"),
    (lambda state: [state.pop(name) for name in list(state) if name.startswith("first_stage_model.")],
     "holds no VAE"),
    (lambda state: state.update({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)}),
     "is an inpainting model"),
    (lambda state: state.pop("model.diffusion_model.label_emb.0.0.weight"), "unet"),
])
def test_a_file_that_is_not_whole_is_refused_by_its_header(pipeline, sdxl_folder, tmp_path, change, message):
    file = broken(ldm.save_sdxl_file(pipeline, tmp_path / "photo.safetensors"), change)
    with pytest.raises(ModelError, match=re.escape(message)):
        find(file, component_configs=str(sdxl_folder))


def test_the_package_has_the_public_architecture(tmp_path):
    """Without weights: the public model's numbers of parameters, and a file of its size under the original names."""
    check_configs(CONFIGS)
    networks = {part: empty_network(CONFIGS, part, json.loads((CONFIGS / part / "config.json").read_text()))
                for part in PARTS}
    counts = {part: sum(weight.numel() for weight in network.parameters()) for part, network in networks.items()}
    assert counts == {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480,
                      "text_encoder_2": 694_659_840}
    shapes = {name: tuple(tensor.shape) for name, tensor in ldm.sdxl_state(**networks).items()}
    file = write_header(tmp_path / "photo.safetensors", shapes)
    found = find_files(TargetConfig(source=str(file), family="sdxl"))
    assert (found.configs, found.prediction_type, found.default_prediction) == (CONFIGS, None, "epsilon")
    shapes.pop("model.diffusion_model.output_blocks.5.1.transformer_blocks.1.attn2.to_k.weight")
    with pytest.raises(ModelError, match="unet"):
        find_files(TargetConfig(source=str(write_header(tmp_path / "cut.safetensors", shapes))))


def test_a_lora_for_other_tools_is_the_same_lora(sdxl_folder, tmp_path):
    """By the original names of its layers, which diffusers' own loader reads back."""
    unet = load_pipeline(find(sdxl_folder), kind=SDXL).unet
    add_lora(unet, rank=4, seed=0)
    for name, weight in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(1))
    saved = lora_state(unet)
    save_lora(unet, tmp_path)
    write_kohya_lora(tmp_path / LORA_NAME, tmp_path / "kohya.safetensors", original_names=True)
    keys = load_file(tmp_path / "kohya.safetensors").keys()
    layer = (r"lora_unet_(input_blocks_[45678]_1|middle_block_1|output_blocks_[0-5]_1)_transformer_blocks_\d_attn[12]"
             r"_to_")
    assert all(re.match(layer, key) for key in keys) and len(keys) == 3 * len(saved) // 2
    fresh = StableDiffusionXLPipeline.from_pretrained(sdxl_folder, add_watermarker=False)
    fresh.load_lora_weights(str(tmp_path), weight_name="kohya.safetensors")
    read = {name: value for name, value in fresh.unet.state_dict().items() if "lora_" in name}
    assert len(read) == len(saved)
    for name, value in read.items():
        assert torch.equal(value, saved[name.replace(".default_0", "")]), name
    merged = load_backbone(find(sdxl_folder).with_lora(tmp_path, 1.0)).denoiser.network.state_dict()
    own = load_backbone(find(sdxl_folder)).denoiser.network.state_dict()
    changed = [name for name in own if not torch.equal(own[name], merged[name])]
    assert len(changed) == len(saved) // 2
    name = "up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_k"
    expected = own[f"{name}.weight"] + saved[f"{name}.lora_B.weight"] @ saved[f"{name}.lora_A.weight"]
    torch.testing.assert_close(merged[f"{name}.weight"], expected, atol=1e-5, rtol=0)


def test_zero_terminal_snr_samples_and_the_sizes_of_an_image(tmp_path):
    folder = tiny.save_sdxl(tmp_path / "v", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    schedule = load_backbone(find(folder)).schedule
    schedule.require_trainable()
    policy, reference = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    chain = schedule.chain
    for step in (0, 500, 998, 999):
        t = torch.full((3,), step)
        moved = [chain.step(one, step, torch.zeros_like(one), generator=torch.Generator().manual_seed(1)).prev_sample
                 for one in (policy, reference)]
        stepped = (moved[0] - moved[1]).mean(dim=(2, 3)).square().sum(1)
        torch.testing.assert_close(schedule.statistic_matching(policy, reference, t), stepped, rtol=1e-4, atol=1e-7)
