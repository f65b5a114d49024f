"""The LoRA: where it sits, how it starts, and that plain diffusers opens it."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny import tiny_unet

from hgdpo_core.errors import ModelError
from hgdpo_core.models.files import SD15_CONFIGS
from hgdpo_core.models.lora import add_lora, load_lora_state, lora_state, reference_mode, save_lora, write_kohya_lora


def predict(unet: UNet2DConditionModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    noisy, embeds = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 32, generator=generator)
    return unet(noisy, torch.tensor([3, 700]), embeds, return_dict=False)[0]


def disturb(unet: UNet2DConditionModel) -> None:
    generator = torch.Generator().manual_seed(2)
    load_lora_state(unet, {name: torch.randn(tensor.shape, generator=generator) * 0.1
                           for name, tensor in lora_state(unet).items()})


def test_it_covers_the_attention_linears_and_freezes_the_rest():
    unet = tiny_unet()
    attention = {name for name, _ in unet.named_modules() if name.endswith(("to_q", "to_k", "to_v", "to_out.0"))}
    add_lora(unet, rank=4, seed=0)
    state = lora_state(unet)
    assert {name.rsplit(".lora_", 1)[0] for name in state} == attention
    assert all(4 in tensor.shape and tensor.dtype == torch.float32 for tensor in state.values())
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in unet.named_parameters())


def test_policy_equals_reference_at_the_start_and_not_after():
    unet = tiny_unet()
    plain = predict(unet)
    add_lora(unet, rank=4, seed=0)
    assert torch.equal(predict(unet), plain)
    disturb(unet)
    assert not torch.allclose(predict(unet), plain, atol=1e-2)
    with reference_mode(unet):
        reference = predict(unet)
    assert torch.equal(reference, plain) and not reference.requires_grad
    assert predict(unet).requires_grad


def test_reference_mode_ends_with_an_error_inside():
    unet = tiny_unet()
    add_lora(unet, rank=2, seed=0)
    disturb(unet)
    policy = predict(unet)
    with pytest.raises(RuntimeError, match="inside"), reference_mode(unet):
        raise RuntimeError("inside")
    assert torch.equal(predict(unet), policy)


def test_the_start_depends_on_the_seed_alone():
    states = []
    for seed, elsewhere in ((5, 1), (5, 2), (6, 1)):
        unet = tiny_unet()
        torch.manual_seed(elsewhere)
        before = torch.get_rng_state()
        add_lora(unet, rank=2, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        states.append(torch.cat([tensor.flatten() for tensor in lora_state(unet).values()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_weights_are_float32_on_a_half_precision_unet():
    unet = tiny_unet().to(torch.bfloat16)
    add_lora(unet, rank=2, seed=0)
    assert {p.dtype for p in unet.parameters() if p.requires_grad} == {torch.float32}


def test_plain_diffusers_opens_the_folder_and_reproduces_the_policy(tmp_path):
    unet = tiny_unet()
    add_lora(unet, rank=4, seed=0)
    disturb(unet)
    save_lora(unet, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]

    fresh = load_into_fresh_unet(tmp_path, "pytorch_lora_weights.safetensors")
    torch.testing.assert_close(predict(fresh), predict(unet), rtol=1e-5, atol=1e-5)


def test_the_file_is_the_same_for_the_same_weights(tmp_path):
    unet = tiny_unet()
    add_lora(unet, rank=4, seed=0)
    for name in ("a", "b"):
        save_lora(unet, tmp_path / name)
    files = [(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert {name.removeprefix("unet.") for name in load_file(files[0])} == set(lora_state(unet))


def test_state_round_trip_and_misfits():
    unet = tiny_unet()
    add_lora(unet, rank=4, seed=0)
    disturb(unet)
    other = tiny_unet()
    add_lora(other, rank=4, seed=9)
    load_lora_state(other, lora_state(unet))
    assert torch.equal(predict(other), predict(unet))
    narrow = tiny_unet()
    add_lora(narrow, rank=2, seed=0)
    with pytest.raises(ModelError, match="the rank they were made with"):
        load_lora_state(narrow, lora_state(unet))
    with pytest.raises(ModelError, match="already has the adapters"):
        add_lora(unet, rank=4, seed=0)


def load_into_fresh_unet(folder: Path, name: str) -> UNet2DConditionModel:
    unet = tiny_unet()
    pipeline = StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=unet, safety_checker=None, feature_extractor=None,
        scheduler=DDPMScheduler(clip_sample=False, steps_offset=1), requires_safety_checker=False)
    pipeline.load_lora_weights(folder, weight_name=name)
    return unet


def test_the_kohya_file_has_the_names_others_read_and_comes_back_to_the_same_weights(tmp_path):
    unet = tiny_unet()
    add_lora(unet, rank=4, seed=0)
    disturb(unet)
    save_lora(unet, tmp_path)
    write_kohya_lora(tmp_path / "pytorch_lora_weights.safetensors", tmp_path / "kohya.safetensors")
    state = load_file(tmp_path / "kohya.safetensors")
    layer = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0"
    ours = lora_state(unet)
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
    assert torch.equal(state[f"{layer}.lora_down.weight"], ours[f"{name}.lora_A.weight"])
    assert torch.equal(state[f"{layer}.lora_up.weight"], ours[f"{name}.lora_B.weight"])
    assert state[f"{layer}.alpha"] == 4 and len(state) == 3 * len(ours) // 2

    back = load_into_fresh_unet(tmp_path, "kohya.safetensors")
    loaded = get_peft_model_state_dict(back, adapter_name="default_0")
    assert loaded.keys() == ours.keys() and all(torch.equal(tensor, ours[key]) for key, tensor in loaded.items())
    assert {config.lora_alpha / config.r for config in back.peft_config.values()} == {1}
    torch.testing.assert_close(predict(back), predict(unet), rtol=1e-5, atol=1e-5)


def test_kohya_names_are_those_of_a_published_lora():
    """The keys that kohya's sd-scripts give SD 1.5: every attention linear of its UNet, none of them twice."""
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(SD15_CONFIGS / "unet"))
    layers = [name for name, module in unet.named_modules() if name.endswith(("to_q", "to_k", "to_v", "to_out.0"))]
    state = {f"unet.{name}.lora_{side}.weight": torch.zeros(8, 1) for name in layers for side in "AB"}
    names = {key.split(".")[0] for key in convert_state_dict_to_kohya(state)}
    assert len(names) == len(layers) == 128
    assert {"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0",
            "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_attn2_to_v"} <= names


def test_a_lora_with_another_alpha_is_not_exported(tmp_path):
    unet = tiny_unet()
    unet.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["to_q"]))
    with pytest.raises(ModelError, match="lora_alpha 8 at rank 4"):
        save_lora(unet, tmp_path)
    state = {f"unet.{name}": tensor.contiguous() for name, tensor in lora_state(unet).items()}
    source, path = tmp_path / "lora.safetensors", tmp_path / "kohya.safetensors"
    notes = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 8})}
    alphas = {"unet.mid_block.alpha": torch.tensor(2.0)}
    for tensors, metadata, alpha in ((state, notes, "8"), (state | alphas, {}, "2")):
        save_file(tensors, source, metadata=metadata)
        with pytest.raises(ModelError, match=f"lora_alpha {alpha} at rank 4: a LoRA is exported only where"):
            write_kohya_lora(source, path)
    save_file(alphas, source)
    with pytest.raises(ModelError, match="is not a LoRA as diffusers saves it"):
        write_kohya_lora(source, path)
    assert not path.exists()
