"""An objective registered from outside: a request, a training, a plan and a report see it without naming it."""

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file

from hgdpo_core.config import TargetConfig, TrainingConfig
from hgdpo_core.errors import ConfigError, InputError, StorageError
from hgdpo_core.image_sets import read_image_set
from hgdpo_core.losses import denoising_error
from hgdpo_core.models import find_model
from hgdpo_core.models.published import find_record
from hgdpo_core.models.sizes import model_size
from hgdpo_core.plan.training import PlannedTraining
from hgdpo_core.rendering.charts import ChartSpec
from hgdpo_core.report.training import training_charts
from hgdpo_core.stages.base import Worker
from hgdpo_core.stages.image_latents import ImageLatentStage, image_latent_folder
from hgdpo_core.statistics.checks import RunWarning, check_run
from hgdpo_core.statistics.intervals import Estimate
from hgdpo_core.storage import Store
from hgdpo_core.training.base import Objective, TrainingObjective
from hgdpo_core.training.data import ImageBatch, LatentImages
from hgdpo_core.training.objective import OBJECTIVES, find_objective
from hgdpo_core.training.parts import draw_noise
from hgdpo_core.training.request import TrainRequest, find_result, run_train

SIZE = (32, 32)


class BiasConfig(TrainingConfig):
    strength: float = 1.0


class Biases(TrainingObjective):
    """Trains the biases of a network on images, and nothing else."""

    name, title = "biases", "Training of biases"
    section, trains_on, config, samples = "biases", "images", BiasConfig, LatentImages
    charts = (ChartSpec("Root of the loss", ("root",), "of each step"),)
    checks = (lambda log, _: RunWarning("biases", f"{len(log)} rows"),)

    def __init__(self):
        self.watched = []

    def require_fit(self, store, triplets, samples, indices, model, config):
        if len(samples) < 2:
            raise InputError("expected two images")

    def random_batch(self, count, latent_shape, embeds_shape):
        return ImageBatch(torch.randn(count, *latent_shape), torch.randn(count, *embeds_shape))

    def prepare(self, backbone, model, config):
        denoiser, schedule = backbone.denoiser, backbone.schedule
        biases = {name: each for name, each in denoiser.network.named_parameters() if name.endswith(".bias")}
        denoiser.requires_grad_(False).eval()
        for bias in biases.values():
            bias.requires_grad_(True)

        def batch_loss(trained, batch, generators):
            latents, timesteps = batch.latents, schedule.draw_timesteps(generators)
            noise = draw_noise(generators, latents)
            predicted = trained(schedule.add_noise(latents, noise, timesteps), timesteps, batch.conditioning)
            error = denoising_error(predicted, schedule.prediction_target(latents, noise, timesteps))
            return {"loss": config.strength * error}

        return Objective(self.name, denoiser, batch_loss, lambda: {k: v.detach().clone() for k, v in biases.items()},
                         lambda state: denoiser.network.load_state_dict(dict(state), strict=False), "strength")

    def save(self, backbone, folder, model_id):
        backbone.save(folder)
        return "pipeline"

    def watch(self, warn):
        return self.watched.append

    def with_derived(self, log):
        return [{**row, "root": row["loss"] ** 0.5} for row in log]

    def trained_numbers(self, size, config):
        return 1000

    def saved_numbers(self, size, config):
        return size.whole


@pytest.fixture
def biases(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "biases", objective := Biases())
    return objective


@pytest.fixture
def model(target_folder):
    return find_model(TargetConfig(source=str(target_folder), dtype="float32"))


@pytest.fixture
def latents(tmp_path, model):
    """Of two captioned images."""
    (tmp_path / "images").mkdir()
    for number in range(2):
        Image.fromarray(np.full((*SIZE, 3), 90 * number, np.uint8)).save(tmp_path / "images" / f"{number}.png")
        (tmp_path / "images" / f"{number}.txt").write_text("a woman in a red top")
    images = read_image_set(str(tmp_path / "images"))
    folder = image_latent_folder(Store(str(tmp_path / "root")), images, model, SIZE)
    ImageLatentStage(images, folder, model).make(Worker("cpu"))
    return folder


