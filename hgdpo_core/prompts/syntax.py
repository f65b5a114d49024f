r"""Prompts with weights, as AUTOMATIC1111's web UI reads them; text in, weighted text out.

| written          | read                                                           |
|------------------|----------------------------------------------------------------|
| `(words)`        | weight 1.1; nested brackets multiply                           |
| `(words:1.3)`    | weight 1.3                                                     |
| `[words]`        | weight 1 / 1.1                                                 |
| `\(` `\[` `\\`   | the character itself                                           |
| `BREAK`          | what follows begins a new chunk of tokens                      |
| `<lora:name:1>`  | nothing: a network's tag, taken out before the text is read    |

A bracket that is never closed weighs to the end; a closing one that was never opened is text. Where A1111 reads a
BREAK inside weighted brackets as a word, we break. Prompt editing `[a:b:0.5]`, alternation `[a|b]` and `AND`, which
change the prompt between two steps of sampling, are not carried out: see `describe_unread`.
"""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

from hgdpo_core.config import PromptSyntax
from hgdpo_core.errors import InputError

ROUND_WEIGHT = 1.1
SQUARE_WEIGHT = 1 / 1.1

_PIECE = re.compile(r"""
      \\ (?P<escaped> [()\[\]\\]? )               # a backslash before anything else vanishes
    | : \s* (?P<weight> [+-]?[.\d]+ ) \s* \)
    | (?P<bracket> [()\[\]] )
    | [^\\()\[\]:]+
    | :
""", re.VERBOSE)
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_NETWORK = re.compile(r"<\w+:[^>]+>")
_CLIP_SKIP = re.compile(r"clip[ _]skip\s*:?\s*\d", re.IGNORECASE)
CLIP_SKIP_COUNTS = ("what A1111 calls Clip skip 2 is target.clip_skip=1 here (Clip skip 1, its default, is none): it "
                    "counts as diffusers does")
_STEP_BY_STEP = re.compile(r"(?<!\\)\[[^\[\]]*[:|][^\[\]]*\]|\bAND\b")
_UNREAD = {_NETWORK: "networks such as <lora:...>, which are left out",
           _STEP_BY_STEP: "[a:b:0.5], [a|b] or AND, whose words are read as plain text",
           _CLIP_SKIP: "a clip skip, which is read as text"}


class Segment(NamedTuple):
    """Text and its weight."""

    text: str
    weight: float


def parse_weights(text: str) -> list[list[Segment]]:
    """The segments of an A1111 prompt, one list for each part between BREAKs (so at least one list).

    Neighbours of equal weight are one segment. InputError for a weight that is not a number, such as `(words:1.2.3)`.
    """
    pieces: list[Segment | None] = []  # None: a BREAK
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def weigh(first: int, weight: float) -> None:
        pieces[first:] = [piece and Segment(piece.text, piece.weight * weight) for piece in pieces[first:]]

    for found in _PIECE.finditer(_NETWORK.sub("", text)):
        bracket = found["bracket"]
        if found["escaped"] is not None:
            pieces.append(Segment(found["escaped"], 1.0))
        elif bracket in opened:
            opened[bracket].append(len(pieces))
        elif found["weight"] is not None and opened["("]:
            weigh(opened["("].pop(), _number(found["weight"], text))
        elif bracket == ")" and opened["("]:
            weigh(opened["("].pop(), ROUND_WEIGHT)
        elif bracket == "]" and opened["["]:
            weigh(opened["["].pop(), SQUARE_WEIGHT)
        else:
            first, *others = _BREAK.split(found[0])
            pieces.append(Segment(first, 1.0))
            for part in others:
                pieces += [None, Segment(part, 1.0)]
    for first in opened["("]:
        weigh(first, ROUND_WEIGHT)
    for first in opened["["]:
        weigh(first, SQUARE_WEIGHT)
    return _merge(pieces)


def strip_syntax(text: str, syntax: PromptSyntax) -> str:
    """The words of a prompt without brackets, weights and escapes, as a scorer reads them; plain text as it is."""
    if syntax == "plain":
        return text
    return " ".join("".join(segment.text for segment in part) for part in parse_weights(text))


def check_syntax(prompts: Iterable[str], syntax: PromptSyntax) -> None:
    """InputError, naming the prompt, for the first that cannot be read."""
    if syntax == "a1111":
        for prompt in prompts:
            parse_weights(prompt)


def describe_unread(prompts: Iterable[str], syntax: PromptSyntax) -> str:
    """One line on what A1111 itself would do with these prompts and this project does not; empty if there is none."""
    if syntax == "plain":
        return ""
    texts, remarks = list(prompts), []
    for pattern, what in _UNREAD.items():
        if found := [text for text in texts if pattern.search(text)]:
            remarks.append(f"{len(found)} of the prompts with {what} (the first: {found[0]!r:.80})")
    return "; ".join([*remarks, CLIP_SKIP_COUNTS] if remarks else [])


def _number(weight: str, text: str) -> float:
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"the prompt {text!r:.120} has the weight {weight:.20}: expected a number, as in "
                         "(words:1.2); write \\( and \\) for brackets that are meant")
    return value


def _merge(pieces: list[Segment | None]) -> list[list[Segment]]:
    parts: list[list[Segment]] = [[]]
    for piece in pieces:
        if piece is None:
            parts.append([])
        elif parts[-1] and parts[-1][-1].weight == piece.weight:
            parts[-1][-1] = Segment(parts[-1][-1].text + piece.text, piece.weight)
        else:
            parts[-1].append(piece)
    return parts
