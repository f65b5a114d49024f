"""Pool, scores, latents and training on a pretended GPU: no tensor is on the wrong device, and the host waits rarely.

The host may wait once a batch or a step for a number, and once a batch for the pixels, scores or latents; never between
two steps of sampling. Copies to the GPU come before a batch's or step's first operation, when nothing is queued.
"""

import numpy as np
import pyarrow as pa
import pytest
import tiny
import tiny_scorers
import torch
from golden import scorer_inputs
from on_cuda import SAMPLER, check_steps, drawn, on_cpu
from PIL import Image
from training_cases import all_weights, config, sft_config, train, train_images, weights

from hgdpo_core.config import DpoConfig, TargetConfig
from hgdpo_core.figures import prompts as figures_prompts
from hgdpo_core.figures.dataset import write_image_folder
from hgdpo_core.image_sets import read_image_set
from hgdpo_core.images import encode_image
from hgdpo_core.models import find_model
from hgdpo_core.scorers import load_scorer
from hgdpo_core.stages.base import Worker
from hgdpo_core.stages.image_latents import ImageLatentStage, image_latent_folder
from hgdpo_core.stages.latents import LatentStage, latent_folder
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder
from hgdpo_core.training.tune import tune
from hgdpo_core.training.validation import Validation, validation_steps


def find(folder, dtype="float32", syntax="plain"):
    return find_model(TargetConfig(source=str(folder), dtype=dtype, prompt_syntax=syntax, negative_prompt="a dog"))


@pytest.mark.parametrize(("dtype", "syntax"), [("float32", "a1111"), ("bfloat16", "plain")])
def test_a_pool_waits_once_a_batch_and_for_its_pixels(cuda, target_folder, dtype, syntax):
    model = find(target_folder, dtype, syntax)
    assert np.abs(drawn(model, "cuda", cuda) - drawn(model, "cpu")).max() <= (1 if dtype == "float32" else 12)


def test_latent_normalisation_waits_no_more(cuda, target_folder, tmp_path):
    tuned = find(target_folder).with_lora(tiny.save_random_lora(tmp_path, target_folder), 0.5)
    sampler = SAMPLER.model_copy(update={"latent_normalisation": True})
    assert np.abs(drawn(tuned, "cuda", cuda, sampler) - drawn(tuned, "cpu", sampler=sampler)).max() <= 1


@pytest.fixture(scope="module")
def sources(tmp_path_factory, judge_folder):
    root = tmp_path_factory.mktemp("scorers")
    saved = {name: save(root / name) for name, save in tiny_scorers.SAVE.items()}
    return {"pickscore": judge_folder, "tinted": judge_folder} | saved


@pytest.mark.parametrize("name", ["pickscore", "tinted", *tiny_scorers.SAVE])
def test_a_scorer_waits_for_its_scores_alone(cuda, sources, name):
    """ImageReward's text network, which reads the image's features, asks too whether its mask hides a token."""
    images, prompts = scorer_inputs.make_images()[5:], [*scorer_inputs.PROMPTS[4:5] * 2, scorer_inputs.PROMPTS[7]]
    scorer = load_scorer(name, source=str(sources[name]), device="cuda")
    scores = scorer.score(images, prompts)
    cuda.clear()
    assert torch.equal(scorer.score(images, prompts), scores)  # the text is known by now
    assert cuda.to_host.total() == 1 and cuda.values.total() == (name == "imagereward"), cuda
    assert cuda.to_device.total() <= 6, cuda  # pixels, their mean and deviation; ImageReward's text
    expected = load_scorer(name, source=str(sources[name])).score(images, prompts)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)


def test_the_inspector_stays_on_the_cpu(cuda):
    images = [Image.new("RGB", (64, 64), "red")]
    load_scorer("inspector", source="figures", device="cuda").score(images, figures_prompts("test", 1, seed=0))
    assert not cuda.waits and not cuda.to_device, cuda


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "store"))


