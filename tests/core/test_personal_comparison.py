"""Two models personalised by one adapter: samples, ids, images, distances, intervals, report; and what is refused."""

import hashlib
import json
import sys
from dataclasses import replace

import face_files
import numpy as np
import pyarrow as pa
import pytest
import tiny
import tiny_adapters
from diffusers import UNet2DConditionModel
from PIL import Image

from hgdpo_core import pipeline
from hgdpo_core.config import JudgeConfig, PoolConfig
from hgdpo_core.errors import ConfigError, HGDPOError, InputError, ModelError
from hgdpo_core.images import decode_image, encode_image
from hgdpo_core.models.locations import find_located_model, model_locations
from hgdpo_core.prompts import Sample, image_seed, prompt_id
from hgdpo_core.prompts.concepts import Concept, crop_face, load_concept, read_concepts, save_concept
from hgdpo_core.report.summary import write_comparison_report
from hgdpo_core.run.comparison import open_comparison, plan_comparison
from hgdpo_core.scorers import identity, load_scorer
from hgdpo_core.stages.base import Worker
from hgdpo_core.stages.identities import SCHEMA, IdentityStage, read_distances
from hgdpo_core.stages.pool import SCHEMA as POOL_SCHEMA
from hgdpo_core.stages.pool import PoolPlan, plan_pool, with_concepts
from hgdpo_core.storage import Store

PROMPTS = ["a woman in a red top", "a man in a blue top", "a girl waves"]


@pytest.fixture
def colours(monkeypatch, tmp_path):
    return tiny_adapters.colour_judge(monkeypatch, tmp_path)


@pytest.fixture
def adapter(target_folder, tmp_path):
    tiny_adapters.save_encoder(tmp_path / "adapters" / "image_encoder")
    unet = UNet2DConditionModel.from_pretrained(target_folder / "unet")
    return tiny_adapters.save_ip_adapter(tmp_path / "adapters" / "plus-face.safetensors", unet, "plus-face")


@pytest.fixture
def compare(tmp_path, target_folder, judge_folder, adapter, colours):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    lora = tiny.save_random_lora(tmp_path / "lora", target_folder)
    given = {"root": str(tmp_path / "root"), "target": str(target_folder), "tuned": str(lora),
             "prompts": str(tmp_path / "prompts.txt"), "scorers": [f"pickscore={judge_folder}"],
             "concepts": str(tiny_adapters.save_people(tmp_path / "people", 3)), "personaliser": str(adapter),
             "judges": [colours], "overrides": {"target.dtype": "float32", "sampler.width": 32, "sampler.height": 32,
                                                "sampler.steps": 2, "concepts.personaliser.crop": None}}

    def open_it(**changes):
        overrides = {**given["overrides"], **changes.pop("overrides", {})}
        return open_comparison(**{**given, "overrides": overrides, **changes})

    return open_it


def test_a_sample_has_an_id_and_a_seed_of_its_own():
    plain, one, other = "a woman", Sample("a woman", "ab" * 8), Sample("a woman", "cd" * 8)
    assert prompt_id(one) == hashlib.sha256(b"a woman\0" + b"ab" * 8).hexdigest()[:16]
    assert len({prompt_id(prompt) for prompt in (plain, one, other)}) == 3
    assert len({image_seed(0, prompt, 0) for prompt in (plain, one, other)}) == 3
    assert one == Sample("a woman", "ab" * 8) and one != other and one != plain and plain != one
    assert len({plain, one, other, Sample("a woman", "ab" * 8)}) == 3
    assert str(one) == plain and f"{one}" == plain and json.dumps(one) == json.dumps(plain)


