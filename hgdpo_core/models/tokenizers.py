"""Tokenizers, checked before any work: without its vocabulary one loads in silence and reads all texts as the same."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import CLIPTextConfig, CLIPTokenizer

from hgdpo_core.config import PromptSyntax
from hgdpo_core.errors import ModelError, first_line
from hgdpo_core.models.hub import quiet_transformers
from hgdpo_core.models.weight_files import read_config
from hgdpo_core.prompts.syntax import parse_weights

TEXTS = ("a woman in a red top", "a child at a big bus")  # words of the same lengths: unknown ones would be equal


def load_clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """The CLIP tokenizer of a folder; ModelError where there is none."""
    try:
        with quiet_transformers():
            return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises plain Exception
        raise ModelError(f"{folder} holds no CLIP tokenizer: {first_line(error)}") from None


def check_tokenizer(path: Path, ids: Callable[[str], Sequence[int]], vocabulary: int | None) -> None:
    """ModelError where two texts have the same ids, or an id that the text encoder's `vocabulary` does not hold."""
    first, second = (list(ids(text)) for text in TEXTS)
    if first == second:
        raise ModelError(f"the tokenizer in {path} reads {TEXTS[0]!r} and {TEXTS[1]!r} as the same: its "
                         "vocabulary (vocab.json and merges.txt, vocab.txt or tokenizer.json) is missing or empty; get "
                         "it whole")
    largest = max(*first, *second)
    if vocabulary is not None and largest >= vocabulary:
        raise ModelError(f"the tokenizer in {path} gives the id {largest}, the text encoder has {vocabulary}: "
                         "put the tokenizer there that the text encoder was trained with")


def single_token(tokenizer: Any, word: str) -> int:
    """The id of a word that is one token; ModelError for one that is more, or unknown."""
    ids = tokenizer(word, add_special_tokens=False).input_ids
    if len(ids) != 1 or ids[0] in tokenizer.all_special_ids:
        raise ModelError(f"{word!r} is {len(ids)} tokens of this text encoder, or unknown: expected a word that is "
                         "one token of its own")
    return ids[0]


def word_reader(configs: Path, syntax: PromptSyntax, word: str) -> Callable[[str], bool]:
    """Whether a prompt of a syntax has a word of one token where the text encoder of `configs` reads it."""
    tokenizer = load_clip_tokenizer(configs / "tokenizer")
    token = single_token(tokenizer, word)
    encoder = CLIPTextConfig(**read_config(configs / "text_encoder" / "config.json"))  # some leave defaults out
    longest = encoder.max_position_embeddings - 2  # begin and end

    def has_word(prompt: str) -> bool:
        if syntax == "plain":
            # Not cut by the tokenizer: that would change it, and several threads read.
            return token in tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids[:longest]
        texts = [segment.text for part in parse_weights(prompt) for segment in part]
        return any(token in ids for ids in tokenizer(texts, add_special_tokens=False, verbose=False).input_ids)

    return has_word
