"""`hgdpo personalise` without Prefect: images of people to an adapter that evaluations take; what is refused."""

import json

import face_files
import numpy as np
import pytest
import tiny
import tiny_adapters
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel

from hgdpo_core.config import ConceptsConfig, PersonaliserConfig, TargetConfig
from hgdpo_core.config.presets import sd15
from hgdpo_core.errors import ConfigError, HGDPOError, InputError, ModelError, StoppedError
from hgdpo_core.execution.runner import InProcess
from hgdpo_core.figures.identities import draw_people, draw_view
from hgdpo_core.models import find_model
from hgdpo_core.models.personaliser import find_adapter
from hgdpo_core.models.published import publish_model
from hgdpo_core.personalise import encode_people, open_personalise, plan_personalise, train_adapter, write_summary
from hgdpo_core.run.comparison import open_people
from hgdpo_core.scorers import identity
from hgdpo_core.stages import STAGES
from hgdpo_core.storage import Store

WORD = "on"  # a token of its own of the tiny tokenizer


def save_images(folder, pictures):
    """`pictures`: name -> caption and image."""
    folder.mkdir()
    for name, (_, image) in pictures.items():
        image.save(folder / f"{name}.png")
    (folder / "metadata.jsonl").write_text("".join(
        json.dumps({"file_name": f"{name}.png", "text": text}) + "\n" for name, (text, _) in pictures.items()))
    return str(folder)


def drawn(count):
    """Drawn people with the word in their captions."""
    rng = np.random.default_rng(0)
    people = draw_people("validation", rng)
    views = [draw_view(person, rng, pose="standing") for person, _ in zip(people, range(count), strict=False)]
    return {f"person-{n}": (f"a {WORD} {view.person.person}", view.render()[0]) for n, view in enumerate(views)}


@pytest.fixture
def parameters(tmp_path, target_folder):
    tiny_encoder = CLIPVisionModel(CLIPVisionConfig(**{**tiny_adapters.ENCODER, "patch_size": 8}))
    tiny_encoder.save_pretrained(tmp_path / "encoder")
    others = {"nothing": (f"a {WORD} man", Image.new("RGB", (64, 64), "grey")),
              "wordless": ("a man", Image.new("RGB", (64, 64), "grey")),
              "late": (f"{'a man waves ' * 20}{WORD}", Image.new("RGB", (64, 64), "grey"))}
    return {"preset": "sd15", "root": str(tmp_path / "root"), "target": str(target_folder),
            "images": save_images(tmp_path / "images", {**drawn(6), **others}),
            "overrides": {"target.dtype": "float32", "width": 32, "height": 32, "detector": "figures", "crop": 3,
                          "instantbooth.image_encoder": str(tmp_path / "encoder"), "instantbooth.concept_word": WORD,
                          "instantbooth.max_steps": 3, "instantbooth.batch_size": 2, "instantbooth.tracker": None,
                          "instantbooth.global_batch_size": 2, "instantbooth.checkpoint_every": 1}}


def test_images_become_an_adapter(parameters, target_folder):
    run = open_personalise(**parameters)
    assert [row["missing_shards"] for row in plan_personalise(run)] == [1, 1]
    stage = encode_people(run)
    adapter = train_adapter(run)
    assert [row["missing_shards"] for row in plan_personalise(run)] == [0, 0]
    summary = write_summary(run, stage, adapter)
    assert summary["images"] == 9 == summary["used"] + sum(summary["refused"].values()) and summary["used"] >= 5
    assert summary["refused"]["its caption has no word on"] == 1 <= summary["refused"]["it shows no face"]
    assert summary["refused"][f"its caption has the word {WORD} behind what the text encoder reads"] == 1
    assert summary["steps"] == 3 and summary["final"]["gate"] > 0
    found = find_adapter(PersonaliserConfig(source=str(adapter.path)), find_model(run.config.target))
    assert found.name == "instantbooth" and summary["artifacts"]["adapter"].endswith(adapter.model_id)
    assert "--personaliser" in summary["evaluate"] and "concepts.personaliser.crop=3" in summary["evaluate"]
    again = open_personalise(**parameters)
    assert again.run_id == run.run_id and train_adapter(again).existing
    worker = STAGES["concept_latents"].open(stage.folder, json.loads(json.dumps(stage.recipe(copy_to_store=True))), [0])
    assert worker.existing().keys() == {0} and worker.read_concept is not None
    with pytest.raises(ModelError, match="the face detector found here has fingerprint"):
        changed = Store(run.store.root)
        changed.write_json(f"{stage.folder.key}/config.json", {**stage.folder.config, "detector": "another"})
        STAGES["concept_latents"].open(type(stage.folder).open(changed, stage.folder.key), stage.recipe(), [0])


