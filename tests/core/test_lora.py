"""The LoRA: where it sits, how it starts, and that plain diffusers opens it."""

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from tiny import tiny_unet

from hgdpo_core.errors import ModelError
from hgdpo_core.lora import add_lora, load_lora_state, lora_state, reference_mode, save_lora


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

    fresh = tiny_unet()
    pipeline = StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=fresh, safety_checker=None, feature_extractor=None,
        scheduler=DDPMScheduler(clip_sample=False, steps_offset=1), requires_safety_checker=False)
    pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
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
    with pytest.raises(ModelError, match="already wears"):
        add_lora(unet, rank=4, seed=0)
