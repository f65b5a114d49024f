"""Which prompts are about people, and which are unsafe, sentence by sentence."""

import json
from importlib.resources import files

import pytest

from hgdpo_core.config.pair_source import PairSource
from hgdpo_core.pair_sets.rows import MINOR, NOT_HUMAN, SEXUAL, PairText, find_reason
from hgdpo_core.pair_sets.words import load_words

WORDS = load_words()


@pytest.mark.parametrize("prompt", [
    "a man in a red hat", "A WOMAN, oil on canvas", "two girls at the beach", "selfie of friends", "a crowd in Rome",
    "portrait of an astronaut", "astronauts on the moon", "three dancers", "a king and his queen", "the chef cooks",
    "old gentlemen playing cards", "a businessman on the phone", "the bride throws flowers", "a surfer at sunset",
    "ｗｏｍａｎ in full-width letters", "WOMEN’S football team", "a man with a dog",  # a strong word needs no guard
    "a child and a robot", "people, no humans in the back", "a snowman beside a man", "a headshot, studio light",
    "a team of scientists", "a baby asleep", "twins", "the judges of a contest",
])
def test_prompts_about_people(prompt):
    assert WORDS.is_human(prompt)


@pytest.mark.parametrize("prompt", [
    "a snowman", "snow men in a row", "a gingerbread man", "a cloud in the shape of a man",
    "a tree in the shape of woman",
    "a street, no people", "empty beach without people", "a city without any humans", "a room, no person", "kids' toys",
    "the human digestive system", "a human skull", "human heart, anatomy", "a castle on a hill", "",
    "portrait of a cat", "portrait of two foxes", "an astronaut riding a horse", "a robot chef", "king penguin",
    "statue of a warrior", "a family of ducks", "a wizard frog", "mankind", "manga of a city", "the womanless house",
    "chess queen and king", "a teddy bear dressed as a pirate", "personal computer",
    "two babies asleep",  # version 1 knows no irregular plurals
])
def test_other_prompts(prompt):
    assert not WORDS.is_human(prompt)


@pytest.mark.parametrize(("prompt", "safety"), [
    ("a naked child", "minor"), ("NSFW schoolgirl", "minor"), ("sexy 15 years old", "minor"),
    ("17yo in lingerie", "minor"),
    ("a 16-year-old in a bikini", "minor"), ("ｎｕｄｅ teen", "minor"), ("girls in bikinis, bikini", "minor"),
    ("loli, erotic", "minor"), ("a nude woman", "sexual"), ("topless man", "sexual"), ("pornographic", "sexual"),
    ("a woman aged 25 years old, seductive", "sexual"), ("a 21 year old in underwear", "sexual"),
    ("a child at school", ""), ("Essex in spring", ""), ("a boy and a girl", ""), ("grape juice", ""), ("", ""),
])
def test_unsafe_prompts(prompt, safety):
    assert WORDS.check_safety(prompt) == safety


def test_the_list_ships_with_the_package_and_has_a_version():
    words = json.loads(files("hgdpo_core.pair_sets").joinpath("human_words.json").read_text())
    assert WORDS.version == words["version"] == 1 and len(words["strong"]) > 40


def test_no_setting_keeps_prompts_that_join_a_minor_with_a_sexual_word():
    def reason(prompt, **settings):
        return find_reason(PairText("a", prompt, 1.0, 0.0), PairSource(source="x", **settings), WORDS)

    assert reason("a naked boy") == MINOR and reason("a naked boy", keep_sexual=True) == MINOR
    assert reason("a naked man") == SEXUAL and reason("a naked man", keep_sexual=True) == ""
    assert reason("a house", human_only=True) == NOT_HUMAN and reason("a house") == ""
