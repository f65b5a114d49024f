"""Targets as people have them: one file under the original names, a .ckpt, another VAE; and what is refused, how."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import ldm
import numpy as np
import pytest
import tiny
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from hgdpo_core.config import TargetConfig
from hgdpo_core.errors import ModelError
from hgdpo_core.models import Model, find_model, load_pipeline
from hgdpo_core.models.files import SD15_CONFIGS
from hgdpo_core.models.locations import find_located_model, model_locations
from hgdpo_core.models.model import SD15
from hgdpo_core.storage import Store
from hgdpo_core.training.tune import Tuned


@pytest.fixture(scope="module")
def location(tmp_path_factory) -> Path:
    """folder/: shaped as SD 1.5; single.safetensors and plain.ckpt: the same; configs/: the folder without weights."""
    location = tmp_path_factory.mktemp("sd15")
    pipeline = tiny.sd15_shaped(location / "tokenizer")
    pipeline.save_pretrained(location / "folder")
    ldm.save_single_file(pipeline, location / "single.safetensors")
    torch.save({"state_dict": ldm.original_state(pipeline), "global_step": 7}, location / "plain.ckpt")
    shutil.copytree(location / "folder", location / "configs", ignore=shutil.ignore_patterns("*.safetensors"))
    return location


def find(path: Path, location: Path | None = None, **settings) -> Model:
    if location is not None and path.is_file():
        settings["component_configs"] = str(location / "configs")
    return find_model(TargetConfig(source=str(path), dtype="float32", **settings))


def draw(model: Model) -> np.ndarray:
    pipeline = load_pipeline(model)
    return np.asarray(pipeline("a woman in a red top", width=32, height=32, num_inference_steps=2,
                               generator=torch.Generator().manual_seed(3)).images[0]).astype(int)



def alike(first, second) -> bool:
    """Equal up to rounding: where weights lie in memory decides how a CPU's kernels sum."""
    return int(np.abs(first.astype(int) - second.astype(int)).max()) <= 1


def refuse(path: Path, message: str, location: Path | None = None, **settings) -> None:
    with pytest.raises(ModelError, match=message) as error:
        find(path, location, **settings)
    assert "\n" not in str(error.value)


def test_a_worker_finds_a_single_file_and_its_configs_in_the_store(location, tmp_path):
    for name in ("single.safetensors", "configs"):
        copy = shutil.copytree if (location / name).is_dir() else shutil.copy
        copy(location / name, tmp_path / name)
    model, store = find(tmp_path / "single.safetensors", tmp_path), Store(str(tmp_path / "root"))
    means = model_locations(store, model, copy_to_store=True)
    shutil.rmtree(tmp_path / "configs")
    (tmp_path / "single.safetensors").unlink()
    found = find_located_model(store, model.identity(), means)
    assert found.fingerprint == model.fingerprint and found.configs is not None
    assert store.local_path("models") in found.path.parents and store.local_path("models") in found.configs.parents


@pytest.mark.parametrize("name", ["single.safetensors", "plain.ckpt"])
def test_a_single_file_generates_the_folders_images(location, name):
    image = draw(find(location / name, location))
    assert image.std() > 1
    assert alike(image, draw(find(location / "folder")))


def test_half_precision_files_load_in_the_precision_asked_for(location, tmp_path):
    state = {name: tensor.half() if tensor.is_floating_point() else tensor
             for name, tensor in load_file(location / "single.safetensors").items()}
    save_file(state, tmp_path / "half.safetensors")
    pipeline = load_pipeline(find(tmp_path / "half.safetensors", location))
    assert {p.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder) for p in part.parameters()} == {
        torch.float32}
    assert np.abs(draw(find(tmp_path / "half.safetensors", location)) - draw(find(location / "folder"))).max() <= 2


