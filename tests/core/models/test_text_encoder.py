"""Weighted and long prompts: plain when every weight is 1, moved as documented, the same wherever they are encoded."""

from pathlib import Path

import pytest
import torch

from hgdpo_core.config import TargetConfig
from hgdpo_core.errors import ConfigError
from hgdpo_core.models import find_model, load_pipeline
from hgdpo_core.models.sampling import encode_text
from hgdpo_core.models.text_encoder import COMMA_REACH, TextEncoder, split_chunks, weigh_embedding

PAPER = (Path(__file__).parents[2] / "golden" / "paper_prompts.txt").read_text().splitlines()
LENGTH = 24  # of the tiny text encoder: chunks of 22 tokens
COMMA = 7


@pytest.fixture(scope="module")
def pipeline(target_folder):
    """Its last norm gets a bias, as a trained one has: without it the mean of an embedding is zero."""
    loaded = load_pipeline(find_model(TargetConfig(source=str(target_folder), dtype="float32")))
    loaded.text_encoder.final_layer_norm.bias.data.fill_(-0.1)
    return loaded


def plain_text(pipeline, texts, clip_skip):
    return encode_text(pipeline.text_encoder, pipeline.tokenizer, texts, clip_skip)


def reader(pipeline, target_folder, **settings) -> TextEncoder:
    settings = {"source": str(target_folder), "dtype": "float32", "prompt_syntax": "a1111"} | settings
    return TextEncoder(pipeline.text_encoder, pipeline.tokenizer, find_model(TargetConfig(**settings)))


def tokens(count: int, commas: tuple[int, ...] = ()) -> list[tuple[int, float]]:
    return [(COMMA if location in commas else 100 + location, 1.0) for location in range(count)]


# -- chunks


@pytest.mark.parametrize(("commas", "cut"), [
    ((), 75),
    ((74,), 75),
    ((70,), 71),
    ((60, 64), 65),  # the last comma counts
    ((55,), 56),  # 20 tokens from the end: near enough
    ((54,), 75),  # one more: not
    ((70, 75), 75),  # the comma itself does not fit: nothing moves
])
def test_a_full_chunk_is_cut_at_a_near_comma(commas, cut):
    found = split_chunks([tokens(80, commas)], 75, COMMA)
    assert [len(chunk) for chunk in found] == [cut, 80 - cut]
    assert sum(found, []) == tokens(80, commas)
    assert COMMA_REACH == 20


def test_chunks_at_their_limits():
    assert [len(c) for c in split_chunks([tokens(75)], 75, COMMA)] == [75]
    assert [len(c) for c in split_chunks([tokens(76)], 75, COMMA)] == [75, 1]
    assert split_chunks([[]], 75, COMMA) == [[]]
    assert [len(c) for c in split_chunks([tokens(3), tokens(2)], 75, None)] == [3, 2]  # a BREAK
    assert [len(c) for c in split_chunks([[], tokens(2)], 75, None)] == [0, 2]  # one at the start makes an empty chunk
    assert [len(c) for c in split_chunks([tokens(2), []], 75, None)] == [2]  # one at the end does not


# -- weights


def test_weights_of_one_change_no_bit():
    for dtype in (torch.float32, torch.bfloat16):
        hidden = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
        assert torch.equal(weigh_embedding(hidden, torch.ones(2, 5)), hidden)


def test_weights_scale_their_rows_and_each_chunk_keeps_its_mean():
    hidden = torch.tensor([[[1.0, 3.0], [2.0, 2.0]], [[1.0, 1.0], [1.0, 1.0]]])
    found = weigh_embedding(hidden, torch.tensor([[1.0, 2.0], [1.0, 1.0]]))
    # By hand: rows (1, 3) and 2 * (2, 2) have mean 3, before it was 2: all of the chunk is scaled by 2 / 3.
    torch.testing.assert_close(found[0], torch.tensor([[2 / 3, 2.0], [8 / 3, 8 / 3]]))
    assert torch.equal(found[1], hidden[1])


def test_an_embedding_without_a_mean_is_weighted_and_not_scaled():
    hidden = torch.nn.functional.layer_norm(torch.randn(1, 24, 32, generator=torch.Generator().manual_seed(0)), (32,))
    weights = torch.linspace(0.5, 1.5, 24)[None]
    assert torch.equal(weigh_embedding(hidden, weights), hidden * weights[:, :, None])
    assert torch.equal(weigh_embedding(torch.zeros(1, 24, 32), weights), torch.zeros(1, 24, 32))


def test_a_short_prompt_without_weights_is_the_plain_one(pipeline, target_folder):
    for clip_skip in (None, 1):
        plain = plain_text(pipeline, ["a woman in a red top"], clip_skip)
        weighted = reader(pipeline, target_folder, clip_skip=clip_skip)
        for text in ("a woman in a red top", "(a woman:1.0) in a (red:1) top", "(a woman in a red top:1)"):
            (found,) = weighted.encode([text])
            assert torch.equal(found, plain[0]), (clip_skip, text)
    assert not torch.equal(plain, plain_text(pipeline, ["a woman in a red top"], None))


