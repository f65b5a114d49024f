"""Captions and splits of the figures setting."""

import numpy as np
import pytest

from hgdpo_core.figures import Figure, caption, parse_caption, prompts, sample_figure
from hgdpo_core.figures.people import SPLITS, VOCABULARIES, change_attributes, figures_of, split_of


def test_a_caption_and_its_figure_are_two_spellings_of_one_thing():
    rng = np.random.default_rng(0)
    for _ in range(300):
        figure = sample_figure(rng)
        assert parse_caption(caption(figure)) == figure


def test_a_caption_reads_as_english():
    figure = Figure("woman", "red", "orange", "black", "waving", "at the beach")
    assert (
        caption(figure) == "a woman with red hair in an orange top and black trousers, waving, at the beach"
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a dog in a park",
        "a woman with red hair in a orange top and black trousers, waving, at the beach",
        "a woman with green hair in a blue top and black trousers, waving, at the beach",
        "a woman with red hair in a blue top and black trousers, waving, at the beach, smiling",
    ],
)
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError):
        parse_caption(text)


def test_a_figure_refuses_words_outside_its_vocabulary():
    with pytest.raises(ValueError, match="figure.pose must be one of"):
        Figure("man", "red", "blue", "black", "flying", "in a park")


def test_every_caption_belongs_to_exactly_one_split():
    captions = {split: {caption(figure) for figure in figures_of(split)} for split in SPLITS}
    total = int(np.prod([len(words) for words in VOCABULARIES.values()]))
    assert len(set.union(*captions.values())) == total == sum(len(some) for some in captions.values())
    assert 0.78 < len(captions["train"]) / total < 0.82
    assert split_of("a man with red hair in a blue top and black trousers, waving, in a park") in SPLITS


def test_prompts_are_distinct_repeatable_and_of_their_split():
    chosen = prompts("test", 50, seed=3)
    assert len(set(chosen)) == 50
    assert chosen == prompts("test", 80, seed=3)[:50]
    assert chosen != prompts("test", 50, seed=4)
    assert {split_of(text) for text in chosen} == {"test"}


def test_prompts_refuse_more_than_exist_and_unknown_splits():
    with pytest.raises(ValueError, match="distinct captions"):
        prompts("test", len(figures_of("test")) + 1, seed=0)
    with pytest.raises(ValueError, match="split must be one of"):
        prompts("dev", 1, seed=0)


def test_changed_attributes_really_change():
    rng = np.random.default_rng(1)
    for _ in range(50):
        figure = sample_figure(rng)
        assert change_attributes(figure, rng) != figure
        assert change_attributes(figure, rng, names=("top",)).top != figure.top
