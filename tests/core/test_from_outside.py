"""A scorer, an objective and a family of models registered from outside: the whole pipeline runs with all three."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_run
import torch
from diffusers import StableDiffusionPipeline

from hgdpo_core.config import DpoConfig
from hgdpo_core.losses import denoising_error
from hgdpo_core.models import FAMILIES
from hgdpo_core.models.files import read_config
from hgdpo_core.models.lora import add_lora, load_lora_state, lora_state
from hgdpo_core.models.lora_files import apply_lora
from hgdpo_core.models.sd15 import make_backbone
from hgdpo_core.pipeline import run_all, write_report
from hgdpo_core.progress import StageTimes
from hgdpo_core.rendering.charts import ChartSpec
from hgdpo_core.run import open_run
from hgdpo_core.scorers import SCORERS
from hgdpo_core.statistics.checks import RunWarning
from hgdpo_core.training.base import Objective, TrainingObjective
from hgdpo_core.training.data import LatentPairs, PairBatch
from hgdpo_core.training.objective import OBJECTIVES
from hgdpo_core.training.parts import draw_noise


class Redness:
    """A scorer without weights: how much redder than blue an image is."""

    NAME = name = "redness"
    TITLE = "Redness"
    fingerprint = "red-minus-blue"

    def locate(self, source):
        return (self.fingerprint,)

    def check(self, source):
        """Nothing can be missing."""

    def load(self, *, source=None, device="cpu", dtype=torch.float32):
        return self

    def score(self, images, prompts):
        pixels = np.stack([np.asarray(image, np.float32) for image in images])
        return torch.from_numpy((pixels[..., 0] - pixels[..., 2]).mean((1, 2)) / 255)


class Winners(TrainingObjective):
    """Noise prediction on the winners of triplets, into a LoRA."""

    name, title = "winners", "Fine-tuning on winners"
    section, trains_on, config, samples = "dpo", "triplets", DpoConfig, LatentPairs
    charts = (ChartSpec("Error on winners", ("loss",), "of each step"),)
    checks = (lambda log, _: RunWarning("winners", f"trained for {len(log)} steps"),)

    def require_fit(self, store, triplets, samples, indices, model, config):
        assert triplets is not None and triplets.startswith("triplets/")

    def random_batch(self, count, latent_shape, embeds_shape):
        latents = torch.randn(count, *latent_shape)
        return PairBatch(latents, latents, torch.randn(count, *embeds_shape))

    def prepare(self, backbone, model, config):
        denoiser, schedule = backbone.denoiser, backbone.schedule
        add_lora(denoiser.network, config.lora_rank, config.seed, denoiser.lora_targets)

        def batch_loss(trained, batch, generators):
            latents, timesteps = batch.winner_latents, schedule.draw_timesteps(generators)
            noise = draw_noise(generators, latents)
            predicted = trained(schedule.add_noise(latents, noise, timesteps), timesteps, batch.conditioning)
            return {"loss": denoising_error(predicted, schedule.prediction_target(latents, noise, timesteps))}

        return Objective(self.name, denoiser, batch_loss, lambda: lora_state(denoiser.network),
                         lambda state: load_lora_state(denoiser.network, state), "learning_rate")

    def save(self, backbone, folder, model_id):
        backbone.save_lora(folder)
        return "lora"

    def trained_numbers(self, size, config):
        return config.lora_rank * size.attention

    saved_numbers = trained_numbers


class Flow:
    """Flow matching: a network predicts noise minus latents; the solver takes Euler steps."""

    init_noise_sigma = 1.0
    timesteps = torch.empty(0)

    def require_trainable(self):
        """It is."""

    def draw_timesteps(self, generators):
        return torch.cat([torch.randint(1, 1000, (1,), generator=generator) for generator in generators])

    def add_noise(self, latents, noise, timesteps):
        part = (timesteps / 1000).reshape(-1, 1, 1, 1)
        return (1 - part) * latents + part * noise

    def prediction_target(self, latents, noise, timesteps):
        return noise - latents

    def statistic_matching(self, policy, reference, timesteps):
        return ((policy - reference).mean((2, 3)) ** 2).sum(1)

    def solver(self):
        return Flow()

    def set_timesteps(self, steps, device):
        self.timesteps = torch.linspace(1000, 1000 / steps, steps, device=device)

    def set_begin_index(self, index):
        """Steps need no index here."""

    def scale_model_input(self, latents, timestep):
        return latents

    def step(self, prediction, timestep, latents, return_dict):
        assert not return_dict
        return (latents - prediction / len(self.timesteps),)


class FlowFamily:
    """A family whose folders say FlowPipeline: other noise, another solver, the networks of the tiny target."""

    loaded: int = 0

    def recognises(self, path: Path):
        index = path / "model_index.json"
        return index.is_file() and read_config(index)["_class_name"] == "FlowPipeline"

    def check_folder(self, path, *, own_vae):
        assert (path / "unet").is_dir()

    def load(self, model, device, *, dtype, codec_dtype):
        self.loaded += 1
        pipeline = StableDiffusionPipeline.from_pretrained(model.path, safety_checker=None, local_files_only=True)
        pipeline.set_progress_bar_config(disable=True)
        if model.lora:
            apply_lora(pipeline, model.lora.path)
            pipeline.fuse_lora(lora_scale=model.lora.weight)
            pipeline.unload_lora_weights()
        backbone = make_backbone(pipeline, model)

        def save(folder):
            backbone.save(folder)
            _rename(folder)

        return replace(backbone, schedule=Flow(), save=save)


def _rename(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "FlowPipeline"}))


@pytest.fixture
def registered(monkeypatch):
    family = FlowFamily()
    monkeypatch.setitem(FAMILIES, "flow", family)
    monkeypatch.setitem(OBJECTIVES, "winners", Winners())
    monkeypatch.setitem(SCORERS, "redness", Redness())
    return family


def test_the_whole_pipeline_runs_with_them(registered, target_folder, judge_folder, tmp_path):
    shutil.copytree(target_folder, tmp_path / "flow")
    _rename(tmp_path / "flow")
    parameters = tiny_run.tiny_parameters(tmp_path, tmp_path / "flow", judge_folder)
    redness = {"name": "redness"}
    parameters["overrides"] |= {"scorer": redness, "evaluation.scorers": [redness], "dpo.flip": False,
                                "objective": "winners"}
    run, times = open_run(root=str(tmp_path / "root"), **parameters), StageTimes()

    result = run_all(run, times=times)
    made = result.made
    assert registered.loaded > 0 and made.lora.model_id.startswith("winners-") and len(made.lora.log) == 2
    assert FAMILIES["flow"].recognises(made.target.path)  # the fine-tuned one
    assert made.ranked.scores.config["scorer"] == "redness"
    assert result.comparison.win_rates["redness"].n == 8
    assert [warning.message for warning in result.warnings if warning.guard == "winners"] == ["trained for 2 steps"]

    summary = write_report(run, result, times).summary
    page = run.store.read_bytes(run.key("report.html")).decode()
    assert summary["lora_id"] == made.lora.model_id and summary["win_rate"]["redness"]["n"] == 8
    assert "Fine-tuning on winners" in page and "Redness" in page and "DPO loss" not in page

    again = run_all(open_run(root=str(tmp_path / "root"), **parameters), times=(found := StageTimes()))
    assert again.made.lora.existing and again.comparison.evaluation_id == result.comparison.evaluation_id
    assert "winners" in found.cached and "pool" in found.cached
