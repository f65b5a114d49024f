"""What a single file predicts: by the yaml beside it, as A1111 and Forge read it, by a setting, by its keys."""

from pathlib import Path

import ldm
import pytest
import tiny
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline

from hgdpo_core.config import TargetConfig
from hgdpo_core.config.base import apply_overrides
from hgdpo_core.config.presets import build_config
from hgdpo_core.errors import ModelError
from hgdpo_core.models import find_model, load_backbone
from hgdpo_core.models.locations import find_located_model, model_locations
from hgdpo_core.models.model import SD15, load_pipeline
from hgdpo_core.models.prediction import find_prediction
from hgdpo_core.models.sdxl import SDXL
from hgdpo_core.report import model_card
from hgdpo_core.storage import Store

COMPVIS = "model:\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n  params:\n    parameterization: {}\n"
SGM = ("model: {{params: {{denoiser_config: {{params: {{scaling_config: "
       "{{target: sgm.modules.diffusionmodules.denoiser_scaling.{}}}}}}}}}}}")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Of each family a single file, and its component configs."""
    folder = tmp_path_factory.mktemp("files")
    sd15 = tiny.sd15_shaped(folder / "sd15")
    sd15.save_pretrained(folder / "sd15")
    sdxl = StableDiffusionXLPipeline.from_pretrained(tiny.save_sdxl(folder / "sdxl"), add_watermarker=False)
    return {"sd15": (ldm.save_single_file(sd15, folder / "old.safetensors"), folder / "sd15"),
            "sdxl": (ldm.save_sdxl_file(sdxl, folder / "xl.safetensors"), folder / "sdxl")}


def find(file, configs, **settings):
    return find_model(TargetConfig(source=str(file), component_configs=str(configs), dtype="float32", **settings))


def linked(file, folder, text=None):
    """The same file elsewhere, with a yaml beside it."""
    link = folder / file.name
    link.symlink_to(file)
    if text is not None:
        link.with_suffix(".yaml").write_text(text)
    return link


def predicts(model):
    """Of the schedule to train with, and of the solver to sample with."""
    schedule = load_backbone(model).schedule
    schedule.require_trainable()
    return {schedule.chain.config.prediction_type, schedule.solver().config.prediction_type}


@pytest.mark.parametrize(("family", "text"), [("sd15", COMPVIS.format('"v"')), ("sdxl", SGM.format("VScaling"))])
def test_a_yaml_beside_a_file_is_read(files, tmp_path, family, text):
    file, configs = files[family]
    plain, found = find(file, configs), find(linked(file, tmp_path, text), configs, family=family)
    assert predicts(plain) == {"epsilon"} and predicts(found) == {"v_prediction"}
    assert plain.fingerprint != found.fingerprint  # other images
    chosen = find(file, configs, prediction_type="v_prediction")
    assert chosen.fingerprint == found.fingerprint and predicts(chosen) == {"v_prediction"}
    assert find(found.path, configs, prediction_type="epsilon").fingerprint == plain.fingerprint


@pytest.mark.parametrize("text", [COMPVIS.format("eps"), SGM.format("EpsScaling"), "model: {params: {}}", "- a\n", ""])
def test_a_yaml_that_changes_nothing_changes_no_fingerprint(files, tmp_path, text):
    file, configs = files["sd15"]
    assert find(linked(file, tmp_path, text), configs).fingerprint == find(file, configs).fingerprint


def test_workers_read_what_was_planned(files, tmp_path):
    """The file alone is copied to them; and a setting stands against a yaml."""
    file, configs = files["sd15"]
    store, file = Store(str(tmp_path / "root")), linked(file, tmp_path, COMPVIS.format("v"))
    for settings in ({}, {"prediction_type": "epsilon"}):
        model = find(file, configs, **settings)
        for copied in (True, False):
            located = find_located_model(store, model.identity(), model_locations(store, model, copy_to_store=copied))
            assert located.fingerprint == model.fingerprint and located.schedule() == model.schedule()
            assert (located.path == file) != copied


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_card_opens_what_was_evaluated(files, tmp_path, family):
    """Plain diffusers reads neither the yaml nor the keys, and knows no other VAE."""
    file, configs = files[family]
    if family == "sdxl":
        pipeline = StableDiffusionXLPipeline.from_pretrained(configs, add_watermarker=False)
        file = ldm.save_sdxl_file(pipeline, tmp_path / "noob.safetensors", "v_pred", "ztsnr")
    else:
        file = linked(file, tmp_path, COMPVIS.format("v"))
    vae = AutoencoderKL.from_pretrained(configs / "vae")
    torch.nn.init.normal_(vae.decoder.conv_out.bias)
    vae.save_pretrained(tmp_path / "vae")
    settings = {"target.component_configs": str(configs), "target.vae": str(tmp_path / "vae")}
    config = apply_overrides(build_config(family, target=str(file), prompts="p"), settings)
    model = find_model(config.target.model_copy(update={"dtype": "float32"}))
    code = model_card._code(config, 0.5, model.schedule(), fine_tuned=False)
    for name, path in {"the/target": file, "its/configs": configs, "the/vae": tmp_path / "vae"}.items():
        code = code.replace(f"path/to/{name}", str(path))
    names = {}
    exec(code.partition("```python\n")[2].partition("pipeline.load_lora")[0].replace('"cuda"', '"cpu"'), names)
    opened, ours = names["pipeline"], load_pipeline(model, kind={"sd15": SD15, "sdxl": SDXL}[family])
    for name in ("prediction_type", "rescale_betas_zero_snr", "timestep_spacing"):
        assert opened.scheduler.config.get(name) == ours.scheduler.config.get(name), name
    assert opened.scheduler.config.prediction_type == "v_prediction"
    assert torch.equal(opened.vae.decoder.conv_out.bias, ours.vae.decoder.conv_out.bias)
    assert torch.equal(opened.vae.decoder.conv_out.bias, vae.decoder.conv_out.bias)


def test_a_yaml_against_the_keys_is_refused(files, tmp_path):
    _, configs = files["sdxl"]
    pipeline = StableDiffusionXLPipeline.from_pretrained(configs, add_watermarker=False)
    file = ldm.save_sdxl_file(pipeline, tmp_path / "noob.safetensors", "v_pred")
    plain = find(file, configs)
    file.with_suffix(".yaml").write_text(SGM.format("VScaling"))
    assert find(file, configs).fingerprint == plain.fingerprint and predicts(plain) == {"v_prediction"}
    file.with_suffix(".yaml").write_text(SGM.format("EpsScaling"))
    with pytest.raises(ModelError, match="noob.yaml says .* epsilon, the keys .* v_prediction: remove .* set"):
        find(file, configs)
    assert predicts(find(file, configs, prediction_type="epsilon")) == {"epsilon"}


@pytest.mark.parametrize(("text", "message"), [
    (COMPVIS.format("x0"), "predicts 'x0': expected eps or v"), (SGM.format("EDMScaling"), "EDMScaling': expected eps"),
    ("model: [", "cannot be read as the config of a checkpoint"), ("a: !!python/object/apply:os.getcwd []", "read"),
    (" " * (1 << 20) + "a", "too long")])
def test_other_yamls_are_refused(tmp_path, text, message):
    (tmp_path / "model.yaml").write_text(text)
    with pytest.raises(ModelError, match=message) as caught:
        find_prediction(tmp_path / "model.safetensors", None, "epsilon")
    assert "\n" not in str(caught.value)


def test_a_folder_has_its_own_prediction(target_folder):
    with pytest.raises(ModelError, match="target.prediction_type is for a single file"):
        find_model(TargetConfig(source=str(target_folder), prediction_type="v_prediction"))