def settings(**changes) -> BiasConfig:
    return BiasConfig(**{"max_steps": 2, "batch_size": 2, "learning_rate": 1e-2, "mixed_precision": "no", **changes})


def test_an_objective_from_outside_goes_all_the_way(biases, model, latents):
    config = settings()
    request = TrainRequest.of("biases", model, latents, [0], config)
    request = TrainRequest.model_validate_json(request.model_dump_json())
    assert request.kind == "biases" and request.settings == config

    tuned = run_train(request)
    assert tuned.model_id.startswith("biases-") and not tuned.existing
    assert [row["step"] for row in tuned.log] == [1, 2] and biases.watched == tuned.log
    found = find_result(request)
    assert found is not None and found.model_id == tuned.model_id and run_train(request).existing

    log = latents.store.read_json(f"models/{tuned.model_id}/log.json")
    for damaged in ({"lines": log["rows"]}, {"rows": ["x"]}, {"rows": [{"loss": "x"}]}):
        latents.store.write_json(f"models/{tuned.model_id}/log.json", damaged)
        with pytest.raises(StorageError, match="log.json is damaged: expected a JSON object with rows as it was"):
            run_train(request)
    latents.store.write_json(f"models/{tuned.model_id}/log.json", log)

    name = "unet/diffusion_pytorch_model.safetensors"
    before, after = load_file(model.path / name), load_file(tuned.path / name)
    changed = {key for key, tensor in before.items() if not torch.equal(tensor, after[key])}
    assert changed and all(key.endswith(".bias") for key in changed)
    assert find_model(TargetConfig(source=str(tuned.path), dtype="float32")).path == tuned.path

    planned = PlannedTraining(biases, config, model, size := model_size(model.path), SIZE)
    record = find_record(latents.store, tuned.model_id)
    row = planned.row(latents.store, tuned.model_id, 2, record, lambda: pytest.fail("a finished one needs no rate"))
    assert (row.stage, row.total, row.missing, row.seconds) == ("biases", 2, 0, 0.0) and row.bytes_found > 0
    more = PlannedTraining(biases, settings(max_steps=None, epochs=6), model, size, SIZE)
    row = more.row(latents.store, "", 2, None, lambda: more.past(latents.store))
    assert row.missing == 6 and row.bytes_missing == 4 * (size.whole + 2 * 3 * 1000)
    assert row.basis == f"the training of {tuned.model_id} on cpu" and row.seconds is not None
    assert more.probed("cpu").seconds > 0

    section = training_charts("biases", tuned.log)
    assert "Training of biases" in section and "Root of the loss" in section
    alarms = check_run(tuned.log, {}, {}, Estimate(None, None, None), None, biases.checks)
    assert alarms == [RunWarning("biases", "2 rows")]


def test_an_unfit_source_is_refused_before_a_model_loads(biases, model, latents, monkeypatch):
    monkeypatch.setattr("hgdpo_core.training.tune.load_backbone", lambda *_, **__: pytest.fail("it loaded"))
    monkeypatch.setattr(LatentImages, "__len__", lambda self: 1)
    with pytest.raises(InputError, match="two images"):
        run_train(TrainRequest.of("biases", model, latents, [0], settings()))


def test_an_unknown_objective_is_refused_in_one_line(model, latents):
    with pytest.raises(ConfigError, match="no training objective 'kto': expected one of sft, dpo"):
        find_objective("kto")
    with pytest.raises(ConfigError, match="no training objective 'kto': expected one of sft, dpo"):
        TrainRequest.of("kto", model, latents, [0], settings())
    request = TrainRequest.of("sft", model, latents, [0], settings()).model_dump(mode="json")
    with pytest.raises(ValidationError, match="expected one of sft, dpo"):
        TrainRequest.model_validate(request | {"kind": "kto"})


def test_each_objective_is_listed_under_its_own_name():
    assert list(OBJECTIVES) == ["sft", "dpo", "sft_winners", "alignprop", "instantbooth"]
    assert [objective.name for objective in OBJECTIVES.values()] == list(OBJECTIVES)