def test_ids_follow_the_files_of_the_encoder_not_their_place(parameters, tmp_path):
    first = open_personalise(**parameters)
    (tmp_path / "encoder").rename(tmp_path / "moved")
    moved = {**parameters["overrides"], "instantbooth.image_encoder": str(tmp_path / "moved")}
    assert open_personalise(**{**parameters, "overrides": moved}).run_id == first.run_id
    tiny_adapters.save_encoder(tmp_path / "moved", patch_size=8)
    assert open_personalise(**{**parameters, "overrides": moved}).run_id != first.run_id


def test_a_stopped_training_goes_on(parameters):
    run = open_personalise(**parameters)
    encode_people(run)
    asked = []

    def stop():
        asked.append(1)
        return len(asked) > 2

    with pytest.raises(StoppedError):
        train_adapter(run, InProcess(stop))
    assert any(Store(run.store.root).list_folders(f"models/{name}/checkpoints") for name in
               Store(run.store.root).list_folders("models"))
    assert len(train_adapter(run).log) == 3


def test_the_target_of_a_finished_run_is_its_fine_tuned_one(parameters, tmp_path):
    store = Store(parameters["root"])
    tuned = tiny.save_target(tmp_path / "tuned", seed=4)
    publish_model(store, "sft-1", tuned, {"kind": "pipeline"})
    (tmp_path / "lora").mkdir()
    publish_model(store, "dpo-1", tmp_path / "lora", {"kind": "lora"})
    base = find_model(TargetConfig(source=str(store.local_path("models/sft-1")), dtype="float32"))
    store.write_json("models/dpo-1/config.json", {"kind": "lora", "target": base.identity()})
    config = sd15(parameters["target"], "prompts.txt").model_dump(mode="json")
    config["target"]["prediction_type"] = "epsilon"  # of the single file that was fine-tuned
    store.write_json("runs/run-1/config.json", {"code_version": "1", **config, "images": "photos"})
    store.write_json("runs/run-1/summary.json", {"lora_id": "dpo-1", "win_rate": {}})
    run = open_personalise(**{**parameters, "target": None, "run_id": "run-1"})
    assert run.target.fingerprint == base.fingerprint and "--run run-1" in run.command
    assert run.config.target.source.endswith("models/sft-1")
    with pytest.raises(InputError, match="target and run both name the model"):
        open_personalise(**{**parameters, "run_id": "run-1"})
    with pytest.raises(InputError, match="has no config.json: expected the id of a finished run, one of run-1"):
        open_personalise(**{**parameters, "target": None, "run_id": "run-2"})