def test_the_whole_comparison(compare, tmp_path):
    run = compare(overrides={"concepts.margin": 0.2}, lora_weights=[0.5, 1.0])
    assert len(run.samples) == 9 and len(run.people.concepts) == 3 and run.detector is None
    assert [row["images"] for row in plan_comparison(run)] == [9, 9, 9]
    images = pipeline.generate_evaluation(run, run.models)
    scores = pipeline.score_evaluation(run, images)
    faces = pipeline.judge_identity(run, images)
    result = pipeline.compare_models(run, images, scores, identities=faces)
    assert result.people == 3 and len(result.prompts) == 9
    (change,) = result.identity.values()
    assert change.win_rate.n + change.left_out == 9 and change.margin == 0.2 and change.images == 9
    assert change.win_rate.ci_low is None or 0 <= change.win_rate.ci_low <= change.low
    distances = read_distances(faces["target"]["figures"], images["target"], run.samples)
    person = load_concept(run.store, run.samples[4].concept)
    row = next(row for shard in images["target"].indices for row in images["target"].folder.read(shard).to_pylist()
               if row["prompt_id"] == prompt_id(run.samples[4]))
    judge = tiny_adapters.ColourJudge()
    mine, theirs = (judge.embed([judge.cut(image).face])[0] for image in (
        Concept("", (row["image"],)).pictures()[0], person.pictures()[0]))
    assert distances.distance[4, 0] == pytest.approx(1 - mine @ theirs, abs=1e-6)
    other = pipeline.compare_models(run, images, scores, "LoRA weight 0.5", faces)
    assert other.evaluation_id != result.evaluation_id and set(other.identity) == {"figures"}
    published = write_comparison_report(run, images, result, [other, result], seconds={}, cached=[])
    assert published.summary["people"] == 3 and published.summary["identity"]["figures"]["margin"] == 0.2
    page = run.store.read_bytes(run.key("report.html")).decode()
    assert "paper&#x27;s Table 4" in page and "people who agreed" in page and "weights of nowhere" in page
    assert page.count("<figcaption>concept</figcaption>") >= 9
    assert published.data.pairs[0].concept is not None
    kept = run.store.read_json(f"evaluations/{result.evaluation_id}/config.json")
    assert kept["concepts"] == [sample.concept for sample in run.samples]
    again = pipeline.generate_evaluation(compare(overrides={"concepts.margin": 0.2}), run.models)
    assert not any(plan.missing for plan in again.values())  # found again by samples, not by prompts


def test_samples_of_a_pool_survive_a_lost_plan(compare):
    run = compare()
    plan = pipeline.generate_evaluation(run, {"target": run.target})["target"]
    before = plan.folder.read(0).to_pylist()
    assert [row["concept"] for row in before] == [sample.concept for sample in run.samples]
    assert len({row["image"] for row in before}) == 9 and len({row["seed"] for row in before}) == 9
    for name in run.store.list(f"{plan.folder.key}/plan"):
        run.store.delete(f"{plan.folder.key}/plan/{name}")
    found = plan_pool(run.store, run.target, plan.sampler, plan.pool, run.samples)
    assert not found.missing and found.shards == plan.shards
    opened = PoolPlan.open(plan.folder, plan.recipe(), [0])
    assert opened.model.identity() == run.target.identity() and opened.concept_ids == plan.concept_ids
    more = plan_pool(run.store, run.target, plan.sampler, plan.pool, [Sample("a dog", run.samples[0].concept)])
    assert len(more.missing) == 1


def test_models_without_an_adapter_ignore_concepts(compare):
    run = compare()
    bare = replace(run.target, personaliser=None)
    images = pipeline.generate_evaluation(run, {"bare": bare, "target": run.target})
    rows = {who: {(row["prompt_id"], row["seed"]): row["image"] for row in plan.folder.read(0).to_pylist()}
            for who, plan in images.items()}
    assert rows["bare"].keys() == rows["target"].keys()  # the same samples and seeds
    assert all(rows["bare"][key] != rows["target"][key] for key in rows["bare"])
    plain = plan_pool(run.store, bare, images["bare"].sampler, images["bare"].pool, PROMPTS)
    plain.make(Worker(device="cpu"))
    added = next(shard.index for shard in plain.shards)
    assert "concept" not in plain.folder.read(added).column_names


def test_each_person_gets_other_prompts(compare):
    run = compare(overrides={"concepts.prompts_per_concept": 2})
    texts = [[str(sample) for sample in run.samples if sample.concept == person.id] for person in run.people.concepts]
    assert texts == [PROMPTS[:2], [PROMPTS[2], PROMPTS[0]], PROMPTS[1:]]
    assert run.run_id != compare().run_id and "--concepts" in run.command and "--personaliser" in run.command


def test_a_worker_elsewhere_finds_the_adapter_in_the_store(compare, adapter):
    run = compare()
    recipe = json.loads(json.dumps(model_locations(run.store, run.tuned, copy_to_store=True)))
    adapter.unlink()
    found = find_located_model(run.store, run.tuned.identity(), recipe)
    assert found.identity() == run.tuned.identity() and found.personaliser.image_encoder is not None


