"""Text files of users: decoded, and read as CSV, TSV or JSON; each mistake is one line that names its position."""

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

from hgdpo_core.errors import InputError

LATIN_1 = "if it was saved as Latin-1, convert it, for example with iconv -f LATIN1 -t UTF-8"


def decode_text(data: bytes, name: str) -> str:
    """UTF-8 text, with or without a mark in front; InputError, with the way out, for other bytes."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{name} is UTF-16 text (byte 0 is {data[0]:#04x}): expected UTF-8; convert it, for example "
                         "with iconv -f UTF-16 -t UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = error.start + (3 if data.startswith(b"\xef\xbb\xbf") else 0)  # utf-8-sig counts behind its mark
        line = data.count(b"\n", 0, at) + 1
        raise InputError(f"{name} is not UTF-8 text: byte {at} (line {line}) is {data[at]:#04x}; {LATIN_1}") from None
    if "\0" in text:
        raise InputError(f"{name} is a binary file with the name of a text file: expected text")
    return text


def csv_rows(text: str, name: str, *, tabs: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, row) of a table; InputError for a row of more cells than the header names, or with quotes that break.

    A TSV's quotes are characters (as in PartiPrompts) unless all of it is quoted as CSV is.
    """
    if tabs and not _parses(text):
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if tabs else ",", strict=True)
    try:
        columns = list(reader.fieldnames or [])
        if len(set(columns)) < len(columns):
            raise InputError(f"{name} names a column twice: {', '.join(columns)}; rename one")
        for row in reader:
            if None in row:
                raise InputError(f"line {reader.line_num} of {name} has {len(columns) + len(row[None])} cells, its "
                                 f"header has {len(columns)}: put texts that hold a {'tab' if tabs else 'comma'} in "
                                 '"double quotes", or one text a line into a .txt file')
            yield reader.line_num, row
    except csv.Error as error:
        raise InputError(f"{name} cannot be read as a table: {error} (line {reader.line_num}); is it comma or tab "
                         "separated text, with its quotes doubled?") from None


def _parses(text: str) -> bool:
    try:
        for _ in csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True):
            pass
    except csv.Error:
        return False
    return True


def json_lines(text: str, name: str) -> Iterator[tuple[int, Any]]:
    """(line, value) of every line that is not empty; InputError for one that is not JSON."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, parse_json(line)
            except ValueError as error:
                raise InputError(f"line {number} of {name} is not JSON: {error}") from None


def parse_json(text: str) -> Any:
    """The value of a JSON text; ValueError for what is none, is nested too deep or holds half a surrogate pair."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except UnicodeEncodeError:
        raise ValueError("it holds half of a surrogate pair, which is not a character") from None
    return value
