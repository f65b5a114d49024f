"""Charts as inline SVG. The style sheet of `html.py` colours their classes, in light and dark mode."""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hgdpo_core.metrics import WinRate
from hgdpo_core.statistics.colours import ColourHistograms
from hgdpo_core.statistics.intervals import Estimate

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 54, 352, 8, 176
MAX_POINTS = 300  # per line: more are not distinguishable at this width
SMOOTHING_FRACTION = 0.05  # of all rows, the window of the moving average
SHOWN_PERCENTILES = (1, 99)  # of the raw values; one outlier must not flatten the whole curve


@dataclass(frozen=True)
class ChartSpec:
    """One chart: one or two columns of rows against their `step`, and a baseline."""

    title: str
    columns: tuple[str, ...]
    meaning: str
    baseline: float | None = None
    over: str = "the steps of training"


@dataclass(frozen=True)
class Line:
    """Finite values of one column, steps ascending, and their moving average; all float64 [n]."""

    steps: np.ndarray
    values: np.ndarray
    smooth: np.ndarray


def read_line(log: Sequence[Mapping[str, float]], column: str) -> Line | None:
    """The column over `step` without rows where it is absent or not finite; None when no row remains."""
    rows = sorted((row["step"], row[column]) for row in log
                  if column in row and math.isfinite(row["step"]) and math.isfinite(row[column]))
    if not rows:
        return None
    steps, values = np.array(rows, dtype=np.float64).T
    return Line(steps, values, smooth(values))


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average over 5 % of the values, float64 [n]; the window shrinks at both ends."""
    half = int(len(values) * SMOOTHING_FRACTION / 2)
    window = np.ones(2 * half + 1)
    counts = np.convolve(np.ones(len(values)), window)[half:half + len(values)]
    return np.convolve(values, window)[half:half + len(values)] / counts


def line_chart(spec: ChartSpec, log: Sequence[Mapping[str, float]]) -> str:
    """A <figure> with the chart, or "" when the log has none of its columns."""
    lines = [(name, line) for name in spec.columns if (line := read_line(log, name))]
    if not lines:
        return ""
    low, high = _value_range([line for _, line in lines], spec.baseline)
    first, last = min(line.steps[0] for _, line in lines), max(line.steps[-1] for _, line in lines)
    step_scale, value_scale = _Scale(first, last, LEFT, RIGHT), _Scale(low, high, BOTTOM, TOP)
    parts = [_axes(step_scale, value_scale), _baseline(spec.baseline, value_scale)]
    for style, name in (("raw", "values"), ("smooth", "smooth")):
        for number, (_, line) in enumerate(lines):
            points = _points(line.steps, getattr(line, name).clip(low, high), step_scale, value_scale)
            parts.append(f'<polyline class="{style}{" second" * number}" points="{points}"/>')
    ends = ", ".join(f"{name.replace('_', ' ')} from {format_number(line.smooth[0])} "
                     f"to {format_number(line.smooth[-1])}" for name, line in lines)
    latest = " / ".join(format_number(line.smooth[-1]) for _, line in lines)
    return _figure(spec.title, latest, spec.meaning, f"{spec.title} over {spec.over}, smoothed: {ends}", parts)


def rate_bar(rate: WinRate) -> str:
    """A bar from 0 to 100 % with its interval as a whisker and a line at 50 %; stretches to its container."""
    marks = ""
    if rate.rate is not None and rate.ci_low is not None and rate.ci_high is not None:
        low, high = 100 * rate.ci_low, 100 * rate.ci_high
        marks = (_bar(100 * rate.rate) +
                 f'<path class="whisker" d="M{low:.2f} 12H{high:.2f}M{low:.2f} 7V17M{high:.2f} 7V17"/>')
    return _bar_frame(marks + '<path class="half" d="M50 0V24"/>', "rate-bar")


def fraction_bar(fraction: float, style: str) -> str:
    """A plain bar from 0 to 100 %; `style` is its class."""
    return _bar_frame(_bar(100 * fraction), f"rate-bar {style}")


def _bar(value: float) -> str:
    return f'<rect class="bar" width="{value:.2f}" height="24"/><path class="edge" d="M{value:.2f} 0V24"/>'


def _bar_frame(marks: str, style: str) -> str:
    return (f'<svg class="{style}" viewBox="0 0 100 24" preserveAspectRatio="none" aria-hidden="true">'
            f'<rect class="track" width="100" height="24"/>{marks}</svg>')


def interval_chart(title: str, meaning: str, points: Iterable[tuple[str, Estimate]], *, baseline: float) -> str:
    """A <figure> with labelled rates of 0..1 side by side, whiskers and a line through them; "" without values."""
    known = [(label, point.value, point.ci_low, point.ci_high) for label, point in points if point.value is not None]
    if not known:
        return ""
    ends = [end for _, *numbers in known for end in numbers if end is not None]
    value_scale = _Scale(min(*ends, baseline), max(*ends, baseline), BOTTOM, TOP)
    line, marks, texts = [], "", []
    for number, (label, value, low, high) in enumerate(known):
        x, y = f"{LEFT + (RIGHT - LEFT) * (number + 0.5) / len(known):.1f}", f"{value_scale(value):.1f}"
        line.append(f"{x},{y}")
        if low is not None and high is not None:
            bottom, top = f"{value_scale(low):.1f}", f"{value_scale(high):.1f}"
            marks += f'<path class="whisker" d="M{x} {bottom}V{top}m-5 0h10M{x} {bottom}m-5 0h10"/>'
        marks += (f'<circle class="dot" cx="{x}" cy="{y}" r="4"/><text class="tick" x="{x}" y="{BOTTOM + 17}" '
                  f'text-anchor="middle">{html.escape(label)}</text>')
        texts.append(f"{label}: {100 * value:.1f} %")
    parts = [_axes(None, value_scale, percent=True), _baseline(baseline, value_scale),
             f'<polyline class="raw" points="{" ".join(line)}"/>', marks]
    return _figure(title, "", meaning, f"{title}, {meaning}: {', '.join(texts)}", parts)


@dataclass(frozen=True)
class HistogramSpec:
    """One histogram: a channel of ColourHistograms, and the labels of its axis from 0 to 1."""

    title: str
    channel: str
    meaning: str
    labels: tuple[str, ...]


HISTOGRAMS = (
    HistogramSpec("Hue", "hue", "weighted by saturation: grey has no hue", ("0°", "120°", "240°", "360°")),
    HistogramSpec("Saturation", "saturation", "0: grey, 1: pure colour", ("0", "0.5", "1")),
    HistogramSpec("Value", "value", "0: black, 1: bright", ("0", "0.5", "1")),
)


def histogram(spec: HistogramSpec, target: ColourHistograms, tuned: ColourHistograms) -> str:
    """A <figure> with the distributions of both models' pixels: target as an area, tuned model as a line."""
    sides = [np.array(side.as_dict()[spec.channel]) for side in (target, tuned)]
    parts = _steps(spec.labels, *sides, percent=True, below=_hue_strip(len(sides[0])) if spec.channel == "hue" else "")
    moved = 50 * float(np.abs(sides[0] - sides[1]).sum())
    return _figure(spec.title, f"{moved:.1f} % moved", f"{spec.meaning}. Area: target, line: tuned",
                   f"{spec.title} of all pixels of both models; {moved:.1f} % of the pixels lie in other bins", parts)


