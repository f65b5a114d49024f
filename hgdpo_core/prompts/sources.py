"""Texts of prompt files and data sets, local or remote. Nothing is cleaned here.

A remote list is copied into the store each time it is read; when it cannot be reached later, the copy is used.
"""

import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from hgdpo_core.config import PromptSource
from hgdpo_core.config.base import content_hash
from hgdpo_core.errors import ConfigError, InputError, StorageError, first_line
from hgdpo_core.storage import MissingKeyError, Store
from hgdpo_core.storage.local import open_file
from hgdpo_core.storage.roots import local_address
from hgdpo_core.storage.shards import read_table, write_table
from hgdpo_core.storage.text_files import csv_rows, decode_text, json_lines

FORMATS = (".txt", ".csv", ".tsv", ".jsonl", ".parquet")
COLUMNS = ("prompt", "Prompt", "caption", "text")
CATEGORIES = ("Category", "category")
LOCAL_PROTOCOLS = ("file", "local")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SECRET_IN_QUERY = re.compile(r"[?&;#](sig|[\w.-]*(signature|token|key|password|passwd|pwd|secret|credentials?|auth))=",
                             re.I)


class UnreachableError(StorageError):
    """A remote list is not available at the moment, or is gone."""


class Texts(NamedTuple):
    """All texts of a source in order, empty ones too; how many rows of other categories there were; a remark."""

    texts: list[str]
    other_category: int = 0
    remark: str = ""


def read_texts(source: PromptSource, store: Store | None) -> Texts:
    """The texts of a file or data set (of a remote one's copy: those that were kept).

    InputError for a source that cannot be used, UnreachableError for a remote one that is out of reach and of which
    `store` holds no copy.
    """
    if not _is_remote(source.source):
        return _read(source)
    key = f"prompts/sources/{content_hash(source)}.parquet"
    try:
        found = _read(source)
    except UnreachableError as error:
        if store is None or not store.exists(key):
            raise
        return Texts(read_table(store, key)["text"].to_pylist(),
                     remark=f"from the copy in {store.url(key)}, because {error}")
    if store is not None:
        write_table(store, key, pa.table({"text": pa.array(found.texts, pa.string())}))
    return found


def _is_remote(address: str) -> bool:
    """Whether an address is remote; InputError for one with a secret, which would end up in configs and logs."""
    protocol, separator, _ = address.partition("://")
    if not separator:
        return _is_hub_id(address)
    refuse_secret_address(address, "prompts")
    if protocol.lower() not in LOCAL_PROTOCOLS:
        return True
    try:
        local_address(address)
    except ConfigError as error:
        raise InputError(f"prompts: {error}") from None
    return False


def refuse_secret_address(address: str, what: str) -> None:
    """InputError, which does not quote it, for a URL of the user's `what` that holds a secret."""
    if _has_user(address) or SECRET_IN_QUERY.search(unquote(address)):
        raise InputError(f"the address of the {what} holds a password, key or signature, which would end up in logs: "
                         "put the credentials into the environment, or download the data and give its path")


def _has_user(address: str) -> bool:
    """Whether a user, which may be a token, precedes the host; one that is not a URL at all counts as a secret."""
    try:
        return "@" in unquote(urlsplit(address).netloc)
    except ValueError:
        return True


def _is_hub_id(address: str) -> bool:
    return bool(HUB_ID.fullmatch(address)) and _suffix(address) not in FORMATS and not Path(address).exists()


def _suffix(address: str) -> str:
    return PurePosixPath(address.split("?")[0]).suffix.lower()


def _read(source: PromptSource) -> Texts:
    address, suffix = source.source, _suffix(source.source)
    if _is_hub_id(address) or (suffix not in FORMATS and Path(address).expanduser().is_dir()):
        return _read_data_set(source)
    if suffix not in FORMATS:
        raise InputError(f"{address} is not a prompt file: expected one of {', '.join(FORMATS)}, got "
                         f"{suffix or 'no extension'}; put one prompt per line into a .txt file")
    if suffix == ".txt" and (source.column or source.category):
        raise InputError(f"{address} is plain text and has no columns: drop prompts.column and prompts.category, or "
                         "give a csv, tsv, jsonl or parquet file")
    data = _read_bytes(address)
    if suffix == ".parquet":
        return _parquet_texts(data, source)
    text = decode_text(data, address)
    if suffix == ".txt":
        return Texts(text.replace("\r\n", "\n").removesuffix("\n").split("\n"))
    if suffix == ".jsonl":
        values = (value for _, value in json_lines(text, address))
        return _column([value if isinstance(value, dict) else {"prompt": value} for value in values], source)
    return _column([row for _, row in csv_rows(text, address, tabs=suffix == ".tsv")], source)


# -- bytes and text


