"""Images in Parquet files, as the `datasets` library writes them ({"bytes", "path"}) or as plain encoded bytes.

Read with pyarrow, a few rows at a time: one row group may hold a whole data set.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hgdpo_core.errors import InputError, StorageError
from hgdpo_core.image_sets.folders import CAPTION_COLUMNS
from hgdpo_core.storage import Store

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
ROWS_AT_A_TIME = 8
PAGE_BYTES = 2**20


def index_tables(store: Store, files: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A row of `sets.INDEX` for every row; InputError for a file without an image or a caption column."""
    for number, key in enumerate(files):
        with open_table(store, key) as table:
            url = store.url(key).removeprefix("file://")
            _image_column(table.schema_arrow, url)
            column = _caption_column(table.schema_arrow, url)
            for row, caption in enumerate(_captions(table, column, url)):
                yield {"name": f"{key}#{row}", "caption": caption, "file": number, "start": row, "bytes": 0}


def _captions(table: pq.ParquetFile, column: str, url: str) -> Iterator[str | None]:
    with refused(f"images: the captions of {url} are damaged"):
        for batch in table.iter_batches(columns=[column]):
            yield from batch.column(0).to_pylist()


def open_table(store: Store, key: str, what: str = "images", buffer_bytes: int = PAGE_BYTES) -> pq.ParquetFile:
    """A Parquet file of the user's `what`, read so many bytes at a time; InputError for one that is none."""
    with refused(f"{what}: {store.url(key).removeprefix('file://')} is cut off or no Parquet file"):
        return pq.ParquetFile(store.open(key), buffer_size=buffer_bytes, pre_buffer=False)


@contextmanager
def refused(what: str) -> Iterator[None]:
    """pyarrow's errors as an InputError that begins with `what`; the store's own are left."""
    try:
        yield
    except StorageError:
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{what}: {str(error).splitlines()[0]}; get it again") from None


def _image_column(schema: pa.Schema, url: str) -> str:
    for name in IMAGE_COLUMNS:
        if name in schema.names and holds_bytes(schema.field(name).type):
            return name
    raise InputError(f"images: {url} has no column of images: expected {', '.join(IMAGE_COLUMNS[:-1])} or "
                     f"{IMAGE_COLUMNS[-1]} with encoded bytes, got {columns_of(schema)}")


def holds_bytes(kind: pa.DataType) -> bool:
    """Whether a column of this type can hold encoded images: bytes, or a struct with bytes."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and holds_bytes(kind.field("bytes").type)
    return kind in (pa.binary(), pa.large_binary())


def _caption_column(schema: pa.Schema, url: str) -> str:
    for name in CAPTION_COLUMNS:
        if name in schema.names and schema.field(name).type in (pa.string(), pa.large_string()):
            return name
    raise InputError(f"images: {url} has no column of captions: expected {' or '.join(CAPTION_COLUMNS)} as text, got "
                     f"{columns_of(schema)}; rename yours")


def columns_of(schema: pa.Schema) -> str:
    """Names and types, for messages."""
    return ", ".join(f"{field.name} ({field.type})" for field in schema)


class TableReader:
    """The bytes of images in Parquet files; rows asked for in order are read in one go through the file."""

    def __init__(self, store: Store, files: Sequence[str]):
        self._store, self._files = store, files
        self._file = self._next = -1
        self._table: pq.ParquetFile | None = None
        self._rows: Iterator[bytes | str] = iter(())

    def read(self, rows: pa.Table) -> Iterator[bytes | str]:
        """Of each row the bytes, or why there are none."""
        for file, start in zip(rows["file"].to_pylist(), rows["start"].to_pylist(), strict=True):
            if (file, start) != (self._file, self._next):
                self._go_to(file, start)
            self._next += 1
            yield next(self._rows)

    def close(self) -> None:
        """Close the open file."""
        if self._table is not None:
            self._table.close(force=True)
            self._table, self._rows = None, iter(())
            self._file = self._next = -1

    def _go_to(self, file: int, start: int) -> None:
        self.close()
        self._file, self._next = file, start
        self._table = open_table(self._store, self._files[file])
        groups, first = [], 0
        for group in range(self._table.num_row_groups):
            rows = self._table.metadata.row_group(group).num_rows
            if first + rows > start:
                groups.append(group)
            else:
                first += rows
        self._rows = self._values(self._table, groups)
        for _ in range(start - first):
            next(self._rows)

    def _values(self, table: pq.ParquetFile, groups: list[int]) -> Iterator[bytes | str]:
        column = _image_column(table.schema_arrow, self._files[self._file])
        with refused(f"images: {self._files[self._file]} is broken"):
            for batch in table.iter_batches(ROWS_AT_A_TIME, row_groups=groups, columns=[column]):
                yield from map(bytes_of, batch.column(0).to_pylist())


def bytes_of(value: Any) -> bytes | str:
    """The bytes of an image in a column, or why there are none."""
    if isinstance(value, dict):
        path, value = value.get("path"), value["bytes"]
        if value is None and path:
            return f"its row holds no bytes, only the path {path}: embed the images in the file"
    return "its row holds no image" if value is None else value
