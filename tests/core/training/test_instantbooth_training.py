"""Training an InstantBooth adapter: the target stays as it is, gates open, a resumed training ends the same."""

import json

import pytest
import tiny
import tiny_adapters
import torch
from tiny import SD15, tiny_unet, trainable
from transformers import CLIPVisionConfig, CLIPVisionModel

from hgdpo_core.config import InstantBoothConfig, PersonaliserConfig, TargetConfig
from hgdpo_core.errors import ConfigError, InputError, ModelError, StoppedError
from hgdpo_core.image_sets.sets import read_image_set
from hgdpo_core.models import find_model
from hgdpo_core.models.instantbooth import ImageEncoder, find_image_encoder
from hgdpo_core.models.personaliser import find_adapter
from hgdpo_core.scorers.identity import detector_fingerprint
from hgdpo_core.stages.base import Worker
from hgdpo_core.stages.concept_latents import ConceptLatentStage, concept_latent_folder
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import read_table
from hgdpo_core.training.base import Hooks
from hgdpo_core.training.checkpoints import Checkpoints
from hgdpo_core.training.data import epoch_order, sample_generator
from hgdpo_core.training.instantbooth import (
    ConceptBatch,
    InstantBoothSettings,
    move_concepts,
    prepare_instantbooth,
)
from hgdpo_core.training.loop import run_training
from hgdpo_core.training.objective import OBJECTIVES
from hgdpo_core.training.tune import tune


class People:
    """Random latents, captions whose third token is V, and random concepts."""

    def __init__(self, places=True):
        generator = torch.Generator().manual_seed(3)
        self.latents = torch.randn(5, 4, 8, 8, generator=generator)
        self.embeds = torch.randn(5, 6, 32, generator=generator)
        self.concepts = torch.rand(5, 3, 32, 32, generator=generator)
        self.places = torch.zeros(5, 6, dtype=torch.bool)
        self.places[:, 2] = places

    def __len__(self):
        return 5

    def order(self, seed, epoch):
        return epoch_order(5, seed, epoch)

    def batch(self, indices):
        return ConceptBatch(*(part[list(indices)] for part in (self.latents, self.embeds, self.places, self.concepts)))


def settings(**changes):
    return InstantBoothConfig(**{"batch_size": 2, "max_steps": 4, "learning_rate": 1e-3, "linear_learning_rate": 1e-3,
                                 "gate_learning_rate": 1e-2, "mixed_precision": "no", "checkpoint_every": 2,
                                 "concept_word": "V", **changes})


def prepare(config):
    torch.manual_seed(5)
    encoder = ImageEncoder(CLIPVisionModel(CLIPVisionConfig(**{**tiny_adapters.ENCODER, "patch_size": 8})))
    return prepare_instantbooth(*trainable(tiny_unet(), SD15), config, encoder)


def train(config, people=None, *, checkpoints=None, should_stop=lambda: False):
    objective = prepare(config)
    result = run_training(objective, people or People(), config, checkpoints, Hooks(should_stop=should_stop))
    return objective.denoiser, result


def test_adapters_learn_and_the_target_does_not():
    config = settings()
    new = {name: tensor.clone() for name, tensor in prepare(config).denoiser.concepts.state_dict().items()}
    denoiser, result = train(config)
    own = {name: tensor for name, tensor in denoiser.network.state_dict().items() if ".fuser." not in name}
    before = tiny_unet().state_dict()
    assert own.keys() == before.keys()
    assert all(torch.equal(own[name].cpu(), tensor) for name, tensor in before.items())
    trained = denoiser.concepts.state_dict()
    changed = [name for name, tensor in trained.items() if not torch.equal(tensor.cpu(), new[name])]
    assert {name.rpartition(".")[2] for name in changed} >= {"gamma"} and "embed.weight" in changed
    assert result.log[0]["gate"] == 0 < result.log[-1]["gate"]


def test_bfloat16_trains_as_float32_does():
    """The default where the machine is fast at it; the network's norms refuse inputs of another precision."""
    runs = {precision: train(settings(mixed_precision=precision)) for precision in ("no", "bf16")}
    (full, _), (denoiser, _) = runs["no"], runs["bf16"]
    assert {parameter.dtype for parameter in denoiser.concepts.parameters()} == {torch.float32}
    assert denoiser.network.conv_in.weight.dtype == torch.bfloat16
    losses = [[row["loss"] for row in result.log] for _, result in runs.values()]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    gates = [[float(adapter.gamma) for adapter in one.concepts.adapters.values()] for one in (full, denoiser)]
    assert all(gates[1]) and gates[1] == pytest.approx(gates[0], abs=1e-2)


def test_each_kind_of_weight_has_its_own_rate():
    """Adam's first step moves every weight that has a gradient by its rate."""
    config = settings(max_steps=1)
    denoiser, _ = train(config)
    gates = [abs(float(adapter.gamma.detach())) for adapter in denoiser.concepts.adapters.values()]
    assert gates == pytest.approx([1e-2] * len(gates), rel=1e-3)
    moved = denoiser.concepts.embed.weight.detach().abs()
    assert float(moved[moved > 0].max()) == pytest.approx(1e-3, rel=1e-3)