@pytest.mark.parametrize(("text", "weight"), [("(red:1.5)", 1.5), ("(red:0.5)", 0.5), ("[red]", 1 / 1.1)])
def test_a_weight_moves_its_own_tokens_against_the_others(pipeline, target_folder, text, weight):
    plain = reader(pipeline, target_folder).encode(["a woman in a red top"])[0]
    found = reader(pipeline, target_folder).encode([f"a woman in a {text} top"])[0]
    ratios = (found / plain).median(dim=1).values
    torch.testing.assert_close(found, plain * ratios[:, None])  # rows are scaled whole
    tokenizer = pipeline.tokenizer
    before = len(tokenizer("a woman in a").input_ids) - 1  # with the begin token, without the end token
    own = range(before, before + len(tokenizer("red", add_special_tokens=False).input_ids))
    others = [row for row in range(LENGTH) if row not in own]
    assert torch.allclose(ratios[others], ratios[0], rtol=1e-3)
    assert torch.allclose(ratios[list(own)] / ratios[0], torch.tensor(weight), rtol=1e-3)
    assert found.mean().item() == pytest.approx(plain.mean().item(), rel=1e-4)


def test_plain_text_keeps_its_brackets_and_is_cut(pipeline, target_folder):
    plain = reader(pipeline, target_folder, prompt_syntax="plain", negative_prompt="(blurry:1.4)")
    for text in ("(red:1.5) top", "a red top " * 40):
        assert torch.equal(plain.encode([text])[0], plain_text(pipeline, [text], None)[0])
    assert torch.equal(plain.negative(LENGTH), plain_text(pipeline, ["(blurry:1.4)"], None))


# -- length


def test_a_long_prompt_is_chunks_of_its_own(pipeline, target_folder):
    """BREAK puts the cut where we want it: each chunk is then the plain embedding of its words."""
    (found,) = reader(pipeline, target_folder).encode(["a woman BREAK in a red top"])
    expected = [plain_text(pipeline, [text], None)[0] for text in ("a woman", "in a red top")]
    torch.testing.assert_close(found, torch.cat(expected))
    (long,) = reader(pipeline, target_folder).encode(["a red top " * 22])
    ids = pipeline.tokenizer("a red top " * 22, add_special_tokens=False).input_ids
    assert len(long) == LENGTH * -(-len(ids) // (LENGTH - 2)) > LENGTH


def test_the_shorter_of_prompt_and_negative_prompt_is_padded_with_the_empty_text(pipeline, target_folder):
    empty = plain_text(pipeline, [""], None)[0]
    short = reader(pipeline, target_folder, negative_prompt="(blurry:1.4)")
    assert len(short.encode(["a man"])[0]) == LENGTH
    negative = short.negative(3 * LENGTH)[0]
    assert torch.equal(negative[:LENGTH], short.negative(LENGTH)[0])
    assert torch.equal(negative[LENGTH:], torch.cat([empty, empty]))
    assert not torch.equal(negative[:LENGTH], plain_text(pipeline, ["blurry"], None)[0])  # it is weighted too

    long = reader(pipeline, target_folder, negative_prompt="blurry BREAK bad BREAK ugly")
    (padded,) = long.encode(["a man"])
    assert torch.equal(padded, torch.cat([plain_text(pipeline, ["a man"], None)[0], empty, empty]))
    assert long.negative(3 * LENGTH).shape == (1, 3 * LENGTH, 32)


def test_neighbours_change_no_bit(pipeline, target_folder):
    encoder = reader(pipeline, target_folder)
    together = encoder.encode(PAPER[:3])
    assert all(torch.equal(encoder.encode([text])[0], found)
               for text, found in zip(PAPER[:3], together, strict=True))


def test_every_prompt_of_the_paper_and_one_of_10_000_characters_is_encoded(pipeline, target_folder):
    found = reader(pipeline, target_folder, clip_skip=1).encode([*PAPER, "x, " * 3333])
    assert all(len(embed) % LENGTH == 0 and bool(torch.isfinite(embed).all()) for embed in found)
    assert len({embed.numpy().tobytes() for embed in found}) == 26
    assert reader(pipeline, target_folder).encode([]) == []


def test_skipping_more_layers_than_there_are_is_refused(pipeline, target_folder):
    with pytest.raises(ConfigError, match="clip_skip is 3, but the text encoder of target has 2 layers"):
        reader(pipeline, target_folder, clip_skip=3)


# -- what an id is made of


def test_syntax_enters_an_identity_only_where_it_matters(target_folder):
    def model(**settings):
        return find_model(TargetConfig(source=str(target_folder), dtype="float32", **settings))

    assert set(model().identity()) == {"fingerprint", "dtype", "negative_prompt", "clip_skip", "lora"}
    assert model(prompt_syntax="a1111").syntax() == {"prompt_syntax": "a1111"}
    negative = model(prompt_syntax="a1111", negative_prompt="(bad:1.4)")
    assert negative.syntax() == {"prompt_syntax": "a1111", "negative_syntax": "a1111"}
    # An evaluation reads its prompts plainly, and the negative prompt as ever.
    assert negative.reading("plain").syntax() == {"negative_syntax": "a1111"}
    assert model(prompt_syntax="a1111").reading("plain").identity() == model().identity()