@pytest.mark.parametrize(("changes", "overrides", "message"), [
    ({"preset": "sdxl"}, {}, "trains no adapter of people; there are figures, sd15"),
    ({"images": None}, {}, "give images, captioned ones of people who agreed"),
    ({"images": "nowhere"}, {}, "images: nowhere is not a folder"),
    ({}, {"instantbooth.concept_word": "jumps"}, "'jumps' is . tokens of this text encoder"),
    ({}, {"instantbooth.concept_word": "in"}, "none of the 9 captions of .* has the word in"),
    ({}, {"instantbooth.image_encoder": None}, "instantbooth.image_encoder is not given"),
    ({}, {"instantbooth.image_encoder": "no/such"}, "image_encoder no/such is not a local folder"),
    ({}, {"instantbooth.flip": True}, "flip would mirror the image and not its concept"),
    ({}, {"detector": "nowhere"}, "nowhere does not exist"),
    ({}, {"crop": 0.5}, "crop: Input should be greater than"),
    ({"target": "figures-other"}, {}, "does not exist|could not be downloaded"),
])
def test_bad_input_fails_in_one_line_before_a_model_loads(parameters, changes, overrides, message, monkeypatch):
    monkeypatch.setattr("hgdpo_core.training.tune.load_backbone", None)
    given = {**parameters, **changes, "overrides": {**parameters["overrides"], **overrides}}
    with pytest.raises(HGDPOError, match=message) as error:
        open_personalise(**given)
    assert "\n" not in str(error.value)


def test_sdxl_is_refused(parameters, tmp_path):
    target = tiny.save_sdxl(tmp_path / "sdxl")
    with pytest.raises(HGDPOError, match="a model of the Stable Diffusion XL family"):
        open_personalise(**{**parameters, "target": str(target)})
    with pytest.raises(ModelError, match="an InstantBooth adapter is one of Stable Diffusion 1.x"):
        open_personalise(**{**parameters, "target": str(target),
                            "overrides": {**parameters["overrides"], "target.family": None}})


def test_no_usable_image_is_an_error(parameters, tmp_path):
    images = save_images(tmp_path / "grey", {"one": (f"a {WORD} man", Image.new("RGB", (64, 64), "grey"))})
    run = open_personalise(**{**parameters, "images": images})
    with pytest.raises(InputError, match="none of the 1 images can be used"):
        encode_people(run)


def test_photographs_are_read_by_the_public_detector(parameters, tmp_path):
    pytest.importorskip("onnxruntime", reason="install the extra: pip install 'hgdpo[faces]'")
    weights = face_files.face_weights()
    photos = {name: (f"a {WORD} man", Image.open(path).convert("RGB").resize((256, 256)))
              for name, path in face_files.photographs().items() if name in ("obama", "biden", "chelsea")}
    images = save_images(tmp_path / "photos", photos)
    run = open_personalise(**{**parameters, "images": images, "overrides": {
        **parameters["overrides"], "detector": str(weights / identity.DETECTOR), "crop": 2.2}})
    stage = encode_people(run)
    assert stage.counts() == (3, 2, {"it shows no face": 1})
    for copy in (False, True):
        recipe = json.loads(json.dumps(stage.recipe(copy_to_store=copy)))
        worker = STAGES["concept_latents"].open(stage.folder, recipe, [0])
        assert worker.find_missing() == [] and worker.detector.read_bytes() == run.detector.read_bytes()


def test_the_finder_of_drawings_is_not_for_judges_of_photographs(tmp_path):
    config = ConceptsConfig(source="figures", judges="figures", detector="figures",
                            personaliser=PersonaliserConfig(source="figures", crop=None))
    people, detector = open_people(config, TargetConfig(source="figures"))
    assert len(people.concepts) == 64 and people.concepts[0].faces == () and detector is None
    (tmp_path / "face_recognition_sface_2021dec.onnx").write_bytes(b"weights")
    judged = ConceptsConfig.model_validate({**config.model_dump(), "judges": f"sface={tmp_path}"})
    with pytest.raises(ConfigError, match="finds drawn faces, but a judge of photographs needs the public one"):
        open_people(judged, TargetConfig(source="figures"))
    (tmp_path / "people").mkdir()
    drawn(1)["person-0"][1].save(tmp_path / "people" / "one.png")
    cropped = config.model_copy(update={"source": str(tmp_path / "people"), "detector": None,
                                        "personaliser": PersonaliserConfig(source="figures")})
    found, _ = open_people(cropped, TargetConfig(source="figures"))
    assert len(found.concepts[0].faces) == 1
