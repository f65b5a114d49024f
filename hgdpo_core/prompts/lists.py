"""Prompts: read, checked, numbered and kept in the store exactly as written."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

import pyarrow as pa

from hgdpo_core import built_in
from hgdpo_core.config import PromptSource
from hgdpo_core.config.base import content_hash
from hgdpo_core.errors import InputError
from hgdpo_core.progress import count_of
from hgdpo_core.prompts.samples import sample_key
from hgdpo_core.prompts.sources import read_texts
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import read_table, write_table

MAX_PROMPT_CHARACTERS = 10_000
LONG_PROMPT_CHARACTERS = 2_000
SCHEMA = pa.schema([("prompt_id", pa.string()), ("prompt", pa.string())])


def prompt_id(prompt: str) -> str:
    """First 16 hex digits of the sha256 of the exact UTF-8 text; of a `Sample`, of text, zero byte and concept."""
    return hashlib.sha256(sample_key(prompt).encode()).hexdigest()[:16]


def image_seed(run_seed: int, prompt: str, index: int) -> int:
    """Seed of candidate `index` (0-based j) of a prompt: 63 bits, the same in every shard, batch and worker."""
    digest = hashlib.sha256(f"{run_seed}\0{sample_key(prompt)}\0{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True)
class PromptList:
    """Distinct, non-empty prompts in their order. Every row that is not used is counted by its reason."""

    prompts: tuple[str, ...]
    duplicates: tuple[str, ...] = ()
    empty: int = 0
    remark: str = ""
    other_category: int = 0
    beyond_limit: int = 0

    @property
    def id(self) -> str:
        """Readable id: the count and a hash of the exact texts."""
        return f"{len(self.prompts)}-{content_hash(list(self.prompts))}"

    def describe(self) -> str:
        """One line: how many are used, what was dropped, and remarks on the rest."""
        first = f" (the first: {self.duplicates[0]!r:.80})" if self.duplicates else ""
        reasons = {"empty": self.empty, f"duplicate{first}": len(self.duplicates),
                   "of another category": self.other_category, "beyond the limit": self.beyond_limit}
        dropped = [f"{count} {reason}" for reason, count in reasons.items() if count]
        parts = [count_of(len(self.prompts), "prompt")] + ([f"dropped {' and '.join(dropped)}"] if dropped else [])
        long = [len(prompt) for prompt in self.prompts if len(prompt) > LONG_PROMPT_CHARACTERS]
        if long:
            parts.append(f"{len(long)} of over {LONG_PROMPT_CHARACTERS} characters, the longest {max(long)}: a plain "
                         "prompt is cut at the text encoder's 77 tokens, an a1111 one is read in chunks")
        return "; ".join(parts + ([self.remark] if self.remark else []))


def read_prompts(source: PromptSource, store: Store | None = None) -> PromptList:
    """The prompts of a source, in order; a copy of a remote one is kept in `store`.

    InputError if there is none, or the source cannot be used; StorageError for a remote one out of reach.
    """
    if built_in.is_any_built_in(source.source):
        return PromptList(built_in.read_prompts(source.source, source.split, source.limit))
    found = read_texts(source, store)
    result = replace(clean_prompts(found.texts), remark=found.remark, other_category=found.other_category)
    if source.limit is not None:
        result = replace(result, prompts=result.prompts[: source.limit],
                         beyond_limit=max(0, len(result.prompts) - source.limit))
    if not result.prompts:
        raise InputError(f"{source.source} holds no prompt: expected at least one line or row with text")
    return result


def clean_prompts(texts: Iterable[str]) -> PromptList:
    """Drop empty and repeated texts, keep the rest exactly as written."""
    kept: dict[str, None] = {}
    duplicates: list[str] = []
    empty = 0
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            empty += 1
        elif len(text) > MAX_PROMPT_CHARACTERS:
            raise InputError(f"prompt {number} has {len(text)} characters; at most {MAX_PROMPT_CHARACTERS} are "
                             "taken, because no text encoder reads more: is this file a list of prompts?")
        elif text in kept:
            duplicates.append(text)
        else:
            kept[text] = None
    return PromptList(tuple(kept), tuple(duplicates), empty)


def save_prompts(store: Store, prompts: PromptList) -> str:
    """Write the list to `prompts/<id>/prompts.parquet` once; returns the id."""
    key = f"prompts/{prompts.id}/prompts.parquet"
    if not store.exists(key):
        write_table(store, key, pa.table({"prompt_id": [prompt_id(prompt) for prompt in prompts.prompts],
                                          "prompt": list(prompts.prompts)}, schema=SCHEMA))
    return prompts.id


def load_prompts(store: Store, prompts_id: str) -> PromptList:
    """The list that `save_prompts` wrote."""
    return PromptList(tuple(read_table(store, f"prompts/{prompts_id}/prompts.parquet")["prompt"].to_pylist()))