def count_chart(title: str, meaning: str, ends: tuple[float, float], *sides: Sequence[int]) -> str:
    """A <figure> with counts in equal bins between two ends: the first side as an area, a second as a line."""
    low, high = map(format_number, ends)
    parts = _steps((low, format_number(sum(ends) / 2), high), *map(np.array, sides))
    most = max(map(max, sides))
    return _figure(title, "", meaning, f"{title}, {meaning}; from {low} to {high}, at most {most} in a bin", parts)


def _steps(labels: Sequence[str], *sides: np.ndarray, percent: bool = False, below: str = "") -> list[str]:
    """Axes with labels from end to end, and one value per bin: the first side as an area, a second as a line."""
    value_scale = _Scale(0.0, max(float(side.max()) for side in sides) or 1.0, BOTTOM, TOP)
    area, *outline = (_outline(side, value_scale) for side in sides)
    parts = [_axes(None, value_scale, percent=percent, whole=not percent),
             f'<path class="area" d="{area}V{BOTTOM}H{LEFT}Z"/>',
             *(f'<path class="outline" d="{path}"/>' for path in outline), below]
    for number, label in enumerate(labels):
        x = LEFT + (RIGHT - LEFT) * number / (len(labels) - 1)
        anchor = "end" if number == len(labels) - 1 else "middle"
        parts.append(f'<text class="tick" x="{x:.1f}" y="{BOTTOM + 20}" text-anchor="{anchor}">{label}</text>')
    return parts


