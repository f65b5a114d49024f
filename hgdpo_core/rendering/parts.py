"""Parts of HTML sections, and the format of numbers. Input texts are escaped here."""

import base64
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image

from hgdpo_core.progress import count_of

TINY_PX = 128  # images up to this side are encoded lossless and shown with hard pixels
ACRONYMS = {"sft": "SFT", "dpo": "DPO", "lora": "LoRA"}
NOTHING = "–"

ImageEncoder = Callable[[Image.Image], str]


def section(title: str, intro: str, body: str) -> str:
    """A <section> with its heading, which a contents list can point to; intro is text, body is HTML."""
    lead = f'<p class="intro">{sentence(intro)}</p>' if intro else ""
    anchor = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    return f'<section id="{anchor}"><h2>{escape(title)}</h2>{lead}{body}</section>\n'


def columns(*sections: str) -> str:
    """Sections in two columns where the page is wide enough; "" when all are empty."""
    return f'<div class="columns">{"".join(sections)}</div>\n' if any(sections) else ""


def split(left: str, right: str, shares: tuple[int, int]) -> str:
    """Two blocks side by side where the page is wide enough, in these shares of the width; one alone has all of it."""
    if not left or not right:
        return left + right
    style = f"grid-template-columns: minmax(0, {shares[0]}fr) minmax(0, {shares[1]}fr)"
    return f'<div class="split" style="{style}"><div>{left}</div><div>{right}</div></div>'


def sentence(text: str) -> str:
    """`text` as HTML without line breaks between a number and its percent sign."""
    return escape(text).replace(" %", "&nbsp;%")


def listing(title: str, sentences: Sequence[str], style: str) -> str:
    """A section of sentences; "" when there are none."""
    items = "".join(f"<li>{sentence(text)}</li>" for text in sentences)
    return section(title, "", f'<ul class="{style}">{items}</ul>') if sentences else ""


def image_tag(image: Image.Image, alt: str, encode: ImageEncoder) -> str:
    """An <img> with embedded bytes."""
    tiny = ' class="tiny"' if max(image.size) <= TINY_PX else ""
    size = f'width="{image.width}" height="{image.height}"'
    return f'<img src="{encode(image)}" alt="{escape(alt)}" {size}{tiny}>'


def encode_data_uri(image: Image.Image, side_px: int, quality: int) -> str:
    """WebP data URI with the longer side at most `side_px`; images up to 128 pixels are not changed."""
    image = image.convert("RGB")
    tiny = max(image.size) <= TINY_PX
    if not tiny:
        image.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", lossless=tiny, quality=quality)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def words(name: str) -> str:
    """A name of the code as text: pool_images -> Pool images."""
    text = " ".join(ACRONYMS.get(word, word) for word in name.split("_"))
    return text[:1].upper() + text[1:]


def percent(rate: float | None) -> str:
    """A rate of 0..1 in percent."""
    return NOTHING if rate is None else f"{100 * rate:.1f} %"


def describe_rate(rate: Mapping[str, Any]) -> str:
    """A win rate of summary.json with its interval and counts; without a win or a loss only that."""
    ties = count_of(rate["ties"], "tie")
    if rate["rate"] is None:
        return f"no win, no loss ({ties})"
    counts = f"{count_of(rate['wins'], 'win')}, {count_of(rate['losses'], 'loss', 'losses')}, {ties}"
    return f"{percent(rate['rate'])} (95 % interval {percent_interval(rate['ci_low'], rate['ci_high'])}; {counts})"


def describe_identity(change: Mapping[str, Any]) -> str:
    """What a judge of identity found, of summary.json: the verdict, by which interval, and images without a face."""
    verdict = {"kept": "identity is kept", "changed": "identity changed"}.get(
        change["verdict"], "that identity is kept is not shown")
    faceless = " and ".join(f"{count:,} of the {who}'s" for who, count in change["faceless"].items() if count)
    return (f"{verdict} (90 % interval {percent_interval(change['low'], change['high'])}, margin "
            f"{100 * change['margin']:g} points{f'; no face in {faceless} images' if faceless else ''})")


def percent_interval(low: float | None, high: float | None) -> str:
    """An interval of rates of 0..1 in percent."""
    return span(low, high, lambda end: f"{100 * end:.1f}") + ("" if low is None else " %")


def span(low: float | None, high: float | None, write: Callable[[float], str]) -> str:
    """An interval; ends with signs are joined by a word, as a dash would look like a sign."""
    if low is None or high is None:
        return NOTHING
    ends = (write(low), write(high))
    return (" to " if any(end[0] in "+−" for end in ends) else "–").join(ends)


def signed_interval(low: float | None, high: float | None, digits: int, unit: str = "") -> str:
    """An interval whose ends have signs and units."""
    return span(low, high, lambda end: signed(end, digits) + unit)


def signed(value: float, digits: int) -> str:
    """With a sign (a typographic minus), but without one before a zero."""
    text = f"{value:+.{digits}f}".replace("-", "−")
    return text if any(digit in "123456789" for digit in text) else f"{0:.{digits}f}"


def p_value(p: float) -> str:
    """Two significant digits; below 0.0001 only this bound."""
    return "<0.0001" if p < 1e-4 else f"{p:.2g}" if p < 0.1 else f"{p:.2f}"


def duration(seconds: float) -> str:
    """2.0 s, 4 min 5 s, 1 h 7 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours = round(seconds / 60), math.floor(round(seconds / 60) / 60)
    return f"{hours} h {minutes % 60} min" if hours else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