def test_what_is_refused(compare, tmp_path, colours, monkeypatch):
    empty, unreadable, twins = (tmp_path / name for name in ("empty", "unreadable", "twins"))
    for folder in (empty, unreadable, twins):
        folder.mkdir()
    (empty / "notes.txt").write_text("no image")
    (unreadable / "a.png").write_bytes(b"nothing")
    for name in "ab":
        tiny_adapters.picture(1).save(twins / f"{name}.png")
    cases = [
        ({"concepts": str(empty)}, InputError, "holds no image: expected files that end in .png"),
        ({"concepts": str(tmp_path / "none")}, InputError, "is no folder of concepts"),
        ({"concepts": str(unreadable)}, InputError, "1 image of concepts cannot be read, the first is .*a.png"),
        ({"concepts": str(twins)}, InputError, "a and b have the same images"),
        ({"concepts": None}, InputError, "personaliser is given without concepts"),
        ({"personaliser": None}, InputError, "concepts are given without a personaliser"),
        ({"personaliser": str(tmp_path / "none")}, ModelError, "does not exist: expected an IP-Adapter"),
        ({"judges": ["beauty"]}, ConfigError, "there is no such judge of identity"),
        ({"judges": ["arcface"]}, ModelError, "no weights that we may fetch|which is not installed"),
        ({"overrides": {"concepts.margin": 0.7}}, ConfigError, "concepts.margin"),
    ]
    for changes, kind, message in cases:
        with pytest.raises(HGDPOError, match=message) as caught:
            compare(**changes)
        assert isinstance(caught.value, kind) and "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match="which is not installed: pip install"):
        compare(overrides={"concepts.personaliser.crop": 2.0})
    assert Store(str(tmp_path / "root")).list_folders() == []


# -- concepts


def test_concepts_of_a_folder(tmp_path):
    (tmp_path / "anna").mkdir()
    for number, name in enumerate(("b.png", "a.png", "c.png")):
        tiny_adapters.picture(number).save(tmp_path / "anna" / name)
    tiny_adapters.picture(7, size=64).save(tmp_path / "Bea.jpg")
    (tmp_path / "readme.md").write_text("consent forms")
    (tmp_path / ".hidden.png").write_bytes(b"")
    for most, has in ((None, 3), (2, 2)):
        with pytest.raises(InputError, match=f"the concept anna has {has} images, Bea has 1: an adapter reads equally "
                           "many of each; give as many, or set concepts.images_per_concept to 1"):
            read_concepts(tmp_path, most, lambda image: pytest.fail("no detector is needed to see that"))
    (tmp_path / "Bea").mkdir()
    (tmp_path / "Bea.jpg").rename(tmp_path / "Bea" / "1.jpg")
    tiny_adapters.picture(8, size=64).save(tmp_path / "Bea" / "2.jpg")
    found = read_concepts(tmp_path, images_per_concept=2)
    assert [(concept.name, len(concept.images)) for concept in found.concepts] == [("Bea", 2), ("anna", 2)]
    assert found.describe() == ("2 people by 4 images; left out 1 file that are no images; left out 1 file beyond "
                                "images_per_concept")
    data = [(tmp_path / "anna" / name).read_bytes() for name in ("a.png", "b.png")]
    assert found.concepts[1].id == hashlib.sha256(b"".join(data)).hexdigest()[:16]
    with pytest.raises(InputError, match="2 images of concepts show no face, the first is .*a.png"):
        read_concepts(tmp_path, 2, lambda image: [(0.0, 0.0, 9.0, 9.0)] if image.width == 64 else [])
    two = [(1.0, 2.0, 30.0, 30.0), (0.0, 0.0, 9.0, 9.0)]
    assert read_concepts(tmp_path, 2, lambda image: two).concepts[1].faces == (two[0], two[0])


def test_a_stored_concept_is_the_same_and_no_other(tmp_path):
    store = Store(str(tmp_path))
    concept = Concept("anna", (b"one", b"two"), ((1.0, 2.5, 3.0, 4.0), (0.0, 0.0, 8.0, 9.0)))
    save_concept(store, concept)
    assert load_concept(store, concept.id) == concept
    store.write_bytes(f"concepts/{concept.id}/image-001", b"three")
    with pytest.raises(HGDPOError, match="holds other images than those of its id"):
        load_concept(store, concept.id)