def test_the_shipped_configs_are_stable_diffusion_15():
    """Sizes of the released model: parameters of its parts, and keys and shapes of its single file."""
    def load(kind, part):
        with init_empty_weights():
            return kind.from_config(kind.load_config(SD15_CONFIGS / part))

    unet, vae = load(UNet2DConditionModel, "unet"), load(AutoencoderKL, "vae")
    with init_empty_weights():
        text = CLIPTextModel(CLIPTextConfig.from_pretrained(SD15_CONFIGS / "text_encoder"))
    sizes = [sum(p.numel() for p in part.parameters()) for part in (unet, vae, text)]
    assert sizes == [859_520_964, 83_653_863, 123_060_480]
    shapes = {ldm.unet_key(name): list(tensor.shape) for name, tensor in unet.state_dict().items()}
    assert len(shapes) == 686 and len(ldm.vae_state(vae)) == 248 and len(text.state_dict()) == 196
    assert shapes["model.diffusion_model.output_blocks.11.0.skip_connection.weight"] == [320, 640, 1, 1]
    assert shapes["model.diffusion_model.output_blocks.8.2.conv.weight"] == [640, 640, 3, 3]
    assert shapes["model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"] == [1280, 768]


def test_the_shipped_tokenizer_is_clips():
    """Ids computed with open_clip_torch 3.3.0's SimpleTokenizer from the same vocabulary file."""
    tokenizer = CLIPTokenizer.from_pretrained(SD15_CONFIGS / "tokenizer")
    golden = {
        "a photo of a cat": [320, 1125, 539, 320, 2368],
        "masterpiece,ultra_detailed,1girl,<lora:x:0.8>": [
            12066, 267, 8118, 318, 12609, 267, 272, 1611, 11, 283, 2179, 320, 281, 343, 281, 271, 269, 279, 285],
        "A man, 1980's, (best quality:1.2), [[8k]]": [
            320, 786, 267, 272, 280, 279, 271, 568, 267, 263, 949, 3027, 281, 272, 269, 273, 2361, 58, 314, 279, 330,
            60, 316],
    }
    for text, ids in golden.items():
        padded = tokenizer(text, padding="max_length").input_ids
        assert padded == [49406, *ids] + [49407] * (76 - len(ids))
    assert len(tokenizer) == 49_408 and tokenizer.model_max_length == 77


def test_another_vae_is_used_and_is_part_of_the_identity(location, tmp_path):
    other = tiny.sd15_shaped(tmp_path / "tokenizer", seed=5)
    other.save_pretrained(tmp_path / "pipeline")
    other.vae.save_pretrained(tmp_path / "vae")
    plain, single = find(location / "folder"), find(location / "single.safetensors", location)
    models = [find(location / "folder", vae=str(tmp_path / "vae")),
              find(location / "single.safetensors", location, vae=str(tmp_path / "pipeline"))]
    assert {m.fingerprint for m in models}.isdisjoint({plain.fingerprint, single.fingerprint})
    images = [draw(model) for model in models]
    assert alike(*images) and not alike(images[0], draw(plain))
    tuned = Tuned("sft-1", location / "folder", [], existing=False).as_target(models[0])
    assert tuned.fingerprint == plain.fingerprint and tuned.vae is None


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_a_vae_in_a_single_file_loads_under_original_names(tmp_path, monkeypatch, location, prefix):
    monkeypatch.setattr("hgdpo_core.models.files.SD15_CONFIGS", location / "configs")
    narrow = replace(SD15, configs=location / "configs")
    monkeypatch.setitem(load_pipeline.__kwdefaults__, "kind", narrow)
    other = tiny.sd15_shaped(tmp_path / "tokenizer", seed=5)
    state = {prefix + name.removeprefix("first_stage_model."): tensor.contiguous()
             for name, tensor in ldm.vae_state(other.vae).items()}
    save_file(state, tmp_path / "vae.safetensors")
    other.vae.save_pretrained(tmp_path / "vae")
    images = [draw(find(location / "folder", vae=str(tmp_path / name))) for name in ("vae.safetensors", "vae")]
    assert alike(*images)


def test_a_file_without_vae_needs_one(location, tmp_path):
    state = {name: tensor for name, tensor in load_file(location / "single.safetensors").items()
             if not name.startswith("first_stage_model.")}
    save_file(state, tmp_path / "no-vae.safetensors")
    refuse(tmp_path / "no-vae.safetensors", "holds no VAE: set target.vae", location)
    model = find(tmp_path / "no-vae.safetensors", location, vae=str(location / "folder"))
    assert alike(draw(model), draw(find(location / "folder")))


