"""The labeller: what it reads, how it is saved, and that no run uses it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import hgdpo_core
from hgdpo_core.figures.foreign import foreign_prompts
from hgdpo_core.figures.labeller import (
    LENGTH,
    PADDING,
    UNKNOWN_WORD,
    Labeller,
    load_labeller,
    prefer_first,
    save_labeller,
)
from hgdpo_core.figures.make.labeller import LabellerWithKinds, known_words, labeller_loss
from hgdpo_core.figures.make.labeller_data import KINDS, VIEWS, sample_views
from hgdpo_core.figures.people import Figure
from hgdpo_core.scorers import SCORERS

ROOT = Path(hgdpo_core.__file__).parents[1]


@pytest.fixture(scope="module")
def labeller():
    torch.manual_seed(0)
    return Labeller(known_words()).eval()


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (2, 4, 64, 64, 3), dtype=np.uint8)


def test_it_reads_pairs_of_neighbouring_words(labeller):
    one, other = labeller.word_pairs(["a red cat, nowhere", "a cat"])
    ids = [labeller.ids[word] for word in ("a", "red", "cat", ",")]
    assert one[:5].tolist() == [*map(list, zip(ids, [*ids[1:], UNKNOWN_WORD], strict=True)), [UNKNOWN_WORD] * 2]
    assert one[5:].eq(PADDING).all() and other[2:].eq(PADDING).all() and one.shape == (LENGTH, 2)
    assert labeller.word_pairs([""]).eq(PADDING).all()
    assert labeller.word_pairs(["red " * 50]).ne(PADDING).all()  # cut


def test_it_knows_the_words_of_both_grammars_and_the_order_of_colours(labeller):
    texts = foreign_prompts("test", 200, seed=0)
    assert not (labeller.word_pairs(texts) == UNKNOWN_WORD)[..., 0].any()
    one, other = labeller.word_pairs(["a red house with a blue roof", "a blue house with a red roof"]).tolist()
    assert sorted(one) != sorted(other)


def test_swapped_images_swap_the_preference(labeller, images):
    texts = foreign_prompts("test", 4, seed=0)
    p = prefer_first(labeller, texts, *images)
    torch.testing.assert_close(prefer_first(labeller, texts, images[1], images[0]), 1 - p)
    assert prefer_first(labeller, texts, images[0], images[0]).tolist() == [0.5] * 4
    assert (prefer_first(labeller, texts[::-1], *images) != p).any()  # the caption counts


def test_it_is_saved_in_fp16_and_loads_the_same(labeller, images, tmp_path):
    save_labeller(labeller, tmp_path / "labeller")
    again = load_labeller(tmp_path / "labeller")
    texts = foreign_prompts("test", 4, seed=0)
    torch.testing.assert_close(prefer_first(again, texts, *images), prefer_first(labeller, texts, *images), rtol=0,
                               atol=0.01)
    assert json.loads((tmp_path / "labeller" / "config.json").read_text())["architecture"] == "labeller"
    assert {path.suffix for path in (tmp_path / "labeller").iterdir()} == {".json", ".safetensors"}


def test_it_learns_from_one_batch():
    torch.manual_seed(0)
    model = LabellerWithKinds(Labeller(known_words()))
    words, images = model.labeller.word_pairs(foreign_prompts("train", 4, seed=0) * 2), torch.randn(8, 3, 64, 64)
    kinds = torch.arange(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(12):
        loss = labeller_loss(model, words, images, kinds)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    # log 2 and half the log of the number of classes to begin with
    assert losses[0] == pytest.approx(np.log(2) + 0.5 * np.log(len(KINDS) + 1), abs=0.3)
    assert losses[-1] < 0.7 * losses[0]


def test_its_data_show_both_styles():
    views = sample_views("validation", 50, np.random.default_rng(0))
    assert np.bincount([view for view, _ in views]).tolist() == [20, 20, 10]
    assert all(isinstance(scene, Figure) == (VIEWS[view] != "still lives") for view, scene in views)


def test_only_the_stand_ins_use_it():
    assert "labeller" not in SCORERS
    using = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hgdpo_core").rglob("*.py")
             if re.search(r"import.*labeller|labeller_path|\.labeller\b", path.read_text())}
    assert {name for name in using if not name.startswith("hgdpo_core/figures/")} == {
        "hgdpo_core/pair_sets/stand_ins.py"}
