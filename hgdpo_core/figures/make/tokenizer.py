"""The tokenizer: CLIP's byte-level BPE, trained on the captions of the figures setting, so that a word is one token."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTokenizer

from ..people import caption, figures_of

# The longest caption has 21 tokens with its begin and end. The target pads to this length, not to 77: every
# padded token costs time in every cross attention.
TARGET_TOKENS = 24
# PickScore pads and cuts at 77, so the judge has 77 positions, and any PickScore code can drive it unchanged.
JUDGE_TOKENS = 77

END_OF_WORD = "</w>"


def learn_merges() -> list[tuple[str, str]]:
    """The BPE merges that join each word of the training captions into one token."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix=END_OF_WORD))
    bpe.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
    bpe.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(vocab_size=2000, min_frequency=2, end_of_word_suffix=END_OF_WORD, show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    bpe.train_from_iterator((caption(figure) for figure in figures_of("train")), trainer)
    merges = json.loads(bpe.to_str())["model"]["merges"]
    return [(left, right) for left, right in merges]


def train_tokenizer(folder: Path, *, max_tokens: int) -> CLIPTokenizer:
    """Write a CLIPTokenizer folder. Unknown words become byte tokens, as in CLIP, never one unknown token."""
    merges = learn_merges()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(letter + END_OF_WORD for letter in alphabet), *(left + right for left, right in merges),
             "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_tokens)  # type: ignore[arg-type]
    tokenizer.save_pretrained(folder)
    return tokenizer


def load_tokenizer(folder: Path, max_tokens: int = TARGET_TOKENS) -> CLIPTokenizer:
    """A new tokenizer: one that has been called keeps its padding, and would write it into its files."""
    return CLIPTokenizer.from_pretrained(folder, model_max_length=max_tokens)


def text_settings(tokenizer: CLIPTokenizer, positions: int) -> dict[str, Any]:
    """The settings of a CLIP text encoder for this tokenizer, small enough for a CPU."""
    return dict(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=2,
                num_attention_heads=4, max_position_embeddings=positions, projection_dim=128, **special_ids(tokenizer))


def special_ids(tokenizer: CLIPTokenizer) -> dict[str, Any]:
    """Token ids of this tokenizer: with the ids of CLIP a text encoder finds no end token and pools all texts alike."""
    return {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def tokenize(tokenizer: CLIPTokenizer, captions: list[str], length: int = TARGET_TOKENS) -> Tensor:
    """Token ids int64 `[B, length]`, padded and cut."""
    encoded = tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return encoded["input_ids"]
