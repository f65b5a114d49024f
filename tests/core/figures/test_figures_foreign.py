"""The foreign style: its captions, its prompts, and its drawings with every defect."""

import json
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPTokenizer

from hgdpo_core.figures import Figure, foreign, render, sample_figure, target_path
from hgdpo_core.figures.foreign import (
    StillLife,
    defects_of,
    foreign_prompts,
    parse_scene,
    render_foreign,
    sample_scenes,
    scene_caption,
)
from hgdpo_core.figures.foreign.prompts import PARTS, VOCABULARIES, still_lives_of
from hgdpo_core.figures.people import PLACES, SPLITS, split_of

STILL = StillLife("big", "red", "house", "orange", "in a park")
STRONG = {"man", "woman", "boy", "girl"}


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_a_caption_and_its_scene_are_two_spellings_of_one_thing():
    assert scene_caption(STILL) == "a big red house with an orange roof, in a park"
    for scene in sample_scenes("train", 200, np.random.default_rng(0)):
        assert parse_scene(scene_caption(scene)) == scene


@pytest.mark.parametrize("text", [
    "a big red house with a orange roof, in a park", "a big red house with an orange sail, in a park",
    "a big grey house with an orange roof, in a park", "a huge red house with an orange roof, in a park",
    "two people in a park", ""])
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError):
        parse_scene(text)


def test_every_still_life_belongs_to_one_split():
    captions = {split: {scene_caption(still) for still in still_lives_of(split)} for split in SPLITS}
    assert len(set.union(*captions.values())) == 6144 == sum(len(some) for some in captions.values())
    assert {split_of(text) for text in captions["validation"]} == {"validation"}
    with pytest.raises(ValueError, match="split must be one of"):
        still_lives_of("dev")


def test_three_of_ten_prompts_hold_no_person_and_longer_lists_begin_with_shorter_ones():
    texts = foreign_prompts("train", 1000, seed=1)
    still = [isinstance(parse_scene(text), StillLife) for text in texts]
    assert len(set(texts)) == 1000 and {split_of(text) for text in texts} == {"train"}
    assert sum(still) == 300 and [sum(still[i:i + 10]) for i in range(0, 1000, 10)] == [3] * 100
    assert foreign_prompts("train", 37, seed=1) == texts[:37] != foreign_prompts("train", 37, seed=2)
    with pytest.raises(ValueError, match="still lives"):
        foreign_prompts("test", 20000, seed=0)


def test_the_words_tell_people_from_still_lives():
    """A figures caption has a word that the filter of foreign pairs calls strong; no still life has any of a human."""
    for text in foreign_prompts("train", 500, seed=3):
        words = set(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))
        assert bool(words & STRONG) == isinstance(parse_scene(text), Figure), text
    known = {word for vocabulary in VOCABULARIES.values() for text in vocabulary for word in text.split()}
    lists = next(iter(Path(foreign.__file__).parents[2].rglob("human_words.json")), None)
    if lists is not None:  # the filter's own list, where it is installed
        human = json.loads(lists.read_text())
        assert not (known | set(PARTS.values())) & {*human["strong"], *human["role"]}
        assert set(human["strong"]) >= STRONG


def test_the_tokenizer_of_the_target_spells_every_caption():
    tokenizer = CLIPTokenizer.from_pretrained(target_path() / "tokenizer")
    texts = [scene_caption(still) for still in still_lives_of("validation")]
    ids = tokenizer(texts)["input_ids"]
    assert max(map(len, ids)) <= tokenizer.model_max_length == 24
    assert len({tuple(row) for row in ids}) == len(texts)


def test_a_seed_repeats_its_image_and_another_does_not():
    for scene in (STILL, Figure("girl", "pink", "yellow", "blue", "cheering", "in the snow")):
        image = render_foreign(scene, 5)
        assert (image.mode, image.size) == ("RGB", (64, 64))
        assert (pixels(image) == pixels(render_foreign(scene, 5))).all()
        assert (pixels(image) != pixels(render_foreign(scene, 6))).any()
    assert render_foreign(STILL, 0, size_px=128).size == (128, 128)


def test_the_two_styles_differ():
    rng = np.random.default_rng(4)
    figures = [sample_figure(rng) for _ in range(60)]
    own, other = ([pixels(draw(figure, seed)) for seed, figure in enumerate(figures)]
                  for draw in (render, render_foreign))
    shades = [np.mean([len(np.unique(image[:30, :8].reshape(-1, 3), axis=0)) for image in images])
              for images in (own, other)]
    assert 2 * shades[1] < shades[0]  # no scenery behind the people
    dark = [np.mean([(image.sum(-1) < 160).mean() for image in images]) for images in (own, other)]
    assert dark[1] > dark[0]  # thicker edges


@pytest.mark.parametrize("kind", ["people", "still lives"])
def test_a_defect_changes_a_visible_part_of_the_image(kind):
    scenes = sample_scenes("train", 24, np.random.default_rng(6), without_people=float(kind == "still lives"))
    for defect in defects_of(scenes[0]):
        for seed, scene in enumerate(scenes):
            right, broken = (pixels(render_foreign(scene, seed, defect=d)) for d in (None, defect))
            difference = np.abs(right - broken)
            assert (difference.max(-1) > 24).sum() >= 6, (defect, scene_caption(scene), seed)


def test_every_thing_and_place_looks_different():
    things = [pixels(render_foreign(StillLife("big", "red", thing, "white", "in a park"), 1)) for thing in PARTS]
    places = [pixels(render_foreign(StillLife("big", "red", "ball", "white", place), 1)) for place in PLACES]
    sizes = [pixels(render_foreign(StillLife(size, "red", "ball", "white", "at night"), 1)) for size in ("big", "tiny")]
    for images in (things, places, sizes):
        assert all((np.abs(one - other).max(-1) > 12).sum() > 60
                   for i, one in enumerate(images) for other in images[:i])


def test_a_defect_of_another_kind_of_scene_is_refused():
    with pytest.raises(ValueError, match="defect must be None or one of missing_thing"):
        render_foreign(STILL, 0, defect="two_heads")
    with pytest.raises(ValueError, match="still life's thing must be one of"):
        StillLife("big", "red", "dog", "orange", "in a park")
