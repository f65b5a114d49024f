"""Which prompts are about people, and which are dropped for safety: lists of words, `human_words.json`.

Ours: the paper (arXiv:2405.20216v1, Table 1) names "only human images" of public data sets and gives no rule. The words
were tuned on PartiPrompts, where 153 of 177 prompts about people are found, and 6 of 1 455 others.
"""

import functools
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal

Safety = Literal["minor", "sexual", ""]
"""Why a prompt is dropped: it joins a minor with a sexual word; a sexual word alone; not at all."""


@dataclass(frozen=True)
class WordFilter:
    """The lists as patterns; each is searched in a text as `normalise` returns it."""

    version: int
    """Enters the ids of data sets: other words give other pairs."""
    remove: re.Pattern[str]
    strong: re.Pattern[str]
    role: re.Pattern[str]
    guard: re.Pattern[str]
    minor: re.Pattern[str]
    sexual: re.Pattern[str]

    def is_human(self, prompt: str) -> bool:
        """Whether a prompt is about people: a strong word, or a role and no word that guards against it."""
        text = self.remove.sub(" ", normalise(prompt))
        return bool(self.strong.search(text) or (self.role.search(text) and not self.guard.search(text)))

    def check_safety(self, prompt: str) -> Safety:
        """"minor" where a prompt joins a word for a minor with a sexual one, "sexual" where it has the latter alone."""
        text = normalise(prompt)
        if not self.sexual.search(text):
            return ""
        return "minor" if self.minor.search(text) else "sexual"


def normalise(prompt: str) -> str:
    """NFKC, then casefold: full-width letters and capitals are the plain ones."""
    return unicodedata.normalize("NFKC", prompt).casefold()


@functools.cache
def load_words() -> WordFilter:
    """The lists that ship with this package."""
    words = json.loads(files("hgdpo_core.pair_sets").joinpath("human_words.json").read_text(encoding="utf-8"))
    plural, safety = words["plural_suffix_of_role_and_guard"], words["safety"]
    return WordFilter(words["version"], re.compile(words["remove_first"]), _whole_words(words["strong"]),
                      _whole_words(words["role"], plural), _whole_words(words["guard"], plural),
                      re.compile(safety["minor"]), re.compile(safety["sexual"]))


def _whole_words(words: Sequence[str], suffix: str = "") -> re.Pattern[str]:
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, words))}){suffix}\b")
