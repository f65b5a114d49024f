"""Trainings as requests: the same model from the store and a request alone, found the second time.

Their latents are a stage of their own, by its own request.
"""

import shutil

import numpy as np
import pytest
from PIL import Image

from hgdpo_core.config import DpoConfig, SftConfig, TargetConfig
from hgdpo_core.errors import ConfigError, InputError
from hgdpo_core.execution.jobs import cut, run_shards, write_recipe
from hgdpo_core.execution.runner import IN_PROCESS
from hgdpo_core.image_sets import read_image_set
from hgdpo_core.models import find_model
from hgdpo_core.stages.image_latents import ImageLatentStage, image_latent_folder
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


def planned(root, images, model, *, copy_to_store=False):
    """The requests of the latents and of the training on them."""
    image_set = read_image_set(str(images))
    stage = ImageLatentStage(image_set, image_latent_folder(Store(str(root)), image_set, model, (32, 32)), model)
    write_recipe(stage, copy_to_store=copy_to_store)
    encode, = cut(stage, stage.find_missing())
    request = TrainRequest.of("sft", model, stage.folder, stage.indices, SFT, copy_to_store=copy_to_store)
    return encode, TrainRequest.model_validate_json(request.model_dump_json())


def sft(root, images, model):
    return planned(root, images, model)[1]


def test_sft_is_made_from_a_request_and_found_the_second_time(tmp_path, images, model):
    encode, request = planned(tmp_path / "root", images, model)
    assert find_result(request) is None
    assert run_shards(encode) == 2
    seen = []
    made = run_train(request, progress=lambda *at: seen.append(at))
    assert {unit for _, _, unit in seen} == {"steps"} and not made.existing
    found = find_result(request)
    assert found is not None and found.model_id == made.model_id and found.log == made.log
    assert IN_PROCESS.train(request).existing


def test_copied_images_are_read_from_the_store(tmp_path, images, model):
    encode, request = planned(tmp_path / "a", images, model)
    run_shards(encode)
    alone = run_train(request)
    encode, request = planned(tmp_path / "b", images, model, copy_to_store=True)
    shutil.rmtree(images)
    run_shards(encode)
    assert run_train(request).model_id == alone.model_id


def test_images_that_changed_since_are_refused(tmp_path, images, model):
    encode, _ = planned(tmp_path / "root", images, model)
    (images / "0.txt").write_text("another caption")
    with pytest.raises(InputError, match="planned with 2-"):
        run_shards(encode)


def test_missing_latents_are_refused_in_one_line(tmp_path, images, model):
    with pytest.raises(InputError, match="lacks 1 of the 1 shards to train on: run the pipeline again"):
        run_train(sft(tmp_path / "root", images, model))


def test_other_code_is_refused(tmp_path, images, model):
    request = sft(tmp_path / "root", images, model).model_copy(update={"code_version": "0.0.9"})
    with pytest.raises(ConfigError, match=r"0\.0\.9"):
        run_train(request)


def test_settings_come_back_as_what_they_were(tmp_path, images, model):
    request = sft(tmp_path / "root", images, model)
    assert request.settings == SFT
    dpo = DpoConfig(batch_size=4, learning_rate=1e-5, beta=7.0)
    assert request.model_copy(update={"kind": "dpo", "config": dpo.model_dump(mode="json")}).settings == dpo