def test_a_stopped_training_goes_on_to_the_same_weights(tmp_path):
    whole, _ = train(settings())
    checkpoints, asked = Checkpoints(Store(str(tmp_path)), "c"), []

    def stop():
        asked.append(1)
        return len(asked) > 2

    with pytest.raises(StoppedError):
        train(settings(), checkpoints=checkpoints, should_stop=stop)
    resumed, result = train(settings(), checkpoints=checkpoints)
    assert result.resumed_from == 2
    for name, tensor in whole.concepts.state_dict().items():
        assert torch.equal(tensor, resumed.concepts.state_dict()[name]), name


def test_concepts_are_moved_by_their_own_generator_alone():
    concepts = People().concepts
    together = move_concepts(concepts, [sample_generator(1, k) for k in range(5)])
    alone = move_concepts(concepts[3:4], [sample_generator(1, 3)])
    assert torch.allclose(together[3:4], alone, atol=1e-6)
    assert not torch.allclose(together, concepts, atol=1e-2)
    assert together.min() >= 0 and together.max() <= 1


def test_a_caption_without_the_word_is_refused():
    with pytest.raises(InputError, match="lacks the concept's word"):
        train(settings(), People(places=False))


# -- on a user's images


def save_images(folder, captions):
    folder.mkdir()
    lines = []
    for number, caption in enumerate(captions):
        tiny_adapters.picture(number, 96).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return read_image_set(str(folder))


def faces_of(image):
    """By the colour of its first pixel: the images of `save_images` differ there."""
    wide = {tiny_adapters.picture(1, 96).getpixel((0, 0)): [], tiny_adapters.picture(2, 96).getpixel((0, 0)): [
        (8.0, 8.0, 30.0, 30.0), (50.0, 8.0, 20.0, 20.0)], tiny_adapters.picture(3, 96).getpixel((0, 0)): [
        (8.0, 8.0, 6.0, 6.0)]}
    return wide.get(image.getpixel((0, 0)), [(30.0, 20.0, 30.0, 36.0)])


def test_images_without_exactly_one_face_are_rejected_and_the_rest_train_an_adapter(target_folder, tmp_path,
                                                                                    monkeypatch):
    store, model = Store(str(tmp_path / "root")), find_model(TargetConfig(source=str(target_folder), dtype="float32"))
    images = save_images(tmp_path / "images", ["a on woman", "a on man", "a on girl", "a on boy", "a woman",
                                               "a on man runs"])
    monkeypatch.setattr("hgdpo_core.scorers.identity.faces.find_faces", faces_of)
    folder = concept_latent_folder(store, images, model, (32, 32), detector_fingerprint(None), "on")
    stage = ConceptLatentStage(images, folder, model)
    stage.make(Worker("cpu"))
    (shard,) = folder.manifests()
    assert folder.manifests()[shard].rows == 2
    rejected = read_table(store, f"{folder.key}/rejected/shard-{shard:05d}.parquet").to_pylist()
    reasons = ["it shows no face", "it shows several faces", "its face is too small", "its caption has no word on"]
    assert [row["reason"].partition(":")[0] for row in rejected] == reasons
    assert stage.counts() == (6, 2, dict.fromkeys(reasons, 1))
    torch.manual_seed(5)
    encoder = tmp_path / "encoder"
    CLIPVisionModel(CLIPVisionConfig(**{**tiny_adapters.ENCODER, "patch_size": 8})).save_pretrained(encoder)
    config = InstantBoothSettings.of(settings(max_steps=2, concept_word="on", image_encoder=str(encoder)))
    tuned = tune("instantbooth", model, folder, [shard], config)
    assert tuned.model_id.startswith("instantbooth-") and tuned.log[-1]["gate"] > 0
    assert tune("instantbooth", model, folder, [shard], config).existing
    adapter = find_adapter(PersonaliserConfig(source=str(tuned.path), crop=None), model)
    assert adapter.name == "instantbooth" and adapter.strength == 0.3
    with pytest.raises(ConfigError, match="image_encoder is not given"):
        InstantBoothSettings.of(settings(concept_word="on"))


def test_an_image_encoder_enters_ids_by_its_files_and_is_found_elsewhere(tmp_path):
    """A whole CLIP is one too; what is not read of its folder changes nothing."""
    paths, objective = [tmp_path / "one", tmp_path / "two"], OBJECTIVES["instantbooth"]
    for path in paths:
        tiny.save_judge(path)
    (paths[1] / "notes.json").write_text("{}")
    first, second = (InstantBoothSettings.of(settings(image_encoder=str(path))) for path in paths)
    assert first.identity() == second.identity() and first.image_encoder != second.image_encoder
    assert ImageEncoder.load(paths[0]).width == 32
    store = Store(str(tmp_path / "root"))
    for copy in (False, True):
        locations = json.loads(json.dumps(objective.locate(store, first, copy_to_store=copy)))
        found = objective.find_located(store, first, locations)
        assert found.identity() == first.identity() and found.image_encoder.startswith(str(tmp_path / "root")) == copy
    tiny.save_judge(tmp_path / "one", seed=4)
    with pytest.raises(ModelError, match="the image encoder found here has fingerprint"):
        objective.find_located(store, first, objective.locate(store, first, copy_to_store=False))
    built_in = InstantBoothSettings.of(settings(image_encoder="figures"))
    assert objective.locate(store, built_in, copy_to_store=True)["image_encoder"]["source"] == "figures"
    for path, message in ((tmp_path, "config.json is missing"), ("nowhere/at/all", "does not exist")):
        with pytest.raises(ModelError, match=message):
            find_image_encoder(str(path))
