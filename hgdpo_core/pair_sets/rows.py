"""One row of a data set of pairs: what its texts say, and why it is not used.

A row is refused by its texts first, so that no image of a refused prompt is ever decoded.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from hgdpo_core.config.pair_source import PairSource
from hgdpo_core.pair_sets.words import WordFilter

NO_PROMPT = "it has no prompt"
MINOR = "its prompt joins a minor with a sexual word"
SEXUAL = "its prompt is sexual"
NO_LABEL = "it has no label"
SAME_IMAGES = "its images are not different"
TIE = "it is a tie"
BAD_LABEL = "its label names no winner"
NOT_HUMAN = "its prompt is not about people"
NO_IMAGE = "an image is missing"
UNDECODABLE = "an image does not decode"
TOO_SMALL = "an image would be scaled over two times"
UNREADABLE = "its row cannot be read"
REASONS = (UNREADABLE, NO_PROMPT, MINOR, NO_LABEL, SAME_IMAGES, TIE, BAD_LABEL, SEXUAL, NOT_HUMAN, NO_IMAGE,
           UNDECODABLE, TOO_SMALL)
"""In the order in which they are looked for; a row counts under the first."""


class PairText(NamedTuple):
    """A row without its images."""

    name: str
    """Its place in the data set, as `data/train-00000.parquet#17`."""
    prompt: str | None
    label_0: float | None
    """1 where image 0 wins, 0 where image 1 does."""
    label_1: float | None = None
    has_label: bool = True
    are_different: bool = True
    uids: tuple[str, str] = ("", "")
    models: tuple[str | None, str | None] = (None, None)
    problem: str = ""
    """Why the row cannot be read."""

    @property
    def winner(self) -> int:
        """The number of the better image; for a row that `find_reason` lets through."""
        return 0 if self.label_0 == 1 else 1


def find_reason(text: PairText, source: PairSource, words: WordFilter) -> str:
    """Why a pair is not used, one of REASONS; "" where its texts allow it."""
    if text.problem:
        return UNREADABLE
    if not (text.prompt or "").strip():
        return NO_PROMPT
    prompt = text.prompt or ""
    safety = words.check_safety(prompt)
    if safety == "minor":
        return MINOR
    if reason := _label_reason(text):
        return reason
    if safety and not source.keep_sexual:
        return SEXUAL
    return NOT_HUMAN if source.human_only and not words.is_human(prompt) else ""


def _label_reason(text: PairText) -> str:
    """A label of exactly 0 or 1 names a winner. Public trainers that test only `label_0 == 0` train ties as wins."""
    if not text.has_label or text.label_0 is None:
        return NO_LABEL
    if not text.are_different:
        return SAME_IMAGES
    if text.label_0 == 0.5:
        return TIE
    opposite = text.label_1 is None or text.label_1 == 1 - text.label_0
    return "" if text.label_0 in (0, 1) and opposite else BAD_LABEL


def read_pick_a_pic(row: Mapping[str, Any], name: str) -> PairText:
    """A row with the columns of Pick-a-Pic v2 (`yuvalkirstain/pickapic_v2`); columns beyond caption and label_0 may be
    missing.
    """
    prompt, labels = row.get("caption"), [row.get("label_0"), row.get("label_1")]
    problem = ""
    if not isinstance(prompt, str | None):
        problem = f"caption is not text: {prompt!r:.80}"
    elif wrong := [label for label in labels if not isinstance(label, int | float | None) or isinstance(label, bool)]:
        problem = f"a label is not a number: {wrong[0]!r:.80}"
    if problem:
        return PairText(name, None, None, problem=problem)
    # pandas writes a missing number as NaN
    numbers = [None if label is None or math.isnan(label) else float(label) for label in labels]
    return PairText(name, prompt, *numbers, has_label=row.get("has_label", True) is True,
                    are_different=row.get("are_different", True) is True,
                    uids=(_text(row.get("image_0_uid")) or f"{name}-0", _text(row.get("image_1_uid")) or f"{name}-1"),
                    models=(_text(row.get("model_0")), _text(row.get("model_1"))))


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
