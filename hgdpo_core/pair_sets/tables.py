"""Pairs in Parquet files with the columns of Pick-a-Pic v2, read a few rows at a time; footers are read up front."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hgdpo_core.errors import InputError
from hgdpo_core.image_sets.folders import batched
from hgdpo_core.image_sets.tables import PAGE_BYTES, bytes_of, columns_of, holds_bytes, open_table, refused
from hgdpo_core.pair_sets.rows import PairText, read_pick_a_pic
from hgdpo_core.storage import PARALLEL_REQUESTS, Store

Images = tuple[bytes | str, bytes | str]
"""Of image 0 and image 1 the bytes, or why there are none."""
IMAGES = ("jpg_0", "jpg_1")
REQUIRED = ("caption", "label_0")
OPTIONAL = ("label_1", "has_label", "are_different", "image_0_uid", "image_1_uid", "model_0", "model_1")
TEXTS_AT_A_TIME, IMAGES_AT_A_TIME = 1024, 8
REMOTE_BYTES = 2**23  # a request, where each costs a way through the network


def count_rows(store: Store, keys: Sequence[str], enough: int | None = None) -> list[int]:
    """The rows of each file, of the first files that hold `enough` alone; InputError for one without the columns."""
    rows: list[int] = []
    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        for part in batched(keys, PARALLEL_REQUESTS):
            for found in pool.map(lambda key: _count(store, key), part):
                rows.append(found)
                if enough is not None and sum(rows) >= enough:
                    return rows
    return rows


def _count(store: Store, key: str) -> int:
    with open_table(store, key, "pairs") as table:
        check_columns(table.schema_arrow, store.url(key).removeprefix("file://"))
        return table.metadata.num_rows


def check_columns(schema: pa.Schema, url: str) -> None:
    """InputError where a column that pairs need is missing or of another type."""
    missing = [name for name in (*REQUIRED, *IMAGES) if name not in schema.names]
    if missing:
        advice = ("; it is a copy without images: give the whole data set" if set(missing) == set(IMAGES) else
                  "; rename yours")
        raise InputError(f"pairs: {url} has no column {', '.join(missing)}: expected {', '.join((*REQUIRED, *IMAGES))} "
                         f"as in Pick-a-Pic v2, got {columns_of(schema)}{advice}")
    wrong = [name for name in IMAGES if not holds_bytes(schema.field(name).type)]
    if wrong:
        raise InputError(f"pairs: the column {wrong[0]} of {url} holds no encoded images: expected bytes, got "
                         f"{schema.field(wrong[0]).type}")


class TablePairs:
    """Reads rows by their number in the whole data set; in ascending order in one go through each file."""

    def __init__(self, store: Store, files: Sequence[str], rows_of_files: Sequence[int]):
        self._files = files
        self._ends = np.array(list(accumulate(rows_of_files)))
        self._texts = _Cursor(store, files, (*REQUIRED, *OPTIONAL), TEXTS_AT_A_TIME)
        self._images = _Cursor(store, files, IMAGES, IMAGES_AT_A_TIME)

    def texts(self, rows: Sequence[int]) -> list[PairText]:
        """The rows without their images."""
        return [read_pick_a_pic(self._texts.row(file, row), f"{self._files[file]}#{row}")
                for file, row in map(self._place, rows)]

    def images(self, rows: Sequence[int]) -> Iterator[Images]:
        """The two images of each row."""
        for file, row in map(self._place, rows):
            found = self._images.row(file, row)
            yield bytes_of(found["jpg_0"]), bytes_of(found["jpg_1"])

    def close(self) -> None:
        """Close the open files."""
        self._texts.close()
        self._images.close()

    def _place(self, row: int) -> tuple[int, int]:
        """The file of a row, and its number there."""
        file = int(np.searchsorted(self._ends, row, side="right"))
        return file, int(row - (self._ends[file - 1] if file else 0))


class _Cursor:
    """A place in files, from which rows that follow are read without going back."""

    def __init__(self, store: Store, files: Sequence[str], columns: Sequence[str], rows_at_a_time: int):
        self._store, self._files, self._columns, self._size = store, files, columns, rows_at_a_time
        self._file, self._table = -1, None
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._start, self._rows = 0, list[dict[str, Any]]()
        self._group_end = 0

    def row(self, file: int, row: int) -> dict[str, Any]:
        """A row of a file; those behind it stay where the next call finds them."""
        if file != self._file or row < self._start or row >= self._group_end:
            self._go_to(file, row)
        while row >= self._start + len(self._rows):
            self._start += len(self._rows)
            batch = self._refusing(lambda: next(self._batches))
            # of a batch that is skipped nothing is copied
            self._rows = batch.to_pylist() if row < self._start + len(batch) else [{}] * len(batch)
        return self._rows[row - self._start]

    def close(self) -> None:
        if self._table is not None:
            self._table.close(force=True)
        self._file, self._table, self._batches, self._rows = -1, None, iter(()), []

    def _go_to(self, file: int, row: int) -> None:
        """To the row group that holds a row; a group can only be read from its beginning."""
        if file != self._file:
            self.close()
            size = PAGE_BYTES if self._store.local_path("") is not None else REMOTE_BYTES
            self._file, self._table = file, open_table(self._store, self._files[file], "pairs", size)
        table = self._table
        assert table is not None
        group, first = _find_group(table, row)
        columns = [name for name in self._columns if name in table.schema_arrow.names]
        self._batches = self._refusing(lambda: table.iter_batches(self._size, row_groups=[group], columns=columns))
        self._start, self._rows = first, []
        self._group_end = first + table.metadata.row_group(group).num_rows

    def _refusing(self, read: Callable[[], Any]) -> Any:
        with refused(f"pairs: {self._files[self._file]} is broken"):
            return read()


def _find_group(table: pq.ParquetFile, row: int) -> tuple[int, int]:
    """The row group of a row, and the first row of that group."""
    first = 0
    for group in range(table.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        if row < first + rows:
            return group, first
        first += rows
    raise InputError(f"pairs: a Parquet file has {first} rows, fewer than when it was planned: start again")
