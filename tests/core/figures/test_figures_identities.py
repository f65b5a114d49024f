"""People with an identity: pixels of all others unchanged, traits that show, splits that never meet."""

import hashlib

import numpy as np
import pytest

from hgdpo_core.config import JudgeConfig, PersonaliserConfig, TargetConfig
from hgdpo_core.figures import identity_path, personaliser_path, render, sample_figure, target_path
from hgdpo_core.figures.concepts import write_people
from hgdpo_core.figures.identities import (
    PEOPLE_SPLITS,
    View,
    concept_image,
    cut_out,
    distinct_people,
    draw_view,
    split_of_person,
)
from hgdpo_core.figures.make.personaliser_evaluation import AMONG, draw_cases, evaluate_personaliser
from hgdpo_core.figures.people import caption, parse_caption
from hgdpo_core.models import find_model
from hgdpo_core.models.personaliser import find_adapter
from hgdpo_core.prompts.concepts import read_concepts
from hgdpo_core.scorers.identity import embed_concept, load_judge

GOLDEN = "33e1350877262d57ba260951ad75ef70de6f58696d1a1ca3884128b2c1b89773"


def pixels(image):
    return np.asarray(image).astype(int)


def test_images_without_traits_are_what_they_were():
    """The digest is of 64 images by the renderer before it knew traits, defects among them."""
    rng, digest = np.random.default_rng(5), hashlib.sha256()
    for seed in range(64):
        defect = (None, "missing_limb", "two_heads", "wrong_colour")[seed % 4]
        digest.update(render(sample_figure(rng), seed, defect=defect).tobytes())
    assert digest.hexdigest() == GOLDEN


def test_a_person_differs_from_the_figure_only_by_skin_and_badge():
    person = distinct_people("test", 1, seed=1)[0]
    view = View(person, "standing", "in a park", 7)
    own, mask = view.render()
    plain = render(person.figure("standing", "in a park"), 7)
    changed = np.abs(pixels(own) - pixels(plain)).max(axis=-1) > 0
    assert changed.any() and not changed[np.asarray(mask) == 0].any()


def test_each_trait_shows():
    from dataclasses import replace
    person = replace(distinct_people("test", 1, seed=1)[0], badge="disc", badge_colour="white", skin=0)
    one = pixels(View(person, "standing", "in a park", 7).render()[0])
    for change in ({"badge": "cross"}, {"badge_colour": "blue"}, {"skin": 3}):
        other = pixels(View(replace(person, **change), "standing", "in a park", 7).render()[0])
        assert np.abs(one - other).max() > 40, change


def test_a_concept_prompt_names_person_pose_and_place_alone_and_the_figure_the_rest():
    view = draw_view(distinct_people("test", 1, seed=2)[0], np.random.default_rng(0), pose="waving", place="at night")
    assert view.prompt() == f"a V {view.person.person}, waving, at night"
    assert parse_caption(caption(view.person.figure("waving", "at night"))).hair == view.person.hair


def test_splits_are_disjoint_and_the_hash_decides():
    people = {split: set(distinct_people(split, 200, seed=3)) for split in PEOPLE_SPLITS}
    assert all(split_of_person(person) == split for split, found in people.items() for person in found)
    assert len(set.union(*people.values())) == 200 * len(PEOPLE_SPLITS)
    assert distinct_people("test", 5, seed=3) == distinct_people("test", 200, seed=3)[:5]
    with pytest.raises(ValueError, match="split must be one of"):
        distinct_people("train", 1, seed=0)


def test_a_concept_shows_the_person_alone_on_grey():
    view = draw_view(distinct_people("test", 1, seed=4)[0], np.random.default_rng(1))
    image, mask = view.render()
    corners = pixels(concept_image(view))[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert (np.abs(corners - 128) <= 2).all()
    with pytest.raises(ValueError, match="empty"):
        cut_out(image, mask.point(lambda _: 0))


def test_cases_ask_for_other_poses_and_places_and_distractors_have_the_same_class_word():
    cases = draw_cases("validation", 9, 3, seed=0)
    assert len(cases) == 9 and len({case.person for case in cases}) == 9
    for case in cases:
        assert len(case.others) == AMONG - 1 and len({view.person for view in case.others}) == AMONG - 1
        assert all(v.person.person == case.person.person and v.person != case.person for v in case.others)
        assert all(v.pose != case.concept.pose and v.place != case.concept.place for v in case.asked)
        assert len({v.pose for v in case.asked}) == 3


def test_the_shipped_adapter_shows_the_right_person():
    """A small part of what docs/EXPERIMENTS.md measures."""
    found = evaluate_personaliser(target_path(), personaliser_path(), identity_path(), split="validation", people=8,
                                  prompts=2)
    assert found["top_1_on"]["rate"] >= 0.5 and found["prefers_on"]["rate"] > 0.8
    assert found["top_1_on"]["rate"] >= 3 * found["top_1_off"]["rate"]


def test_the_built_in_adapter_and_judge_are_found_by_name(tmp_path):
    judge = load_judge(JudgeConfig(name="figures"), None)
    write_people(tmp_path, 3)
    people = read_concepts(tmp_path).concepts
    near = np.stack([embed_concept(judge, each.pictures(), each.name) for each in people])
    assert near.shape == (3, 64) and (near @ near.T).argmax(1).tolist() == [0, 1, 2]
    model = find_model(TargetConfig(source="figures"))
    assert find_adapter(PersonaliserConfig(source="figures", crop=None), model).path == personaliser_path()
