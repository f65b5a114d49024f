"""People of the figures setting as concepts, and what comes with the package for them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from hgdpo_core import built_in, figures
from hgdpo_core.ablate.personal import personal_run
from hgdpo_core.ablate.program import open_ablation
from hgdpo_core.config import InstantBoothConfig, JudgeConfig, PersonaliserConfig, TargetConfig
from hgdpo_core.figures.concepts import concept_prompts, write_people
from hgdpo_core.figures.identities import CONCEPT_WORD
from hgdpo_core.figures.identity_judge import IdentityNetwork, save_identity_judge
from hgdpo_core.figures.people import parse_caption
from hgdpo_core.models import find_model, load_backbone
from hgdpo_core.models.instantbooth import ImageEncoder, save_instantbooth
from hgdpo_core.models.locations import find_located_model, model_locations
from hgdpo_core.models.personaliser import find_adapter
from hgdpo_core.prompts import PERSON
from hgdpo_core.prompts.concepts import read_concepts
from hgdpo_core.run.comparison import open_comparison
from hgdpo_core.scorers.identity import find_judge, load_judge
from hgdpo_core.storage import Store
from hgdpo_core.training.instantbooth import attach_new


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """Random ones in the place of those that come with the package."""
    torch.manual_seed(0)
    encoder = ImageEncoder(CLIPVisionModel(CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=64,
        patch_size=16)))
    target = load_backbone(find_model(TargetConfig(source=built_in.SOURCE)), dtype="float32")
    denoiser = attach_new(target.denoiser, InstantBoothConfig(concept_word=CONCEPT_WORD), encoder)
    save_instantbooth(denoiser.concepts, encoder, tmp_path / "personaliser")
    save_identity_judge(IdentityNetwork(), tmp_path / "identity")
    monkeypatch.setattr(figures, "personaliser_path", lambda: tmp_path / "personaliser")
    monkeypatch.setattr(figures, "identity_path", lambda: tmp_path / "identity")


def test_people_are_concepts_whom_captions_describe(tmp_path):
    write_people(tmp_path / "people", 8)
    write_people(tmp_path / "again", 8)
    people, again = (read_concepts(tmp_path / name).concepts for name in ("people", "again"))
    assert [person.id for person in people] == [person.id for person in again] and len(people) == 8
    for person in people:
        sample = person.sample(f"{PERSON}, waving, at night")
        figure = parse_caption(sample.caption)
        assert str(sample) == f"a {CONCEPT_WORD} {figure.person}, waving, at night"


def test_prompts_differ_in_pose_and_place():
    prompts = concept_prompts()
    assert len(set(prompts)) == 48 and all(prompt.startswith(f"{PERSON}, ") for prompt in prompts)
    first = [prompt.split(", ")[1:] for prompt in prompts[:8]]
    assert len({pose for pose, _ in first}) == 8 and len({place for _, place in first}) == 6


def test_the_built_in_judge(weights):
    judge = JudgeConfig(name=built_in.SOURCE)
    loaded = load_judge(judge, None)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    cut = loaded.cut(figures.render(figures.sample_figure(np.random.default_rng(0)), 0))
    assert cut.faces == 1 and cut.face.shape == (64, 64, 3)
    vectors = loaded.embed([cut.face, image])
    assert vectors.shape == (2, 64) and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert find_judge(judge, None) == find_judge(JudgeConfig(name=built_in.SOURCE, source=built_in.SOURCE), None)


def test_the_built_in_adapter_is_found_on_every_machine(weights, tmp_path):
    model = find_model(TargetConfig(source=built_in.SOURCE, dtype="float32"))
    adapter = find_adapter(PersonaliserConfig.model_validate(built_in.concept_settings()["personaliser"]), model)
    assert adapter.name == "instantbooth" and adapter.strength == built_in.STRENGTH
    personal, store = replace(model, personaliser=adapter), Store(str(tmp_path / "root"))
    recipe = json.loads(json.dumps(model_locations(store, personal, copy_to_store=True)))
    assert recipe["personaliser"]["source"]["source"] == built_in.SOURCE
    assert find_located_model(store, personal.identity(), recipe).identity() == personal.identity()


def test_evaluate_opens_with_what_comes_with_the_package(weights, tmp_path):
    lora = tiny.save_random_lora(tmp_path / "lora", figures.target_path())
    run = open_comparison(root=str(tmp_path / "root"), tuned=str(lora), concepts=built_in.SOURCE)
    assert len(run.samples) == 512 and run.config.concepts.judges[0].name == built_in.SOURCE
    assert run.tuned.personaliser == run.target.personaliser and run.tuned.personaliser.strength == built_in.STRENGTH
    other = open_comparison(root=str(tmp_path / "root"), tuned=str(lora), concepts=built_in.SOURCE, overrides={
        "concepts.personaliser.strength": 0.2, "concepts.prompts_per_concept": 1})
    assert other.target.personaliser.strength == 0.2 and len(other.samples) == 64


def test_table_4_opens_with_what_comes_with_the_package(weights, tmp_path):
    ablation = open_ablation(root=str(tmp_path / "root"), settings={"comparisons": ["personalised"]})
    run = personal_run(ablation, ablation.run.target, ablation.run.target)
    assert len(ablation.people.concepts) == 64 and len(run.samples) == len(set(run.samples)) == 512
    assert run.config.concepts.margin == 0.075 and ablation.seeds == range(3) and run.detector is None
    texts = [str(sample) for sample in run.samples]
    assert all(f" {CONCEPT_WORD} " in text for text in texts)
    assert all(f" {CONCEPT_WORD} " not in sample.caption for sample in run.samples)
