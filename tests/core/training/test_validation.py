"""Images of a model in training: they show it as the evaluation would, and never change the training."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from hgdpo_core.config import DpoConfig, PoolConfig, SamplerConfig, SftConfig, TargetConfig
from hgdpo_core.config.presets import figures
from hgdpo_core.errors import ModelError, StoppedError
from hgdpo_core.image_sets import read_image_set
from hgdpo_core.images import decode_image, encode_image
from hgdpo_core.models import find_model
from hgdpo_core.models.fingerprints import fingerprint_path
from hgdpo_core.models.image_generator import ImageGenerator
from hgdpo_core.models.sd15 import KlCodec
from hgdpo_core.prompts import image_seed
from hgdpo_core.stages.base import Worker
from hgdpo_core.stages.image_latents import ImageLatentStage, image_latent_folder
from hgdpo_core.stages.latents import LatentStage, latent_folder
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder
from hgdpo_core.training.tune import tune
from hgdpo_core.training.validation import Validation, validation_grid, validation_steps

PROMPTS = ("a woman in a red top", "a man")
VALIDATION = Validation(prompts=PROMPTS, prompt_syntax="plain", seed=5, lora_weight=0.5,
                        sampler=SamplerConfig(width=32, height=32, steps=2, guidance_scale=2.0))
DPO = DpoConfig(max_steps=4, batch_size=2, learning_rate=5e-2, mixed_precision="no", allow_foreign_triplets=True,
                checkpoint_every=2)


@pytest.fixture(scope="module")
def model(target_folder):
    return find_model(TargetConfig(source=str(target_folder), dtype="float32"))


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path))


def train(store, model, config, **hooks):
    rng = np.random.default_rng(0)
    triplets = ShardFolder.create(store, "triplets/hand", {"stage": "triplets"})
    if not triplets.completed([0]):
        pixels = rng.integers(0, 256, (3, 2, 32, 32, 3), dtype=np.uint8)
        rows = [{"prompt_id": str(i), "caption": f"a woman {i}", "jpg_0": encode_image(pixels[i, 0], "png"),
                 "jpg_1": encode_image(pixels[i, 1], "png")} for i in range(3)]
        triplets.commit(0, pa.Table.from_pylist(rows))
    latents = latent_folder(store, triplets, model, (32, 32))
    LatentStage(triplets, latents, model, (0,)).make(Worker("cpu"))
    return tune("dpo", model, latents, [0], config, triplets.key, validation=VALIDATION, **hooks)


def read_images(store, model_id, step):
    key = f"models/{model_id}/validation/step-{step:06d}"
    return [np.asarray(decode_image(store.read_bytes(f"{key}/{i}.png"))) for i in range(len(PROMPTS))]


def test_a_training_with_images_is_the_one_without_bit_by_bit(store, tmp_path, model):
    plain = train(Store(str(tmp_path / "plain")), model, DPO)
    noted = DPO.model_copy(update={"validation_every": 3})
    asked = iter([False, False, False, True])
    with pytest.raises(StoppedError, match="step 3 is kept"):
        train(store, model, noted, should_stop=lambda: next(asked))
    before = read_images(store, plain.model_id, 3)
    tuned = train(store, model, noted)
    assert tuned.model_id == plain.model_id and tuned.log == plain.log
    name = "pytorch_lora_weights.safetensors"
    assert (tuned.path / name).read_bytes() == (plain.path / name).read_bytes()
    published = store.read_json(f"models/{tuned.model_id}/model.json")["fingerprint"]
    assert fingerprint_path(tuned.path) == published  # images beside a model are no part of it
    assert validation_steps(store, tuned.model_id) == [0, 3, 4]
    assert validation_steps(Store(str(tmp_path / "plain")), plain.model_id) == []
    assert all(np.array_equal(a, b) for a, b in zip(before, read_images(store, tuned.model_id, 3), strict=True))

    # the first are the target's, the last those of the LoRA at its weight, as the evaluation would draw them
    for step, shown in ((0, model), (4, model.with_lora(tuned.path, 0.5))):
        generator = ImageGenerator(shown, VALIDATION.sampler, PoolConfig(), "cpu")
        for prompt, image in zip(PROMPTS, read_images(store, tuned.model_id, step), strict=True):
            drawn = generator.sample(generator.backbone.text.encode([prompt])[0], [image_seed(5, prompt, 0)]).pixels[0]
            assert np.abs(drawn.astype(int) - image.astype(int)).max() <= 1
    grid = validation_grid(store, tuned.model_id)
    assert grid is not None and grid.height > grid.width // 2
    record = store.read_json(f"models/{tuned.model_id}/validation/step-000004/images.json")
    assert (record["step"], record["prompts"], record["lora_weight"]) == (4, list(PROMPTS), 0.5)


@pytest.mark.parametrize(("error", "message"), [
    (torch.OutOfMemoryError("CUDA out of memory."), "memory ran out"), (ModelError("not finite"), "not finite")])
def test_an_image_that_cannot_be_made_is_a_warning(store, model, monkeypatch, caplog, error, message):
    def fail(*_):
        raise error

    monkeypatch.setattr(KlCodec, "decode", fail)
    tuned = train(store, model, DPO.model_copy(update={"validation_every": 4, "max_steps": 1}))
    assert f"no validation images of step 0: {message}" in caplog.text
    assert validation_steps(store, tuned.model_id) == [] and validation_grid(store, tuned.model_id) is None


def test_a_fine_tuning_shows_its_average(store, tmp_path, model):
    (tmp_path / "images").mkdir()
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    (tmp_path / "images" / "a.png").write_bytes(encode_image(image, "png"))
    (tmp_path / "images" / "a.txt").write_text("a woman")
    images = read_image_set(str(tmp_path / "images"))
    latents = image_latent_folder(store, images, model, (32, 32))
    ImageLatentStage(images, latents, model).make(Worker("cpu"))
    config = SftConfig(max_steps=3, batch_size=1, learning_rate=1e-2, mixed_precision="no", validation_every=3,
                       ema_decay=0.9)
    tuned = tune("sft", model, latents, [0], config, validation=VALIDATION)
    generator = ImageGenerator(find_model(TargetConfig(source=str(tuned.path), dtype="float32")), VALIDATION.sampler,
                      PoolConfig(), "cpu")
    drawn = generator.sample(generator.backbone.text.encode([PROMPTS[0]])[0], [image_seed(5, PROMPTS[0], 0)]).pixels[0]
    last = read_images(store, tuned.model_id, 3)[0]
    assert np.abs(drawn.astype(int) - last.astype(int)).max() <= 1
    assert not np.array_equal(last, read_images(store, tuned.model_id, 0)[0])


def test_prompts_are_spread_over_the_evaluations():
    run = figures()
    settings = run.dpo.model_copy(update={"validation_every": 10, "validation_images": 3})
    chosen = Validation.of_run(run, settings, [str(i) for i in range(9)])
    assert chosen is not None and chosen.prompts == ("0", "3", "6")
    assert chosen.lora_weight == run.evaluation.lora_weight and chosen.seed == run.evaluation.seed
    assert Validation.of_run(run, run.dpo, ["a"]) is None and Validation.of_run(run, settings, []) is None
