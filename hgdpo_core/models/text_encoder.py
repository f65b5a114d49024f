"""Prompts to text embeddings, as a target reads them: syntax, chunks, weights, clip skip and negative prompt.

A plain prompt is one chunk of the text encoder's length (77 tokens), cut there, as diffusers does it. An A1111 prompt
is as many chunks as it needs, each with its own begin and end token. Prompts and negative prompt must be of one length
in the UNet: the shorter is padded with chunks of the empty text. A prompt's embedding depends on the target's settings
and on its text alone, never on its neighbours, so training can condition on exactly what the sampler used.
"""

from collections.abc import Sequence
from typing import Any

import torch

from hgdpo_core.config import PromptSyntax
from hgdpo_core.errors import ConfigError
from hgdpo_core.models.model import Model
from hgdpo_core.models.sampling import Hidden, encode_text, hidden_states, token_ids
from hgdpo_core.models.tokenizers import single_token
from hgdpo_core.prompts.syntax import Segment, parse_weights

COMMA_REACH = 20  # A1111's "comma padding backtrack": a full chunk is cut at a comma this near to its end
NO_MEAN = 1e-4  # of the root mean square; that of SD 1.5's text encoder is far larger

Token = tuple[int, float]
"""Id and weight."""


class TextEncoder:
    """A text encoder of a loaded pipeline under a target's settings."""

    def __init__(self, encoder: Any, tokenizer: Any, model: Model, hidden: Hidden = hidden_states):
        """ConfigError when the encoder has fewer layers than `clip_skip` skips."""
        self.model = model
        self._encoder, self._tokenizer, self._hidden = encoder, tokenizer, hidden
        layers = self._encoder.config.num_hidden_layers
        if model.clip_skip is not None and model.clip_skip > layers:
            raise ConfigError(f"target.clip_skip is {model.clip_skip}, but the text encoder of {model.path.name} has "
                              f"{layers} layers: skip fewer (it counts as diffusers does: 1 is A1111's Clip skip 2)")
        self.chunk_length: int = self._tokenizer.model_max_length
        self._comma = self._tokenizer.get_vocab().get(",</w>")
        self._negative = self._encode([model.negative_prompt], model.negative_syntax)[0]
        self._empty: torch.Tensor | None = None

    def encode(self, prompts: Sequence[str]) -> list[torch.Tensor]:
        """One embedding [K * 77, D] per prompt, in the encoder's precision; K is no less than the negative prompt's."""
        embeds = self._encode(prompts, self.model.prompt_syntax)
        return [self._pad(embed, len(self._negative)) for embed in embeds]

    def negative(self, length: int) -> torch.Tensor:
        """The negative prompt's embedding [1, length, D], to pair with prompts of that length."""
        return self._pad(self._negative, length)[None]

    def encode_plain(self, texts: Sequence[str]) -> torch.Tensor:
        """[B, 77, D] of plain texts, cut there."""
        return encode_text(self._encoder, self._tokenizer, texts, self.model.clip_skip, self._hidden)

    def first_ids(self, prompts: Sequence[str], syntax: PromptSyntax) -> torch.Tensor:
        """Token ids [B, 77] of each prompt's first chunk, on the encoder's device."""
        if syntax == "plain":
            return token_ids(self._encoder, self._tokenizer, prompts)
        ids = [self._frame(self._split(prompt)[0])[0] for prompt in prompts]
        return torch.tensor(ids, device=self._encoder.device)

    def _encode(self, prompts: Sequence[str], syntax: PromptSyntax) -> list[torch.Tensor]:
        if syntax == "plain":
            return list(self.encode_plain(prompts)) if prompts else []
        return [self._encode_weighted(prompt) for prompt in prompts]

    def token_ids(self, prompt: str) -> list[int]:
        """The id behind each row of a prompt's embedding, as long as that is."""
        if self.model.prompt_syntax == "plain":
            ids = self._tokenizer(prompt, padding="max_length", max_length=self.chunk_length, truncation=True).input_ids
        else:
            ids = [token for chunk in self._frames(prompt)[0] for token in chunk]
        return ids + [self._tokenizer.pad_token_id] * (len(self._negative) - len(ids))

    def single_token(self, word: str) -> int:
        """The id of a word that is one token; ModelError for one that is more, or unknown."""
        return single_token(self._tokenizer, word)

    def _frames(self, prompt: str) -> tuple[Sequence[list[int]], Sequence[list[float]]]:
        """Ids and weights of each chunk of a weighted prompt."""
        ids, weights = zip(*(self._frame(chunk) for chunk in self._split(prompt)), strict=True)
        return ids, weights

    @torch.no_grad()
    def _encode_weighted(self, prompt: str) -> torch.Tensor:
        ids, weights = self._frames(prompt)
        device = self._encoder.device
        hidden = self._hidden(self._encoder, torch.tensor(ids, device=device), self.model.clip_skip)
        return weigh_embedding(hidden, torch.tensor(weights, device=device)).flatten(0, 1)

    def _split(self, prompt: str) -> list[list[Token]]:
        """The prompt's chunks."""
        parts = [self._tokenize(part) for part in parse_weights(prompt)]
        return split_chunks(parts, self.chunk_length - 2, self._comma)

    def _tokenize(self, part: Sequence[Segment]) -> list[Token]:
        ids = self._tokenizer([segment.text for segment in part], add_special_tokens=False,
                              verbose=False).input_ids if part else []
        return [(token, segment.weight) for segment, found in zip(part, ids, strict=True) for token in found]

    def _frame(self, chunk: Sequence[Token]) -> tuple[list[int], list[float]]:
        """Ids and weights of the encoder's length, between begin and end token, padded as the tokenizer pads."""
        ids = [self._tokenizer.bos_token_id, *(token for token, _ in chunk), self._tokenizer.eos_token_id]
        ids += [self._tokenizer.pad_token_id] * (self.chunk_length - len(ids))
        weights = [1.0, *(weight for _, weight in chunk)]
        return ids, weights + [1.0] * (self.chunk_length - len(weights))

    def _pad(self, embed: torch.Tensor, length: int) -> torch.Tensor:
        missing = (length - len(embed)) // self.chunk_length
        if missing <= 0:
            return embed
        if self._empty is None:
            self._empty = self.encode_plain([""])[0]
        return torch.cat([embed, *[self._empty] * missing])