def make_latents(kind, store, model, folder, device):
    """Cached latents of three pairs or images, with their mirror images."""
    if kind == "sft":
        write_image_folder(folder, 3, seed=0)
        images = read_image_set(str(folder))
        latents = image_latent_folder(store, images, model, (32, 32), flips=True)
        ImageLatentStage(images, latents, model).make(Worker(device))
        return latents
    pixels = np.random.default_rng(0).integers(0, 256, (3, 2, 32, 32, 3), dtype=np.uint8)
    rows = [{"prompt_id": str(i), "caption": f"a woman {i}", "jpg_0": encode_image(pixels[i, 0], "png"),
             "jpg_1": encode_image(pixels[i, 1], "png")} for i in range(3)]
    triplets = ShardFolder.create(store, "triplets/hand", {"stage": "triplets"})
    triplets.commit(0, pa.Table.from_pylist(rows))
    latents = latent_folder(store, triplets, model, (32, 32), flips=True)
    LatentStage(triplets, latents, model, (0,)).make(Worker(device))
    return latents


@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_latents_are_waited_for_and_nothing_else_is(cuda, store, tmp_path, target_folder, kind):
    model = find(target_folder)
    on_gpu = make_latents(kind, store, model, tmp_path / "images", "cuda")
    assert not cuda.values, cuda
    # a batch of winners, of losers, of both mirrored; a batch of images, and of the mirrored; each text
    assert cuda.to_host.total() <= (4 if kind == "dpo" else 2) + 3, cuda
    on_cpu = make_latents(kind, Store(str(tmp_path / "cpu")), model, tmp_path / "same", "cpu")
    for name in ("winner", "loser_mirrored", "prompt_embeds") if kind == "dpo" else ("latents", "mirrored"):
        ours, theirs = (np.frombuffer(b"".join(folder.read(0)[name].to_pylist()), np.float32)
                        for folder in (on_gpu, on_cpu))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("precision", "autocast", "checkpointing"), [
    ("no", True, False), ("bf16", True, True), ("bf16", False, True), ("fp16", True, True)])
def test_a_dpo_step_waits_once(cuda, precision, autocast, checkpointing):
    settings = config(max_steps=1, mixed_precision=precision, autocast=autocast, flip=True,
                      gradient_checkpointing=checkpointing)
    ours, result = train(settings)
    check_steps(cuda, result, fp16=precision == "fp16")
    assert weights(ours).isfinite().all()
    if precision == "no":
        with on_cpu():
            theirs, expected = train(settings)
        np.testing.assert_allclose([row["loss"] for row in result.log], [row["loss"] for row in expected.log], 1e-4)
        torch.testing.assert_close(weights(ours), weights(theirs), rtol=0, atol=1e-3)


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_a_step_of_fine_tuning_waits_once(cuda, precision):
    settings = sft_config(max_steps=1, mixed_precision=precision, flip=True, ema_decay=0.9, caption_dropout=0.5)
    ours, result = train_images(settings)
    check_steps(cuda, result, fp16=precision == "fp16")
    if precision == "no":
        with on_cpu():
            theirs, expected = train_images(settings)
        np.testing.assert_allclose([row["loss"] for row in result.log], [row["loss"] for row in expected.log], 1e-4)
        torch.testing.assert_close(all_weights(ours), all_weights(theirs), rtol=0, atol=2e-3)


def test_a_training_on_a_gpu_shows_images(cuda, store, tmp_path, target_folder):
    """Its text encoder and VAE wait on the CPU; the latter comes for the images alone, between steps."""
    model = find(target_folder, "bfloat16")
    latents = make_latents("dpo", store, model, tmp_path / "images", "cpu")
    settings = DpoConfig(max_steps=1, batch_size=1, learning_rate=1e-3, mixed_precision="fp16", flip=True,
                         validation_every=1, allow_foreign_triplets=True)
    validation = Validation(prompts=("a man",), prompt_syntax="plain", seed=5, lora_weight=0.5,
                            sampler=SAMPLER.model_copy(update={"steps": 1}))
    cuda.clear()
    tuned = tune("dpo", model, latents, [0], settings, "triplets/hand", validation=validation)
    assert [row["step"] for row in tuned.log] == [1] and np.isfinite(tuned.log[0]["loss"])
    assert validation_steps(store, tuned.model_id) == [0, 1]
    assert store.read_json(f"models/{tuned.model_id}/model.json")["device"] == "NVIDIA pretended"
    # the row of the log, the scaler's question, its state for the checkpoint (two), whether each image is finite (two)
    assert cuda.values.total() <= 6, cuda