def _outline(values: np.ndarray, value_scale: "_Scale") -> str:
    """Path of the steps over the bins, from the left end of the axis to the right one."""
    width = (RIGHT - LEFT) / len(values)
    steps = "".join(f"V{value_scale(float(value)):.1f}H{LEFT + (i + 1) * width:.1f}" for i, value in enumerate(values))
    return f"M{LEFT} {BOTTOM}{steps}"


def _hue_strip(bins: int) -> str:
    width = (RIGHT - LEFT) / bins
    return "".join(f'<rect x="{LEFT + i * width:.1f}" y="{BOTTOM + 2}" width="{width + 0.3:.1f}" height="4" '
                   f'fill="hsl({360 * (i + 0.5) / bins:.0f} 80% 55%)"/>' for i in range(bins))


class _Scale:
    """A linear map from values to pixels, with both ends."""

    def __init__(self, low: float, high: float, from_px: float, to_px: float) -> None:
        if low == high:
            low, high = low - (abs(low) * 0.1 or 1), high + (abs(high) * 0.1 or 1)
        self.low, self.high, self.from_px, self.to_px = low, high, from_px, to_px

    def __call__(self, value: float) -> float:
        return self.from_px + (value - self.low) / (self.high - self.low) * (self.to_px - self.from_px)

    def ticks(self) -> list[float]:
        """Three to six round values inside the range."""
        span = self.high - self.low
        power = 10.0 ** math.floor(math.log10(span))
        step = next(power * m for m in (0.1, 0.2, 0.25, 0.5, 1, 2) if span / (power * m) <= 5)
        start = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(start, math.floor(self.high / step + 1e-9) + 1)]


def _value_range(lines: Sequence[Line], baseline: float | None) -> tuple[float, float]:
    raw = [np.percentile(line.values, SHOWN_PERCENTILES) for line in lines]
    level = [np.array([baseline])] if baseline is not None else []
    values = np.concatenate([*raw, *(line.smooth for line in lines), *level])
    return float(values.min()), float(values.max())


def _points(steps: np.ndarray, values: np.ndarray, step_scale: _Scale, value_scale: _Scale) -> str:
    kept = np.unique(np.linspace(0, len(steps) - 1, MAX_POINTS).round().astype(int))
    if len(kept) == 1:  # a line of one point shows nothing
        y = value_scale(float(values[0]))
        return f"{LEFT},{y:.1f} {RIGHT},{y:.1f}"
    kept_points = zip(steps[kept].tolist(), values[kept].tolist(), strict=True)
    return " ".join(f"{step_scale(step):.1f},{value_scale(value):.1f}" for step, value in kept_points)


def _axes(step_scale: _Scale | None, value_scale: _Scale, *, percent: bool = False, whole: bool = False) -> str:
    parts = []
    for value in value_scale.ticks():
        if whole and value != round(value):
            continue
        y = value_scale(value)
        label = f"{100 * value:.3g} %" if percent else format_number(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                     f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    if step_scale is None:
        return "".join(parts)
    for value in step_scale.ticks():
        if value == round(value):
            parts.append(f'<text class="tick" x="{step_scale(value):.1f}" y="{BOTTOM + 17}" '
                         f'text-anchor="middle">{format_number(value)}</text>')
    return "".join(parts)


def _baseline(level: float | None, value_scale: _Scale) -> str:
    if level is None:
        return ""
    y = value_scale(level)
    return f'<line class="baseline" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'


def _figure(title: str, shown: str, meaning: str, label: str, parts: Sequence[str]) -> str:
    """The frame of every chart; `shown` is printed next to the title, `label` is for screen readers."""
    return (f'<figure class="chart"><figcaption><b>{html.escape(title)}</b><span>{shown}</span>'
            f'<small>{html.escape(meaning)}</small></figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
            f'aria-label="{html.escape(label)}">{"".join(parts)}</svg></figure>')


def format_number(value: float) -> str:
    """In short form: 0.693, 12,000, 1e-5."""
    if value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