def split_chunks(parts: Sequence[Sequence[Token]], size: int, comma: int | None) -> list[list[Token]]:
    """Tokens in chunks of at most `size`, as A1111 cuts them; a new part (after a BREAK) begins a new chunk.

    A full chunk ends behind its last comma if that is among its last COMMA_REACH tokens and no comma follows.
    """
    chunks: list[list[Token]] = []
    for number, part in enumerate(parts):
        chunk: list[Token] = []
        for token in part:
            if len(chunk) == size:
                end = size if token[0] == comma else _end_of_chunk(chunk, comma)
                chunks.append(chunk[:end])
                chunk = chunk[end:]
            chunk.append(token)
        if chunk or not chunks or number < len(parts) - 1:
            chunks.append(chunk)
    return chunks


def _end_of_chunk(chunk: Sequence[Token], comma: int | None) -> int:
    near = range(len(chunk) - 1, max(len(chunk) - COMMA_REACH, 0) - 1, -1)
    return next((position + 1 for position in near if chunk[position][0] == comma), len(chunk))


def weigh_embedding(hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Hidden states [K, L, D] times weights [K, L], each chunk then scaled so that its mean is what it was.

    In float32, returned in the precision of `hidden`; weights of 1 change no bit. A chunk whose weighted mean is mere
    rounding keeps its scale: an untrained encoder ends in a norm without bias, where every row's mean is zero.
    """
    full = hidden.float()
    weighted = full * weights[:, :, None].float()
    mean = weighted.mean(dim=(1, 2), keepdim=True)
    size = weighted.square().mean(dim=(1, 2), keepdim=True).sqrt()
    scale = torch.where(mean.abs() > NO_MEAN * size, full.mean(dim=(1, 2), keepdim=True) / mean, 1.0)
    return (weighted * scale).to(hidden.dtype)
