"""What leaves the project: LoRA files, model card, whole pipeline, Hub. The Hub here is a fake; nothing is sent."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from flows.cli import main
from hgdpo_core.config import TargetConfig
from hgdpo_core.config.base import apply_overrides
from hgdpo_core.config.presets import figures, sd15
from hgdpo_core.errors import ConfigError, InputError, ModelError, StorageError
from hgdpo_core.export import export_run, push_folder
from hgdpo_core.models import Model, find_model, load_backbone, load_pipeline
from hgdpo_core.models.lora import add_lora, save_lora
from hgdpo_core.models.published import publish_model
from hgdpo_core.report.model_card import FIELDS, TO_FILL_IN, public_name, render_card
from hgdpo_core.storage import Store

SUMMARY = {
    "lora_weight": 0.5, "pool_images": 2000, "triplets": 98, "rejected": 2, "evaluation_prompts": 177,
    "win_rate": {"pickscore": {"rate": 0.805, "ci_low": 0.7388, "ci_high": 0.8604, "wins": 140, "losses": 34, "ties": 3,
                               "n": 177},
                 "clip": {"rate": None, "ci_low": None, "ci_high": None, "wins": 0, "losses": 0, "ties": 177,
                          "n": 177}},
    "colour_shift": {"hue": 1.0, "saturation": 2.5, "value": 0.5, "hue_degrees": -3.25},
    "colour_change": {"hue_degrees": {"value": -3.25, "ci_low": -5.0, "ci_high": -1.0},
                      "saturation_percent": {"value": 2.5, "ci_low": None, "ci_high": None},
                      "value_percent": {"value": None, "ci_low": None, "ci_high": None}},
    "warnings": [{"guard": "defects", "message": "More defects."}]}


@pytest.fixture
def store(tmp_path, target_folder) -> Store:
    """A root with one finished run of `target_folder` and its LoRA."""
    store = Store(str(tmp_path / "root"))
    model = find_model(TargetConfig(source=str(target_folder), dtype="float32"))
    unet = load_pipeline(model).unet
    add_lora(unet, 4, seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    save_lora(unet, tmp_path / "lora")
    store.write_json("models/dpo-1/config.json", {"kind": "lora", "target": model.identity()})
    publish_model(store, "dpo-1", tmp_path / "lora", {"kind": "lora"})
    write_run(store, "run-1", target_folder)
    return store


def write_run(store: Store, run_id: str, target: Path | str, **summary: Any) -> None:
    config = sd15(str(target), "/home/somebody/prompts.txt").model_dump(mode="json")
    config["target"]["dtype"] = "float32"
    store.write_json(f"runs/{run_id}/config.json", {"code_version": "1", **config})
    named = summary or {"lora_id": "dpo-1"}
    store.write_json(f"runs/{run_id}/summary.json", {**SUMMARY, **named})


def draw(pipeline: StableDiffusionPipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    return np.asarray(pipeline("a woman", width=32, height=32, num_inference_steps=2,
                               generator=torch.Generator().manual_seed(3)).images[0]).astype(int)


def test_an_export_is_a_folder_that_diffusers_and_comfyui_open(store, tmp_path, target_folder):
    written = export_run(store, tmp_path / "out")
    assert [path.name for path in written] == ["pytorch_lora_weights.safetensors", "dpo-1-kohya.safetensors",
                                               "README.md"]
    images = []
    for name in ("pytorch_lora_weights.safetensors", "dpo-1-kohya.safetensors"):
        pipeline = StableDiffusionPipeline.from_pretrained(target_folder)
        pipeline.load_lora_weights(tmp_path / "out", weight_name=name)
        images.append(draw(pipeline))
    assert np.array_equal(*images)
    assert np.abs(images[0] - draw(StableDiffusionPipeline.from_pretrained(target_folder))).max() > 5


def test_a_summary_without_lora_id_names_the_lora_by_its_url(store, tmp_path, target_folder):
    write_run(store, "run-1", target_folder, artifacts={"lora": store.url("models/dpo-1") + "/"})
    assert export_run(store, tmp_path / "out")[1].name == "dpo-1-kohya.safetensors"


def test_a_fused_pipeline_generates_what_target_and_lora_do(store, tmp_path, target_folder):
    export_run(store, tmp_path / "out", "run-1", fused=True)
    fused = StableDiffusionPipeline.from_pretrained(tmp_path / "out" / "pipeline")
    applied = StableDiffusionPipeline.from_pretrained(target_folder)
    applied.load_lora_weights(tmp_path / "out", weight_name="pytorch_lora_weights.safetensors", adapter_name="hgdpo")
    applied.set_adapters(["hgdpo"], [0.5])
    assert np.abs(draw(fused) - draw(applied)).max() <= 1
    assert "with the LoRA merged in at weight 0.5" in (tmp_path / "out" / "README.md").read_text()


def test_fusing_needs_the_same_target(store, tmp_path, target_folder):
    write_run(store, "run-1", tmp_path / "gone")
    with pytest.raises(ModelError, match="gone does not exist"):
        export_run(store, tmp_path / "out", fused=True)
    moved, other = tmp_path / "moved", tmp_path / "other"
    shutil.copytree(target_folder, moved)
    export_run(store, tmp_path / "out", fused=True, target=str(moved))
    shutil.copytree(target_folder, other)
    weights = other / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ModelError, match="is not the model this LoRA was trained on .*--target"):
        export_run(store, tmp_path / "out", fused=True, target=str(other))


def test_fusing_takes_the_fine_tuned_model_from_the_store(store, tmp_path, target_folder, monkeypatch):
    tuned = tmp_path / "tuned"
    StableDiffusionPipeline.from_pretrained(target_folder).save_pretrained(tuned)
    weights = tuned / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    path = publish_model(store, "sft-1", tuned, {"kind": "pipeline"})
    identity = find_model(TargetConfig(source=str(path), dtype="float32")).identity()
    store.write_json("models/dpo-1/config.json", {"kind": "lora", "target": identity})
    bases: list[Model] = []

    def load(model):
        bases.append(model)
        return load_backbone(model)

    monkeypatch.setattr("hgdpo_core.export.run.load_backbone", load)
    assert tmp_path / "out" / "base" in export_run(store, tmp_path / "out", fused=True)
    assert [base.path for base in bases] == [path] and bases[0].lora is not None and bases[0].lora.weight == 0.5


def test_the_fine_tuned_base_is_shipped_and_with_the_exported_lora_generates_the_evaluations_image(
        store, tmp_path, target_folder):
    tuned = StableDiffusionPipeline.from_pretrained(target_folder)
    tuned.unet.conv_out.bias.data += 0.5
    tuned.save_pretrained(tmp_path / "tuned")
    path = publish_model(store, "sft-1", tmp_path / "tuned", {"kind": "pipeline"})
    store.write_bytes("models/sft-1/checkpoints/step-1/state.pt", b"x")
    model = find_model(TargetConfig(source=str(path), dtype="float32"))
    store.write_json("models/dpo-1/config.json", {"kind": "lora", "target": model.identity()})
    config = store.read_json("runs/run-1/config.json")
    store.write_json("runs/run-1/config.json", config | {"images": "/home/somebody/photos"})
    export_run(store, tmp_path / "out")
    base = StableDiffusionPipeline.from_pretrained(tmp_path / "out" / "base")
    assert sorted(p.name for p in (tmp_path / "out" / "base").iterdir()) == [
        "model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae"]
    base.load_lora_weights(tmp_path / "out", weight_name="pytorch_lora_weights.safetensors", adapter_name="hgdpo")
    base.set_adapters(["hgdpo"], [0.5])
    judged = load_pipeline(model.with_lora(store.local_path("models/dpo-1"), 0.5))
    assert np.abs(draw(base) - draw(judged)).max() <= 1
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`base/`: the fine-tuned model" in card and "base_model" not in card
    (store.local_path("models/sft-1") / "unet" / "config.json").chmod(0o600)
    export_run(store, tmp_path / "fused", fused=True)
    files = [path for path in (tmp_path / "fused").rglob("*") if path.is_file()]
    assert len(files) > 20 and len({path.stat().st_mode for path in files}) == 1
    store.delete("models/sft-1/model.json")
    with pytest.raises(InputError, match="the fine-tuned model that dpo-1 was trained on is gone"):
        export_run(store, tmp_path / "again")


def test_the_card_states_results_and_leaves_fields_to_fill_in(store, tmp_path, target_folder):
    export_run(store, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "\nlibrary_name: diffusers\n" in card and "base_model" not in card
    assert "PickScore, win rate on the prompts it tells apart: 80.5 % (95 % interval 73.9–86.0 %; " \
           "140 wins, 34 losses, 3 ties)" in card
    assert "CLIP, win rate on the prompts it tells apart: no win, no loss (177 ties)" in card
    assert "Colour shift: hue −3.2 degrees (95 % interval −5.0 to −1.0); saturation +2.5 %; value not defined." in card
    assert 'set_adapters(["hgdpo"], [0.5])' in card and card.startswith("---\nlicense: unknown\n")
    assert "Warning: More defects." in card
    assert "2,000 images drawn by the model itself, 20 a prompt" in card and "98 pairs (2 pools without one)" in card
    assert '"beta": 2500.0' in card and "Use it at weight 0.5" in card
    for heading in ("Intended use", "Misuse", "Limits", "Data", "Results", "Settings"):
        assert f"## {heading}\n" in card
    assert card.count(TO_FILL_IN) == len(FIELDS) - 2  # this run had no images of its own, and no foreign pairs
    for private in (str(tmp_path), str(target_folder.parent), "somebody", "\n\n\n"):
        assert private not in card
    filled = card.replace(TO_FILL_IN, "known")
    (tmp_path / "out" / "README.md").write_text(filled)
    export_run(store, tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == filled


def test_the_card_of_a_hub_model_with_images(tmp_path):
    config = sd15("owner/model", "https://user:word@host.org/prompts.txt?token=secret").model_copy(
        update={"images": "/home/me/photos"})
    card = render_card(config, SUMMARY, kohya_name="x.safetensors", fused=False)
    assert "base_model" not in card and "lies in `base/`" in card and "https://host.org/prompts.txt." in card
    assert card.count(TO_FILL_IN) == len(FIELDS) - 1 and "first fine-tuned on captioned images" in card
    assert not any(private in card for private in ("secret", "word@", "/home/me"))
    assert "No photograph was used as a preference" in card and '"vae"' not in card
    plain = render_card(config.model_copy(update={"images": None}), SUMMARY, kohya_name="x.safetensors", fused=False)
    assert "base_model: owner/model\n" in plain and "base/" not in plain
    changed = apply_overrides(config, {"dpo.allow_foreign_triplets": True, "target.vae": "/home/me/my.vae.pt"})
    card = render_card(changed, SUMMARY, kohya_name="x.safetensors", fused=False)
    assert "No photograph" not in card and '"vae": "my.vae.pt"' in card
    figures_card = render_card(figures(), SUMMARY, kohya_name="x.safetensors", fused=False)
    assert "PickScore is here the figures setting's own judge" in figures_card
    assert public_name("figures") == "the built-in figures model" and public_name("s3://b/dir/p.txt") == "p.txt"


def test_a_run_that_cannot_be_exported_is_one_line(store, tmp_path):
    with pytest.raises(InputError, match=r"no config.json: expected the id of a finished run, one of run-1"):
        export_run(store, tmp_path / "out", "run-2")
    store.write_json("runs/evaluate-1/config.json", {"tuned": "a model"})
    store.write_json("runs/evaluate-1/summary.json", {"run_id": "evaluate-1"})
    assert export_run(store, tmp_path / "one")  # a comparison beside it is not a run with something to export
    with pytest.raises(InputError, match="evaluate-1 compared models and trained none: .* one of run-1"):
        export_run(store, tmp_path / "out", "evaluate-1")
    write_run(store, "run-2", "x")
    with pytest.raises(InputError, match="holds 2 finished runs: name one of run-1, run-2"):
        export_run(store, tmp_path / "out")
    with pytest.raises(InputError, match="holds 0 finished runs"):
        export_run(Store(str(tmp_path / "empty")), tmp_path / "out")
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot write the export to .*free space or choose another"):
        export_run(store, tmp_path / "file" / "out", "run-1")
    store.delete("models/dpo-1/model.json")
    with pytest.raises(InputError, match="models/dpo-1 is gone"):
        export_run(store, tmp_path / "out", "run-1")


# -- the Hub


@dataclass
class FakeHub:
    """Keeps what it was asked; `private` is what the repository already is, None for one that does not exist."""

    private: bool | None = None
    uploads: list[dict] = field(default_factory=list)

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self.private = private if self.private is None else self.private

    def model_info(self, repo_id: str) -> SimpleNamespace:
        return SimpleNamespace(private=self.private)

    def upload_folder(self, **settings) -> None:
        self.uploads.append(settings)


@pytest.fixture
def exported(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HF_TOKEN", "hf_not_a_real_one")
    (tmp_path / "README.md").write_text(f"- Licence: {TO_FILL_IN}")
    return tmp_path


def test_a_push_is_private_by_default(exported):
    hub = FakeHub()
    assert push_folder(exported, "me/model", hub=hub) == "https://huggingface.co/me/model"
    assert hub.private is True
    assert hub.uploads[0]["folder_path"] == exported and "README.md" in hub.uploads[0]["allow_patterns"]
    (exported / "README.md").write_text("- Licence: openrail")
    hub = FakeHub()
    push_folder(exported, "me/model", public=True, hub=hub)
    assert hub.private is False and len(hub.uploads) == 1


def test_nothing_becomes_public_by_accident(exported):
    hub = FakeHub(private=False)
    with pytest.raises(InputError, match="me/model exists and is public: .*add --public"):
        push_folder(exported, "me/model", hub=hub)
    with pytest.raises(InputError, match="fields that say TO FILL IN"):
        push_folder(exported, "me/model", public=True, hub=hub)
    assert not hub.uploads


def test_a_push_that_fails_is_one_line_without_the_token(exported, monkeypatch):
    class Down(FakeHub):
        def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
            raise RuntimeError("503 Service Unavailable\nfor url ...")

    with pytest.raises(StorageError, match="the Hub did not take me/model: 503 Service Unavailable; .* stays in") as e:
        push_folder(exported, "me/model", hub=Down())
    assert "hf_not" not in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(ConfigError, match="expected owner/name"):
        push_folder(exported, "model", hub=FakeHub())
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ConfigError, match="in the environment variable HF_TOKEN"):
        push_folder(exported, "me/model", hub=FakeHub())


def test_the_command(store, tmp_path, monkeypatch, capsys):
    out = str(tmp_path / "out")
    assert main(["export", "--root", store.root, "--to", out]) == 0
    assert "README.md" in capsys.readouterr().out
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert main(["export", "run-1", "--root", store.root, "--to", out, "--push", "me/model"]) == 2
    assert "HF_TOKEN" in capsys.readouterr().err
    hub = FakeHub()
    monkeypatch.setattr("hgdpo_core.export.run.HfApi", lambda token: hub)
    monkeypatch.setenv("HF_TOKEN", "hf_not_a_real_one")
    assert main(["export", "run-1", "--root", store.root, "--to", out, "--push", "me/model"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "https://huggingface.co/me/model" and hub.private
    assert main(["export", "run-1", "--root", store.root, "--to", out, "--push", "me/model", "--public"]) == 2