def test_what_prompts_and_scorers_call_a_person(tmp_path, compare, judge_folder):
    people = tiny_adapters.save_people(tmp_path / "named", 2)
    (people / "person-0.txt").write_text("a woman\n\na woman with red hair\n")
    (tmp_path / "prompts.txt").write_text("{person} waves\na street\n")
    run = compare(concepts=str(people))
    assert run.people.describe() == "2 people by 2 images"
    first, second = (person.id for person in run.people.concepts)
    assert list(run.samples) == [
        Sample("a woman waves", first, "a woman with red hair waves"), Sample("a street", first),
        Sample("a person waves", second), Sample("a street", second)]
    assert len(set(map(prompt_id, run.samples))) == 4
    assert run.sample_prompts == ("{person} waves", "a street") * 2
    plans = pipeline.generate_evaluation(run, {"target": run.target})
    scores = pipeline.score_evaluation(run, plans)["target"]["pickscore"]
    rows, scored = plans["target"].folder.read(0).to_pylist(), scores.read(0).to_pylist()
    assert [row["caption"] for row in rows] == ["a woman with red hair waves", None, None, None]
    scorer = load_scorer("pickscore", source=str(judge_folder))
    expected = scorer.score([decode_image(row["image"]) for row in rows],
                            ["a woman with red hair waves", *(row["prompt"] for row in rows[1:])])
    assert [row["score"] for row in scored] == pytest.approx(expected.tolist(), abs=1e-4)
    assert scored[0]["score"] != pytest.approx(scorer.score([decode_image(rows[0]["image"])], ["a woman waves"]).item())
    (people / "person-1.txt").write_text("a\nb\nc")
    with pytest.raises(InputError, match="person-1.txt has 3 lines of text"):
        read_concepts(people)


@pytest.mark.parametrize(("box", "expected"), [
    ((40.0, 30.0, 20.0, 30.0), (20, 15, 60)),  # twice 30 around (50, 45)
    ((0.0, 0.0, 20.0, 30.0), (0, 0, 60)),  # moved into the image
    ((0.0, 0.0, 90.0, 90.0), (5, 0, 80)),  # as large as the image allows
])
def test_the_crop_around_a_face(box, expected):
    pixels = np.stack(np.meshgrid(np.arange(100), np.arange(80)), axis=-1).astype(np.uint8)
    image = Image.fromarray(np.concatenate([pixels, pixels[..., :1]], axis=-1))
    crop = crop_face(image, box, 2.0)
    assert (*crop.getpixel((0, 0))[:2], crop.width) == expected and crop.width == crop.height


# -- real faces


def test_distances_of_photographs(tmp_path, compare):
    """Pools whose images are photographs: whose face is nearer, and an image without a face counts apart."""
    pytest.importorskip("onnxruntime", reason="install the extra: pip install 'hgdpo[faces]'")
    weights, photos = face_files.face_weights(), face_files.photographs()
    run, store = compare(), Store(str(tmp_path / "root"))
    finder = identity.face_finder(weights / identity.DETECTOR)
    people = tmp_path / "faces"
    people.mkdir()
    for name in ("obama", "biden"):
        (people / f"{name}.jpg").write_bytes(photos[name].read_bytes())
    biden, obama = read_concepts(people, find_faces=finder).concepts
    assert biden.faces[0][2] > 200 and crop_face(biden.pictures()[0], biden.faces[0], 2.2).width > 600
    for concept in (biden, obama):
        save_concept(store, concept)
    samples = [Sample("a man", obama.id), Sample("a man", biden.id), Sample("a man waves", obama.id)]
    plan = plan_pool(store, run.target, run.config.sampler, PoolConfig(images_per_prompt=1), samples)
    shown = ["obama3", "astronaut", "chelsea"]
    rows = [{"prompt_id": prompt_id(sample), "prompt": str(sample), "concept": sample.concept, "index": 0, "seed": 1,
             "image": encode_image(np.asarray(Image.open(photos[name]).convert("RGB")), "png"), "width": 1, "height": 1}
            for sample, name in zip(samples, shown, strict=True)]
    plan.folder.commit(0, pa.Table.from_pylist(rows, schema=with_concepts(POOL_SCHEMA, samples)), inputs=[],
                       device="cpu", batch_size=1, seconds=0.0,
                       details={"prompt_ids": [prompt_id(sample) for sample in samples]})
    stage = IdentityStage.of(plan, JudgeConfig(name="sface", source=str(weights)), weights / identity.DETECTOR,
                             title="sface")
    stage.make(Worker(device="cpu"))
    found = read_distances(stage.folder, plan, samples)
    assert found.distance[0, 0] < 0.4 < 0.7 < found.distance[1, 0] and np.isnan(found.distance[2, 0])
    assert found.faces[:, 0].tolist() == [1, 1, 0]
    assert stage.folder.read(0).schema.equals(SCHEMA)
    worker = IdentityStage.open(stage.folder, json.loads(json.dumps(stage.recipe(copy_to_store=True))), [0])
    assert worker.find_missing() == [] and worker.judge.name == "sface"
