"""Tables of texts as HTML, as Markdown and as plain lines. Texts are escaped here."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from hgdpo_core.rendering.parts import NOTHING, section, sentence

NO_SCORE = "no score"
"""Shown among numbers in place of a missing one."""


@dataclass(frozen=True)
class Cell:
    """A text with small print or a link."""

    text: str
    below: str = ""
    """Small print, such as an interval."""
    code: bool = False
    """Whether the text is a path or URL."""

    def html(self) -> str:
        """Small print on a line of its own; http(s) URLs become links."""
        text = escape(self.text)
        if self.code:
            text = f"<code>{text}</code>"
            if self.text.startswith(("https://", "http://")):
                text = f'<a href="{escape(self.text)}" rel="noreferrer">{text}</a>'
        return f"{text}<small>{escape(self.below)}</small>" if self.below else text

    def plain(self) -> str:
        """On one line."""
        return f"{self.text} ({self.below})" if self.below else self.text


def with_interval(value: str, interval: str) -> Cell:
    """A value and, in small print, its interval where there is one."""
    return Cell(value, interval if interval != NOTHING else "")


@dataclass(frozen=True)
class Table:
    """Rows and the names of their columns; the first cell of a row is its name."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    title: str = ""
    notes: Sequence[str] = ()
    """Paragraphs between title and table."""
    caption: str = ""

    def html(self) -> str:
        """The table without title and notes; a wide table scrolls by itself, also by keyboard."""
        caption = f"<caption><span>{sentence(self.caption)}</span></caption>" if self.caption else ""
        head = "".join(f'<th scope="col">{escape(column)}</th>' for column in self.columns)
        rows = ([cell.html() if isinstance(cell, Cell) else escape(cell) for cell in row] for row in self.rows)
        body = "".join(f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
                       for first, *rest in rows)
        return (f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(self.caption or self.title)}">'
                f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>")

    def section(self, image: str = "") -> str:
        """A <section> with title, notes and table; `image` is HTML before the table."""
        notes = "".join(f'<p class="intro">{sentence(note)}</p>' for note in self.notes)
        return section(self.title, "", notes + image + self.html())

    def markdown(self) -> str:
        """Markdown for GitHub and the Prefect UI, with title and notes if there are any."""
        lines = (self.columns, ["---"] * len(self.columns), *self._plain_rows())
        table = "\n".join("| " + " | ".join(map(_markdown, line)) + " |" for line in lines)
        return "\n\n".join([*([f"## {self.title}"] if self.title else ()), *self.notes, table])

    def text(self) -> str:
        """Plain lines without title and notes; columns are as wide as their widest cell, numbers aligned right."""
        columns = [_justify(column) for column in zip(self.columns, *self._plain_rows(), strict=True)]
        return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))

    def _plain_rows(self) -> list[list[str]]:
        return [[cell.plain() if isinstance(cell, Cell) else cell for cell in row] for row in self.rows]


def _justify(column: Sequence[str]) -> list[str]:
    width, numbers = max(map(len, column)), all(map(_is_number, column[1:]))
    return [cell.rjust(width) if numbers else cell.ljust(width) for cell in column]


def _markdown(text: str) -> str:
    """Text that cannot end a cell or start markup: a prompt may hold an image that every reader would fetch."""
    return re.sub(r"([\\`*~|\[\]])", r"\\\1", escape(" ".join(text.splitlines()), quote=False))


def _is_number(text: str) -> bool:
    return text == NO_SCORE or text.replace(",", "").lstrip("-").replace(".", "", 1).isdigit()
