"""Tokenizers, checked before any work: without its vocabulary one loads in silence and reads all texts as the same."""

from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import CLIPTokenizer

from hgdpo_core.errors import ModelError, first_line
from hgdpo_core.models.hub import quiet_transformers

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
