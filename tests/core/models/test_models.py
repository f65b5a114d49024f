"""Target models: found or refused in one line before anything loads; the LoRA acts exactly at its weight."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from hgdpo_core.config import TargetConfig
from hgdpo_core.config.base import apply_overrides
from hgdpo_core.config.presets import figures
from hgdpo_core.devices import default_device, resolve_dtype
from hgdpo_core.errors import ConfigError, ModelError, StorageError
from hgdpo_core.models import find_model, load_pipeline
from hgdpo_core.models.lora import add_lora, save_lora
from hgdpo_core.models.published import fetch_model, publish_model
from hgdpo_core.run import open_run
from hgdpo_core.storage import Store
from hgdpo_core.training.parts import resolve_precision


def find(path, **settings):
    return find_model(TargetConfig(source=str(path), dtype="float32", **settings))


def test_the_fingerprint_follows_the_weights_and_not_the_location(target_folder, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(target_folder, copy)
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"_diffusers_version": "9", "_name_or_path": "there"}))
    assert find(copy).fingerprint == find(target_folder).fingerprint
    noted = copy / "tokenizer" / "tokenizer_config.json"
    config, found = json.loads(noted.read_text()), set[str]()
    for offline in (True, False):  # what transformers writes with HF_HUB_OFFLINE, and without
        noted.write_text(json.dumps(config | {"local_files_only": offline}))
        found.add(find(copy).fingerprint)
    assert len(found) == 1
    noted.write_text(json.dumps(config))
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert find(copy).fingerprint != find(target_folder).fingerprint


@pytest.mark.parametrize(("source", "message"), [
    ("/no/such/model", "does not exist: expected a diffusers folder"),
    ("./relative/missing", "does not exist"),
    ("somebody/no-such-model", "could not be downloaded"),
])
def test_a_missing_model_is_one_line(source, message):
    with pytest.raises(ModelError, match=message) as error:
        find(source)
    assert "\n" not in str(error.value)


def test_wrong_folders_are_refused_before_loading(target_folder, tmp_path):
    with pytest.raises(ModelError, match="no model_index.json"):
        find(tmp_path)
    wrong = tmp_path / "xl"
    shutil.copytree(target_folder, wrong)
    index = json.loads((wrong / "model_index.json").read_text())
    (wrong / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionXLPipeline"}))
    with pytest.raises(ModelError, match="text_encoder_2/config.json is missing"):
        find(wrong)


def test_other_predictions_are_refused(target_folder, tmp_path):
    other = tmp_path / "sample"
    shutil.copytree(target_folder, other)
    config = json.loads((other / "scheduler" / "scheduler_config.json").read_text())
    (other / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | {"prediction_type": "sample"}))
    with pytest.raises(ModelError, match="predicts 'sample'"):
        find(other)


def test_truncated_weights_are_one_line(target_folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(target_folder, broken)
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ModelError, match="cut off") as error:
        find(broken)
    assert "\n" not in str(error.value)


def test_a_pickle_is_never_loaded(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"anything")
    with pytest.raises(ModelError, match=r"cannot be read as a torch checkpoint.* convert it to \.safetensors"):
        find(tmp_path / "model.ckpt")


@pytest.fixture
def lora_folder(target_folder, tmp_path):
    unet = load_pipeline(find(target_folder)).unet
    add_lora(unet, 4, seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    save_lora(unet, tmp_path / "lora")
    return tmp_path / "lora"


def test_a_lora_is_part_of_the_identity_and_acts_linearly(target_folder, lora_folder):
    model = find(target_folder)
    applied = model.with_lora(lora_folder, 0.5)
    assert applied.id != model.id and applied.id != model.with_lora(lora_folder, 1.0).id
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    base, half, full = (load_pipeline(m).unet.state_dict()[name]
                        for m in (model, applied, model.with_lora(lora_folder, 1.0)))
    assert (full - base).abs().max() > 1e-3
    torch.testing.assert_close(half - base, (full - base) / 2, rtol=1e-4, atol=1e-6)


def test_models_in_the_store_exist_once_their_record_does(lora_folder, tmp_path):
    store = Store(str(tmp_path / "store"))
    store.put_folder(lora_folder, "models/half")  # killed before model.json
    assert fetch_model(store, "half") is None
    path = publish_model(store, "whole", lora_folder, {"kind": "lora"})
    assert (path / "pytorch_lora_weights.safetensors").exists()
    assert store.read_json("models/whole/model.json")["kind"] == "lora"


@pytest.mark.parametrize("change", ["bytes", "gone"])
def test_a_changed_model_in_a_local_root_is_not_found(lora_folder, tmp_path, change):
    store = Store(str(tmp_path / "store"))
    weights = publish_model(store, "m", lora_folder, {"kind": "lora"}) / "pytorch_lora_weights.safetensors"
    assert fetch_model(store, "m") == weights.parent
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data)) if change == "bytes" else weights.unlink()
    with pytest.raises(StorageError, match="not those its model.json was written for: delete the folder") as error:
        fetch_model(store, "m")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("record", [[], None, {}, {"fingerprint": 3, "kind": "lora"}, {"fingerprint": "f"}])
def test_a_damaged_record_is_one_line(tmp_path, record):
    store = Store(str(tmp_path))
    store.write_json("models/m/model.json", record)
    with pytest.raises(StorageError, match="model.json is damaged: expected a JSON object.*; delete it, make it again"):
        fetch_model(store, "m")


def test_the_vae_of_training_has_its_own_weights(target_folder):
    """Latents are of the float32 VAE, whatever the target samples in."""
    half = load_pipeline(replace(find(target_folder), dtype="bfloat16"), vae_dtype="float32")
    full = load_pipeline(find(target_folder))
    pairs = zip(half.vae.state_dict().values(), full.vae.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs) and half.unet.dtype == half.text_encoder.dtype == torch.bfloat16
    plain = load_pipeline(replace(find(target_folder), dtype="bfloat16"))
    assert all(torch.equal(a, b) for a, b in zip(half.unet.state_dict().values(), plain.unet.state_dict().values(),
                                                 strict=True))


@pytest.mark.parametrize(("device", "message"), [("cuda", "asks for cuda, but torch .* sees no GPU here"),
                                                 ("gpu", "HGDPO_DEVICE is 'gpu': expected cpu or cuda")])
def test_a_device_that_is_not_there_is_one_line(monkeypatch, device, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("HGDPO_DEVICE", device)
    with pytest.raises(ConfigError, match=message) as error:
        open_run("figures", "/nowhere")
    assert "\n" not in str(error.value)


def test_the_device_is_the_one_asked_for_else_the_accelerator(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert default_device() == "cuda"
    monkeypatch.setenv("HGDPO_DEVICE", "cpu")
    for module in ("devices", "training.parts"):
        monkeypatch.setattr(f"hgdpo_core.{module}.cpu_has_fast_bfloat16", lambda: False)
    assert default_device() == "cpu" and resolve_dtype("auto") == "float32" and resolve_dtype("float16") == "float16"
    assert resolve_precision("auto") == "no"  # training goes where the rest goes


def test_a_precision_that_does_not_exist_is_one_line():
    with pytest.raises(ConfigError, match="target.dtype: Input should be 'auto', 'float32', 'bfloat16' or 'float16'"):
        apply_overrides(figures(), {"target.dtype": "fp8"})