def test_a_hub_id_is_found_offline_in_the_hubs_cache(location, tmp_path, monkeypatch):
    commit = "a" * 40
    repository = tmp_path / "models--somebody--tiny"
    shutil.copytree(location / "folder", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    vae = tmp_path / "models--somebody--vae"
    shutil.copytree(location / "folder" / "vae", vae / "snapshots" / commit)
    (vae / "refs").mkdir()
    (vae / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.HF_HUB_CACHE", str(tmp_path), raising=False)
    model = find_model(TargetConfig(source="somebody/tiny", dtype="float32"))
    assert model.fingerprint == commit
    assert alike(draw(model), draw(find(location / "folder")))
    assert find_model(TargetConfig(source="somebody/tiny", vae="somebody/vae")).vae is not None


# -- what is refused


def single(tmp_path: Path, **shapes: tuple[int, ...]) -> Path:
    """A single file with the keys that tell families apart, some replaced."""
    prefix = "model.diffusion_model.input_blocks."
    state = {f"{prefix}0.0.weight": (8, 4, 3, 3), f"{prefix}1.1.transformer_blocks.0.attn2.to_k.weight": (8, 768),
             "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": (77, 8),
             "first_stage_model.decoder.conv_in.weight": (8, 4, 3, 3)} | shapes
    save_file({name: torch.zeros(shape) for name, shape in state.items() if shape}, tmp_path / "other.safetensors")
    return tmp_path / "other.safetensors"


@pytest.mark.parametrize(("shapes", "message"), [
    ({"conditioner.embedders.0.x": (1,)}, "is Stable Diffusion XL"),
    ({"cond_stage_model.model.token_embedding.weight": (1,)}, "is Stable Diffusion 2"),
    ({"model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (8, 1024)},
     "is Stable Diffusion 2 .*1024 wide"),
    ({"model.diffusion_model.input_blocks.0.0.weight": (8, 9, 3, 3)}, "is an inpainting model .*9 input channels"),
    ({"model.diffusion_model.input_blocks.0.0.weight": ()}, "holds no UNet"),
    ({"cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": ()}, "no CLIP text encoder"),
    ({"double_blocks.0.x": (1,)}, "is Flux"),
])
def test_other_families_are_refused_by_their_header(tmp_path, shapes, message):
    refuse(single(tmp_path, **shapes), message)


def test_other_folders_are_refused_by_their_configs(location, tmp_path):
    def change(name, part, **settings):
        folder = tmp_path / name
        shutil.copytree(location / "folder", folder)
        config = folder / part
        config.write_text(json.dumps(json.loads(config.read_text()) | settings))
        return folder

    refuse(change("2", "unet/config.json", cross_attention_dim=1024), "is Stable Diffusion 2 .*1024 wide")
    refuse(change("inpainting", "unet/config.json", in_channels=9), "takes 9 input channels: .*an inpainting model")
    refuse(change("xl", "model_index.json", _class_name="StableDiffusionXLPipeline"),
           "text_encoder_2/config.json is missing")
    broken = change("broken", "unet/config.json")
    (broken / "unet" / "config.json").write_text("{")
    refuse(broken, "config.json cannot be read")
    (broken / "unet" / "config.json").unlink()
    refuse(broken, "config.json is missing")


def test_broken_files_are_refused_before_loading(location, tmp_path):
    path = tmp_path / "model.safetensors"
    data = (location / "single.safetensors").read_bytes()
    for content, message in [(data[:-1], r"is cut off: its header names [\d,]+ bytes"), (data + b"x", "is damaged"),
                             (data[:20], "no whole safetensors header"), (b"", "no whole safetensors header"),
                             (b"<html>not found</html>" * 9, "no whole safetensors header"),
                             (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer")]:
        path.write_bytes(content)
        refuse(path, message)
    folder = tmp_path / "folder"
    shutil.copytree(location / "folder", folder)
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    refuse(folder, "vae/diffusion_pytorch_model.safetensors is cut off")


def test_quantised_weights_are_refused(tmp_path):
    name = "model.diffusion_model.input_blocks.0.0.weight"
    save_file({name: torch.zeros(8, 4, 3, 3).to(torch.float8_e4m3fn)}, tmp_path / "fp8.safetensors")
    refuse(tmp_path / "fp8.safetensors", "holds F8_E4M3 weights .*: expected F32, F16 or BF16")
    torch.save({name: torch.zeros(8, 4, 3, 3, dtype=torch.int8)}, tmp_path / "int8.ckpt")
    refuse(tmp_path / "int8.ckpt", "holds torch.int8 weights")


@pytest.mark.parametrize(("part", "key"), [
    ("unet", "model.diffusion_model.out.2.weight"), ("vae", "first_stage_model.decoder.conv_out.bias"),
    ("text_encoder", "cond_stage_model.transformer.text_model.final_layer_norm.bias")])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_is_named(location, tmp_path, part, key, value):
    state = load_file(location / "single.safetensors")
    state[key].view(-1)[0] = value
    save_file(state, tmp_path / "broken.safetensors")
    with pytest.raises(ModelError, match=f"holds NaN or infinity in {part}'s .* as float32") as error:
        load_pipeline(find(tmp_path / "broken.safetensors", location))
    assert "\n" not in str(error.value)


def test_a_missing_weight_and_a_wrong_shape_are_named(location, tmp_path):
    state = load_file(location / "single.safetensors")
    lost = state.pop("model.diffusion_model.middle_block.1.proj_out.bias")
    save_file(state, tmp_path / "lost.safetensors")
    refuse(tmp_path / "lost.safetensors", "lost.safetensors lacks unet's mid_block.attentions.0.proj_out.bias",
           location)
    state["model.diffusion_model.middle_block.1.proj_out.bias"] = torch.cat([lost, lost])
    save_file(state, tmp_path / "wide.safetensors")
    refuse(tmp_path / "wide.safetensors", r"mid_block.attentions.0.proj_out.bias as \[128\], expected \[64\]", location)
    state["model.diffusion_model.middle_block.1.proj_out.bias"] = lost
    state["model.diffusion_model.middle_block.1.more"] = lost.clone()
    save_file(state, tmp_path / "more.safetensors")
    refuse(tmp_path / "more.safetensors", "holds the unknown .*middle_block.1.more|mid_block.attentions.0.more",
           location)


@pytest.mark.parametrize(("part", "file", "name"), [
    ("unet", "diffusion_pytorch_model", "conv_in.bias"), ("text_encoder", "model", "final_layer_norm.bias")])
def test_a_folder_without_one_weight_is_refused(location, tmp_path, part, file, name):
    shutil.copytree(location / "folder", tmp_path / "folder")
    path = tmp_path / "folder" / part / f"{file}.safetensors"
    save_file({key: tensor for key, tensor in load_file(path).items() if not key.endswith(name)}, path,
              metadata={"format": "pt"})
    refuse(tmp_path / "folder", f"lacks {part}'s .*{name}")
    save_file(load_file(location / "folder" / part / f"{file}.safetensors") | {"more": torch.zeros(1)}, path)
    refuse(tmp_path / "folder", f"holds the unknown more beside {part}'s weights")
    path.unlink()
    refuse(tmp_path / "folder", f"{part} holds no weights under the names that are read")


class Anything:
    """What a pickle may hold beside tensors."""


def test_a_ckpt_that_is_no_plain_state_dict_is_refused_with_a_way_to_convert(tmp_path):
    path = tmp_path / "model.ckpt"
    for content in ({"state_dict": {"a": torch.zeros(1)}, "callbacks": Anything()}, Anything()):
        torch.save(content, path)
        refuse(path, "holds more than tensors.*: convert it to .safetensors")
    torch.save([torch.zeros(1)], path)
    refuse(path, "is not a plain state dict of tensors: convert it")
    path.write_bytes(path.read_bytes()[:100])
    refuse(path, "cannot be read as a torch checkpoint")


def test_other_mistakes_with_vae_and_configs(location, tmp_path):
    refuse(location / "folder", "component_configs is for a single file", component_configs=str(location / "configs"))
    refuse(location / "folder", "target.vae ./nowhere does not exist", vae="./nowhere")
    refuse(location / "folder", "target.vae somebody/nothing .* could not be downloaded", vae="somebody/nothing")
    refuse(location / "folder", "unet holds no AutoencoderKL", vae=str(location / "folder" / "unet"))
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    refuse(location / "folder", "x.safetensors holds no VAE", vae=str(tmp_path / "x.safetensors"))
    refuse(location / "single.safetensors", "no model_index.json", component_configs=str(tmp_path))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    refuse(tmp_path / "model.gguf", "is not a weight file: expected .safetensors, .ckpt, .pt, .pth, or a diffusers")
    refuse(tmp_path / "gone.safetensors", "does not exist")


def test_a_broken_vae_is_named_and_not_the_checkpoint(location, tmp_path):
    shutil.copytree(location / "folder" / "vae", tmp_path / "vae")
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["decoder.conv_out.bias"].view(-1)[0] = float("nan")
    save_file(state, path)
    with pytest.raises(ModelError, match=f"^{tmp_path / 'vae'} holds NaN or infinity in vae's decoder.conv_out.bias"):
        load_pipeline(find(location / "folder", vae=str(tmp_path / "vae")))
    del state["decoder.conv_out.bias"]
    save_file(state, path)
    refuse(location / "folder", f"^{tmp_path / 'vae'} lacks vae's decoder.conv_out.bias", vae=str(tmp_path / "vae"))


@pytest.mark.parametrize("remove", ["vocab.json", "tokenizer.json"])
def test_a_target_without_its_vocabulary_is_refused(location, tmp_path, remove):
    """It loads in silence: all prompts would have one embedding."""
    shutil.copytree(location / "folder", tmp_path / "folder")
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        (tmp_path / "folder" / "tokenizer" / name).unlink(missing_ok=True)
    if remove == "tokenizer.json":
        shutil.rmtree(tmp_path / "folder" / "tokenizer")
    refuse(tmp_path / "folder", "as the same: its vocabulary|holds no CLIP tokenizer")


def test_a_tokenizer_of_a_larger_vocabulary_is_refused(location, tmp_path):
    shutil.copytree(location / "folder", tmp_path / "folder")
    shutil.rmtree(tmp_path / "folder" / "tokenizer")
    shutil.copytree(SD15_CONFIGS / "tokenizer", tmp_path / "folder" / "tokenizer")
    refuse(tmp_path / "folder", r"gives the id 49407, the text encoder has \d+: put the tokenizer there")


@pytest.mark.parametrize("syntax", ["plain", "a1111"])
def test_a_tokenizer_without_a_length_takes_the_text_encoders(location, tmp_path, syntax):
    shutil.copytree(location / "folder", tmp_path / "folder")
    path = tmp_path / "folder" / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["model_max_length"]
    path.write_text(json.dumps(config))
    model = find(tmp_path / "folder", prompt_syntax=syntax)
    assert tiny.text_encoder(model).encode(["a woman " * 9])[0].shape[0] % 24 == 0


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_a_text_encoder_without_its_wrapper_generates_the_same(location, tmp_path, suffix):
    """Old anime models and their merges: other tools put `text_model.` in while they load."""
    state = {name.replace("transformer.text_model.", "transformer."): tensor
             for name, tensor in load_file(location / "single.safetensors").items()}
    path = tmp_path / f"old.{suffix}"
    if suffix == "ckpt":
        torch.save({"state_dict": state}, path)
    else:
        save_file(state, path)
    old, new = (load_pipeline(find(file, location)).text_encoder.state_dict()
                for file in (path, location / "single.safetensors"))
    assert old.keys() == new.keys() and all(torch.equal(tensor, new[name]) for name, tensor in old.items())


def test_a_ckpt_that_holds_itself_ends_in_one_line(tmp_path):
    state: dict = {}
    state["state_dict"] = state
    torch.save(state, tmp_path / "loop.ckpt")
    refuse(tmp_path / "loop.ckpt", "is not a plain state dict of tensors")


@pytest.mark.parametrize("shape", [(), (8,)])
def test_weights_without_enough_dimensions_are_one_line(tmp_path, shape):
    path = single(tmp_path)
    state = load_file(path)
    save_file({name: torch.zeros(shape) for name in state}, path)
    refuse(path, "lacks unet's|does not hold the unet|does not fit", component_configs=str(SD15_CONFIGS))


def test_links_that_lead_nowhere_and_folders_named_like_files_are_no_traceback(location, tmp_path):
    shutil.copytree(location / "folder", tmp_path / "folder")
    (tmp_path / "folder" / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder" / "loop.json").symlink_to(tmp_path / "folder" / "loop.json")
    (tmp_path / "folder" / "notes.txt").mkdir()
    assert find(tmp_path / "folder").fingerprint == find(location / "folder").fingerprint
    weights = tmp_path / "folder" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    weights.mkdir()
    refuse(tmp_path / "folder", "unet holds no weights under the names that are read")
