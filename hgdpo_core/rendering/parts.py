"""The HTML the sections are made of, and how numbers are written. Text that comes in is escaped here."""

import base64
import io
import math
from collections.abc import Callable, Sequence
from html import escape

from PIL import Image

from hgdpo_core.metrics import WinRate

TINY_PX = 128  # images up to this side stay lossless, and hard pixels are shown as such
ACRONYMS = {"sft": "SFT", "dpo": "DPO", "lora": "LoRA"}
NOTHING = "–"

ImageEncoder = Callable[[Image.Image], str]


def section(title: str, intro: str, body: str) -> str:
    """A <section> with its heading; intro is text, body is HTML."""
    lead = f'<p class="intro">{sentence(intro)}</p>' if intro else ""
    return f"<section><h2>{escape(title)}</h2>{lead}{body}</section>\n"


def sentence(text: str) -> str:
    """`text` as HTML in which no line ends between a number and its percent sign."""
    return escape(text).replace(" %", "&nbsp;%")


def listing(title: str, sentences: Sequence[str], style: str) -> str:
    """A section of sentences; "" when there are none."""
    items = "".join(f"<li>{sentence(text)}</li>" for text in sentences)
    return section(title, "", f'<ul class="{style}">{items}</ul>') if sentences else ""


def picture(image: Image.Image, alt: str, encode: ImageEncoder) -> str:
    """An <img> that holds its own bytes."""
    tiny = ' class="tiny"' if max(image.size) <= TINY_PX else ""
    size = f'width="{image.width}" height="{image.height}"'
    return f'<img src="{encode(image)}" alt="{escape(alt)}" {size}{tiny}>'


def encode_data_uri(image: Image.Image, side_px: int, quality: int) -> str:
    """WebP data URI with the longer side at most `side_px`; images up to 128 pixels keep every pixel."""
    image = image.convert("RGB")
    tiny = max(image.size) <= TINY_PX
    if not tiny:
        image.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", lossless=tiny, quality=quality)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def words(name: str) -> str:
    """A name of the code as people write it: pool_images -> Pool images."""
    text = " ".join(ACRONYMS.get(word, word) for word in name.split("_"))
    return text[:1].upper() + text[1:]


def count_of(number: int, singular: str, plural: str | None = None) -> str:
    """1 prompt, 1,200 prompts."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def percent(rate: float | None) -> str:
    """A share of 0..1 in percent."""
    return NOTHING if rate is None else f"{100 * rate:.1f} %"


def rate_interval(rate: WinRate) -> str:
    """Both ends in percent."""
    return span(rate.ci_low, rate.ci_high, lambda end: f"{100 * end:.1f}") + ("" if rate.ci_low is None else " %")


def span(low: float | None, high: float | None, write: Callable[[float], str]) -> str:
    """An interval; its ends are joined by a word where they carry signs, since a dash would look like one."""
    if low is None or high is None:
        return NOTHING
    ends = (write(low), write(high))
    return (" to " if any(end[0] in "+−" for end in ends) else "–").join(ends)


def signed(value: float, digits: int) -> str:
    """With its sign, a real minus, and no minus before a zero."""
    text = f"{value:+.{digits}f}".replace("-", "−")
    return text if any(digit in "123456789" for digit in text) else f"{0:.{digits}f}"


def p_value(p: float) -> str:
    """Two significant digits; below 0.0001 the bound says enough."""
    return "<0.0001" if p < 1e-4 else f"{p:.2g}" if p < 0.1 else f"{p:.2f}"


def duration(seconds: float) -> str:
    """2.0 s, 4 min 5 s, 1 h 7 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours = round(seconds / 60), math.floor(round(seconds / 60) / 60)
    return f"{hours} h {minutes % 60} min" if hours else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
