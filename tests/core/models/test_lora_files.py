"""LoRA files as people have them: whole and applied as a whole, or refused in one line that names the LoRA."""

import json

import pytest
import torch
from safetensors.torch import save_file

from hgdpo_core.config import TargetConfig
from hgdpo_core.errors import ModelError
from hgdpo_core.models import Model, check_lora, find_model, load_pipeline


@pytest.fixture(scope="module")
def model(target_folder) -> Model:
    return find_model(TargetConfig(source=str(target_folder), dtype="float32"))


@pytest.fixture(scope="module")
def layers(model) -> dict[str, str]:
    """kohya's name of each attention linear of the UNet and its name in the UNet."""
    unet = load_pipeline(model).unet
    return {"lora_unet_" + name.replace(".", "_"): name for name, module in unet.named_modules()
            if isinstance(module, torch.nn.Linear) and "attn" in name}


@pytest.fixture
def state(model, layers) -> dict[str, torch.Tensor]:
    """A whole LoRA of rank 2 under kohya's names."""
    generator, unet = torch.Generator().manual_seed(0), dict(load_pipeline(model).unet.named_modules())
    found = {}
    for key, name in layers.items():
        out, width = unet[name].weight.shape
        found |= {f"{key}.lora_down.weight": torch.randn(2, width, generator=generator),
                  f"{key}.lora_up.weight": torch.randn(out, 2, generator=generator), f"{key}.alpha": torch.tensor(2.0)}
    return found


def refuse(model, state, path, message, metadata=None):
    save_file(state, path, metadata=metadata)
    for use in (lambda: check_lora(model, path), lambda: load_pipeline(model.with_lora(path, 1.0))):
        with pytest.raises(ModelError, match=message) as error:
            use()
        assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_a_whole_lora_is_applied_to_every_layer(model, layers, state, tmp_path):
    save_file(state, tmp_path / "whole.safetensors")
    check_lora(model, tmp_path / "whole.safetensors")
    before, after = (dict(load_pipeline(m).unet.named_modules())
                     for m in (model, model.with_lora(tmp_path / "whole.safetensors", 1.0)))
    for key, name in layers.items():
        change = state[f"{key}.lora_up.weight"] @ state[f"{key}.lora_down.weight"]
        torch.testing.assert_close(after[name].weight, before[name].weight + change, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("side", "message"), [("lora_down", "lacks the lora_A"), ("lora_up", "lacks the lora_B")])
def test_half_a_layer_is_refused(model, layers, state, tmp_path, side, message):
    del state[f"{next(iter(layers))}.{side}.weight"]
    refuse(model, state, tmp_path / "half.safetensors", message)


def test_layers_of_another_network_are_refused(model, layers, state, tmp_path):
    away = sorted(layers)[1:]
    foreign = {name.replace("lora_unet_", "lora_unet_other_") if name.split(".")[0] in away else name: tensor
               for name, tensor in state.items()}
    refuse(model, foreign, tmp_path / "foreign.safetensors", f"has {len(layers)} layers, of which 1 are this model's")


@pytest.mark.parametrize(("name", "kind"), [("dora_scale", "a DoRA"), ("hada_w1_a", "a LoHa"), ("lokr_w1", "a LoKr")])
def test_other_kinds_are_refused_by_name(model, layers, state, tmp_path, name, kind):
    refuse(model, state | {f"{next(iter(layers))}.{name}": torch.ones(2, 1)}, tmp_path / "other.safetensors",
           f"is {kind} .*only plain LoRAs")


@pytest.mark.parametrize("alpha", [0.0, -2.0, float("nan"), float("inf"), [1.0, 2.0]])
def test_an_alpha_that_is_no_sane_number_is_refused(model, layers, state, tmp_path, alpha):
    refuse(model, state | {f"{next(iter(layers))}.alpha": torch.tensor(alpha)}, tmp_path / "alpha.safetensors",
           "alpha|NaN, infinity")


@pytest.mark.parametrize("shape", [(), (32,), (3, 32), (2, 31), (2, 32, 1)])
def test_misshapen_layers_are_refused(model, layers, state, tmp_path, shape):
    refuse(model, state | {f"{next(iter(layers))}.lora_down.weight": torch.ones(shape)}, tmp_path / "shape.safetensors",
           "expected two matrices of one rank|does not fit the model")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_is_the_loras_fault(model, layers, state, tmp_path, value):
    state[f"{next(iter(layers))}.lora_up.weight"][0, 0] = value
    refuse(model, state, tmp_path / "nan.safetensors", "the LoRA .* holds NaN, infinity or no floating-point numbers")


@pytest.mark.parametrize("notes", ["{", "[]", json.dumps({"unet.r": "x"}), json.dumps({"unet.lora_alpha": -1}), "7"])
def test_wrong_metadata_is_one_line(model, state, tmp_path, notes):
    refuse(model, state, tmp_path / "notes.safetensors", "has metadata .* that does not describe a LoRA",
           {"lora_adapter_metadata": notes})


def test_a_key_that_no_lora_has_is_refused(model, state, tmp_path):
    refuse(model, state | {"lora_unet_notes.step": torch.ones(1)}, tmp_path / "more.safetensors", "holds .*notes.step")
