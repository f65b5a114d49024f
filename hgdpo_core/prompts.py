"""Prompts as people keep them: read, checked, numbered and kept in the store exactly as written."""

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from hgdpo_core.config import PromptSource, content_hash
from hgdpo_core.errors import InputError
from hgdpo_core.shards import read_table, write_table
from hgdpo_core.storage import Store

FORMATS = (".txt", ".csv", ".tsv", ".jsonl", ".parquet")
COLUMNS = ("prompt", "Prompt", "caption", "text")
MAX_PROMPT_CHARACTERS = 10_000
SCHEMA = pa.schema([("prompt_id", pa.string()), ("prompt", pa.string())])


def prompt_id(prompt: str) -> str:
    """First 16 hex digits of the sha256 of the exact UTF-8 text."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def image_seed(run_seed: int, prompt: str, index: int) -> int:
    """Seed of candidate `index` (0-based j) of a prompt: 63 bits, the same whatever shard, batch or worker draws it."""
    digest = hashlib.sha256(f"{run_seed}\0{prompt}\0{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True)
class PromptList:
    """Distinct, non-empty prompts in their order, and what was left out on the way."""

    prompts: tuple[str, ...]
    duplicates: tuple[str, ...] = ()
    empty: int = 0

    @property
    def id(self) -> str:
        """Readable id: the count and a hash of the exact texts."""
        return f"{len(self.prompts)}-{content_hash(list(self.prompts))}"

    def describe(self) -> str:
        """One line: how many are used and what was dropped."""
        dropped = [f"{self.empty} empty"] if self.empty else []
        if self.duplicates:
            dropped.append(f"{len(self.duplicates)} duplicate (the first: {self.duplicates[0]!r:.80})")
        return f"{len(self.prompts)} prompts" + (f"; dropped {' and '.join(dropped)}" if dropped else "")


def read_prompts(source: PromptSource) -> PromptList:
    """The prompts of a source, in order. InputError if there is none, or the file is not one that can be read."""
    if source.source == "figures":
        return _figures_prompts(source)
    texts = _read_texts(source)
    result = clean_prompts(texts)
    if source.limit is not None:
        result = PromptList(result.prompts[: source.limit], result.duplicates, result.empty)
    if not result.prompts:
        raise InputError(f"{source.source} holds no prompt: expected at least one line or row with text")
    return result


def clean_prompts(texts: Iterable[str]) -> PromptList:
    """Drop empty and repeated texts, keep the rest to the letter."""
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
        write_table(store, key, prompt_table(prompts.prompts))
    return prompts.id


def load_prompts(store: Store, prompts_id: str) -> PromptList:
    """The list that `save_prompts` wrote."""
    return PromptList(tuple(read_table(store, f"prompts/{prompts_id}/prompts.parquet")["prompt"].to_pylist()))


def prompt_table(prompts: Sequence[str]) -> pa.Table:
    """Arrow table of prompt_id and prompt."""
    return pa.table({"prompt_id": [prompt_id(p) for p in prompts], "prompt": list(prompts)}, schema=SCHEMA)


def _figures_prompts(source: PromptSource) -> PromptList:
    from hgdpo_core import figures

    if source.limit is None:
        raise InputError('prompts from "figures" need a limit: the world holds more people than you want to draw')
    return PromptList(tuple(figures.prompts(source.split, source.limit, seed=0)))


def _read_texts(source: PromptSource) -> list[str]:
    suffix = PurePosixPath(source.source.split("?")[0]).suffix.lower()
    if suffix not in FORMATS:
        raise InputError(f"{source.source} is not a prompt file: expected one of {', '.join(FORMATS)}, got "
                         f"{suffix or 'no extension'}; put one prompt a line into a .txt file")
    data = _read_bytes(source.source)
    if suffix == ".parquet":
        return _column(_parquet_rows(data, source.source), source)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{source.source} is not UTF-8 text (byte {error.start} is {data[error.start]:#04x}): "
                         "save it as UTF-8") from None
    if "\0" in text:
        raise InputError(f"{source.source} is a binary file with the name of a text file: expected prompts as text")
    if suffix == ".txt":
        if source.column or source.category:
            raise InputError(f"{source.source} is plain text and has no columns: drop prompts.column and "
                             "prompts.category, or give a csv, tsv, jsonl or parquet file")
        return text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    if suffix == ".jsonl":
        return _column(_json_rows(text, source.source), source)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if suffix == ".tsv" else ",")
    return _column(list(reader), source)


def _read_bytes(url: str) -> bytes:
    try:
        with fsspec.open(url, "rb") as file:
            return file.read()  # type: ignore[union-attr]
    except FileNotFoundError:
        raise InputError(f"there is no prompt file at {url}") from None
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"the prompt file {url} cannot be read: {error}") from None


def _parquet_rows(data: bytes, url: str) -> list[dict]:
    try:
        return pq.read_table(io.BytesIO(data)).to_pylist()
    except pa.ArrowInvalid as error:
        raise InputError(f"{url} is not a Parquet file: {error}") from None


def _json_rows(text: str, url: str) -> list[dict]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"line {number} of {url} is not JSON: {error}") from None
        rows.append(row if isinstance(row, dict) else {"prompt": row})
    return rows


def _column(rows: list[dict], source: PromptSource) -> list[str]:
    if not rows:
        return []
    known = list(rows[0])
    column = source.column or next((name for name in COLUMNS if name in known), None)
    if column is None or column not in known:
        wanted = repr(source.column) if source.column else f"one of {', '.join(COLUMNS)}"
        raise InputError(f"{source.source} has no prompt column: expected {wanted}, got {', '.join(map(str, known))}; "
                         "name yours in prompts.column")
    if source.category is not None:
        if "Category" not in known:
            raise InputError(f"{source.source} has no column Category, which prompts.category filters by")
        found = sorted({str(row["Category"]) for row in rows})
        rows = [row for row in rows if row["Category"] == source.category]
        if not rows:
            raise InputError(f"{source.source} has no row of category {source.category!r}; it has {', '.join(found)}")
    bad = next((n for n, row in enumerate(rows, start=1) if not isinstance(row.get(column) or "", str)), None)
    if bad is not None:
        raise InputError(f"row {bad} of {source.source} has a {column} that is not text: {rows[bad - 1][column]!r}")
    return [row.get(column) or "" for row in rows]
