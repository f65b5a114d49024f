"""Trainings as requests: the same model from the store and a request alone, found the second time."""

import numpy as np
import pytest
from PIL import Image

from hgdpo_core.config import DpoConfig, SftConfig, TargetConfig
from hgdpo_core.errors import ConfigError, InputError
from hgdpo_core.execution.runner import IN_PROCESS
from hgdpo_core.image_sets import read_image_set
from hgdpo_core.models import find_model
from hgdpo_core.stages.image_latents import cache_image_latents, image_latent_folder
from hgdpo_core.storage import Store
from hgdpo_core.training.request import TrainRequest, find_result, run_train

SFT = SftConfig(max_steps=1, batch_size=2, learning_rate=1e-4, optimizer="adamw", mixed_precision="no")


@pytest.fixture
def model(target_folder):
    return find_model(TargetConfig(source=str(target_folder), dtype="float32"))


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(2):
        Image.fromarray(np.full((32, 32, 3), 90 * number, np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a woman in a red top")
    return folder


def sft(root, images, model, *, cached=True):
    """A request that went over the wire; with `cached`, the latents that it names exist."""
    image_set = read_image_set(str(images))
    latents = image_latent_folder(Store(str(root)), image_set, model, (32, 32))
    if cached:
        cache_image_latents(image_set, latents, model, device="cpu")
    request = TrainRequest.of("sft", latents.store, model, latents, [*image_set.shards], SFT)
    return TrainRequest.model_validate_json(request.model_dump_json())


def test_sft_is_made_from_a_request_and_found_the_second_time(tmp_path, images, model):
    request = sft(tmp_path / "root", images, model)
    assert find_result(request) is None
    seen = []
    made = run_train(request, progress=lambda *at: seen.append(at))
    assert {unit for _, _, unit in seen} == {"steps"} and not made.found
    found = find_result(request)
    assert found is not None and found.model_id == made.model_id and found.log == made.log
    assert IN_PROCESS.train(request).found


def test_missing_latents_are_refused_in_one_line(tmp_path, images, model):
    request = sft(tmp_path / "root", images, model, cached=False)
    assert find_result(request) is None
    with pytest.raises(InputError, match="lacks 1 of the 1 shards to train on: run the pipeline again"):
        run_train(request)


def test_other_code_is_refused(tmp_path, images, model):
    request = sft(tmp_path / "root", images, model).model_copy(update={"code_version": "0.0.9"})
    with pytest.raises(ConfigError, match=r"0\.0\.9"):
        run_train(request)


def test_settings_come_back_as_what_they_were(tmp_path, images, model):
    request = sft(tmp_path / "root", images, model)
    assert request.settings == SFT
    dpo = DpoConfig(batch_size=4, learning_rate=1e-5, beta=7.0)
    assert request.model_copy(update={"kind": "dpo", "config": dpo.model_dump(mode="json")}).settings == dpo