def _read_bytes(address: str) -> bytes:
    remote = _is_remote(address)
    try:
        if address.startswith(("s3://", "s3a://")):  # with the store's own retries and endpoint
            folder, _, name = address.rpartition("/")
            return Store(folder).read_bytes(name)
        with fsspec.open(address, "rb") if remote else open_file(Path(local_address(address)).expanduser()) as file:
            return file.read()  # type: ignore[union-attr]
    except Exception as error:  # every file system has its own family
        reason = error.__cause__ if isinstance(error, FileNotFoundError) else error  # fsspec's http hides the network
        gone = isinstance(reason, (type(None), FileNotFoundError, MissingKeyError))
        if gone or getattr(reason, "status", None) == 404:
            message = f"there is no prompt file at {address}"
        else:
            message = f"the prompt file {address} cannot be read: {first_line(reason)}"
            message += "; without the network, give the path of a copy" if remote else ""
        raise (UnreachableError if remote else InputError)(message) from None


# -- rows


def _parquet_texts(data: bytes, source: PromptSource) -> Texts:
    """Only the columns of text and category are read: others may hold images."""
    try:
        file = pq.ParquetFile(io.BytesIO(data))
        names = _find_columns(file.schema_arrow.names, source)
        return _column(file.read(columns=list(names)).to_pylist(), source)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # damaged pages: each codec has its own
        raise InputError(f"{source.source} is not a Parquet file, or a damaged one: {first_line(error)}; get it "
                         "again") from None


def _read_data_set(source: PromptSource) -> Texts:
    """Texts of a data set in a folder or on the hub, streamed: only as much is fetched as `limit` needs."""
    try:
        import datasets
    except ImportError:
        raise InputError(f"{source.source} is a data set, and reading one needs the package datasets: pip install "
                         "'hgdpo[datasets]', or give a prompt file") from None
    datasets.disable_progress_bars()
    try:
        rows: Any = _open_data_set(datasets, source)
        names = rows.column_names or list(next(iter(rows), {}))
        if not names:
            return Texts([])
        rows = rows.select_columns(list(_find_columns(names, source)))
        return _column(list(_take(rows, source)), source)
    except InputError:
        raise
    except Exception as error:  # the hub client raises a wide family
        if isinstance(error, (ValueError, TypeError, KeyError)) or Path(source.source).exists():
            raise InputError(f"the data set {source.source} cannot be read: {first_line(error)}") from None
        raise UnreachableError(f"{source.source} is not a file or folder here, and as a data set of the hub it is not "
                               f"available: {first_line(error)}") from None


def _open_data_set(datasets: Any, source: PromptSource) -> Any:
    folder = Path(source.source).expanduser()
    if not ((folder / "state.json").exists() or (folder / "dataset_dict.json").exists()):
        path = str(folder) if folder.is_dir() else source.source
        return datasets.load_dataset(path, name=source.subset, split=source.split, streaming=True)
    saved = datasets.load_from_disk(str(folder))  # what save_to_disk wrote
    if not isinstance(saved, dict):
        return saved
    if source.split not in saved:
        raise ValueError(f"it has no split {source.split!r}; it has {', '.join(saved)}; name one in prompts.split")
    return saved[source.split]


def _take(rows: Iterable[dict[str, Any]], source: PromptSource) -> Iterable[dict[str, Any]]:
    """Rows until there are `limit` different ones (of the requested category)."""
    seen: set[Any] = set()
    for row in rows:
        yield row
        column, *category = _find_columns(list(row), source)
        if row[column] and str(row[column]).strip() and all(row[name] == source.category for name in category):
            seen.add(row[column])
        if source.limit is not None and len(seen) >= source.limit:
            return


# -- columns


def _find_columns(known: Sequence[str], source: PromptSource) -> tuple[str, ...]:
    """The column of texts, then the one of categories if rows are chosen by it."""
    column = source.column or next((name for name in COLUMNS if name in known), None)
    if column is None or column not in known:
        expected = repr(source.column) if source.column else f"one of {', '.join(COLUMNS)}"
        raise InputError(f"{source.source} has no prompt column: expected {expected}, got "
                         f"{', '.join(map(str, known))}; name yours in prompts.column")
    if source.category is None:
        return (column,)
    category = next((name for name in CATEGORIES if name in known), None)
    if category is None:
        raise InputError(f"{source.source} has no column Category, which prompts.category filters by")
    return column, category


def _column(rows: list[dict[str, Any]], source: PromptSource) -> Texts:
    if not rows:
        return Texts([])
    given = len(rows)
    column, *category = _find_columns(list(rows[0]), source)
    for name in category:
        found = sorted({str(row.get(name)) for row in rows})
        rows = [row for row in rows if row.get(name) == source.category]
        if not rows:
            raise InputError(f"{source.source} has no row of category {source.category!r}; it has {', '.join(found)}")
    bad = next((n for n, row in enumerate(rows, start=1) if not isinstance(row.get(column) or "", str)), None)
    if bad is not None:
        raise InputError(f"row {bad} of {source.source} has a {column} that is not text: {rows[bad - 1][column]!r}")
    return Texts([row.get(column) or "" for row in rows], given - len(rows))
