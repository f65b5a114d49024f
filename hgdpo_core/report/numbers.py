"""Sections of numbers: who wins, defects, colours, counts, timings, artifacts."""

from collections.abc import Mapping
from html import escape

from hgdpo_core.metrics import ColourShift
from hgdpo_core.rendering.charts import HISTOGRAMS, histogram, rate_bar, share_bar
from hgdpo_core.rendering.parts import (
    NOTHING,
    count_of,
    duration,
    p_value,
    percent,
    rate_interval,
    section,
    sentence,
    signed,
    span,
    words,
)
from hgdpo_core.rendering.tables import Cell, Table, with_interval
from hgdpo_core.report.data import ReportData
from hgdpo_core.scorers import scorer_title
from hgdpo_core.statistics.colours import WEAK_RESULTANT, ColourChange, ColourHistograms
from hgdpo_core.statistics.intervals import DefectChange, Estimate

SCALE = '<p class="scale" aria-hidden="true"><span>0 %</span><span>50 %</span><span>100 %</span></p>'


def win_rates(data: ReportData) -> str:
    """Bars with error bars, the table in the shape of the paper's Table 1, counts, and mean scores."""
    if not data.win_rates:
        return ""
    bars = "".join(f"<li><span>{escape(scorer_title(name))}</span><b>{percent(rate.rate)}</b>"
                   f"{_origin(data, name)}{rate_bar(rate)}</li>" for name, rate in data.win_rates.items())
    weight = "" if data.lora_weight is None else f" (LoRA weight {float(data.lora_weight)})"
    several = ("" if data.images_per_prompt == 1 else
               f" Each prompt's score is the mean over its {data.images_per_prompt} images.")
    intro = f"How often the tuned model{weight} scores above the target model.{several}"
    shown = [_paper_table(data), _tally(data), _score_table(data)]
    return section("Win rates", intro, f'<ul class="bars">{bars}</ul>{SCALE}{"".join(shown)}')


def _paper_table(data: ReportData) -> str:
    """One row of the paper's Table 1, with the interval that it leaves out."""
    cells = [with_interval(percent(rate.rate), rate_interval(rate)) for rate in data.win_rates.values()]
    return Table(("Tuned model", *(scorer_title(name) for name in data.win_rates)), [("vs. target", *cells)],
                 caption="As the paper's Table 1 prints it: win rate by each scorer, the 95 % interval below.").html()


def _tally(data: ReportData) -> str:
    several = data.images_per_prompt > 1
    rows = []
    for name, rate in data.win_rates.items():
        cells = [f"{count:,}" for count in (rate.wins, rate.losses, rate.ties, rate.n)]
        change = data.score_changes.get(name)
        cells.append(NOTHING if change is None else p_value(change.sign_test_p))
        if several:
            low, high = data.win_rate_intervals.get(name) or (None, None)
            cells.append(span(low, high, lambda end: f"{100 * end:.1f}") + ("" if low is None else " %"))
        rows.append((scorer_title(name), *cells))
    columns = ["Scorer", "Wins", "Losses", "Ties", "Prompts", "p"]
    caption = ("Win rate = wins / (wins + losses), Clopper-Pearson interval; ties count apart. p: two-sided exact sign "
               "test.")
    if several:
        columns.append("Bootstrap over prompts")
        caption += " The bootstrap resamples whole prompts."
    return Table(columns, rows, caption=caption).html()


def _score_table(data: ReportData) -> str:
    if not data.score_changes:
        return ""
    rows = [(scorer_title(name), f"{change.mean_b:.3f}", f"{change.mean_a:.3f}",
             with_interval(signed(change.mean, 3), span(change.ci_low, change.ci_high, lambda end: signed(end, 3))))
            for name, change in data.score_changes.items()]
    return Table(("Scorer", "Target", "Tuned", "Change"), rows, caption="Mean scores in each scorer's own units; below "
                 "the change its paired 95 % interval over prompts.").html()


def defects(changes: Mapping[str, DefectChange]) -> str:
    """Share of defective images before and after."""
    bars, rows = [], []
    for name, change in changes.items():
        title = scorer_title(name)
        for who, share in (("target", change.target), ("tuned", change.tuned)):
            bars.append(f"<li><span>{escape(title)}: {who}</span><b>{percent(share)}</b>{share_bar(share, who)}</li>")
        interval = span(change.ci_low, change.ci_high, lambda end: signed(100 * end, 1))
        rows.append((title, f"{change.below:g}", percent(change.target), percent(change.tuned),
                     with_interval(f"{signed(100 * change.difference, 1)} points", interval)))
    intro = "An image that scores below the scorer's own limit counts as defective. Less is better."
    table = Table(("Scorer", "Limit", "Target", "Tuned", "Difference"), rows, caption="The difference is tuned minus "
                  "target, in percentage points; below it its 95 % bootstrap interval over prompts.")
    return (section("Defective images", intro, f'<ul class="bars">{"".join(bars)}</ul>{SCALE}{table.html()}')
            if rows else "")


def colours(shift: ColourShift | None, change: ColourChange | None,
            histograms: tuple[ColourHistograms, ColourHistograms] | None) -> str:
    """How far the colours moved, with intervals, and how they are spread."""
    if shift is None:
        return ""
    estimates = (None,) * 4 if change is None else (
        change.hue_degrees, change.hue_percent, change.saturation_percent, change.value_percent)
    names = ("Hue as an angle", "Hue", "Saturation", "Value")
    sizes = (None, shift.hue, shift.saturation, shift.value)
    rows = [(name, *_colour_cells(name, shift, size, estimate))
            for name, size, estimate in zip(names, sizes, estimates, strict=True)]
    shown = Table(("Channel", "Change", "As in the paper"), rows, caption="Tuned against target over all pixels of the "
                  "evaluation images; below each change its 95 % bootstrap interval over prompts. The last column "
                  "compares with the paper's Table 2.").html()
    intro = ("No shift is 0. Hue is an angle, so its first row counts: a mean weighted by saturation, + from red "
             "towards yellow. The other rows are plain means over pixels; the paper prints their size without a sign.")
    note = f'<p class="intro">{escape(_weak_hue(change))}</p>' if change is not None and change.hue_is_weak else ""
    charts = "" if histograms is None else (
        f'<div class="charts">{"".join(histogram(spec, *histograms) for spec in HISTOGRAMS)}</div>')
    return section("Colours", intro, shown + note + charts)


def _colour_cells(name: str, shift: ColourShift, size: float | None,
                  estimate: Estimate | None) -> tuple[str | Cell, str]:
    undefined = "not defined"
    if name == "Hue as an angle":
        value = undefined if shift.hue_degrees is None else f"{signed(shift.hue_degrees, 2)}°"
        low, high = (None, None) if estimate is None else (estimate.ci_low, estimate.ci_high)
        return with_interval(value, span(low, high, lambda end: f"{signed(end, 1)}°")), NOTHING
    paper = undefined if size is None else f"{size:.2f} %"
    if estimate is None:
        return NOTHING, paper
    value = undefined if estimate.value is None else f"{signed(estimate.value, 2)} %"
    interval = span(estimate.ci_low, estimate.ci_high, lambda end: f"{signed(end, 2)} %")
    return with_interval(value, interval), paper


def _weak_hue(change: ColourChange) -> str:
    lengths = ["none" if length is None else f"{length:.2f}"
               for length in (change.target_hue_resultant, change.tuned_hue_resultant)]
    return (f"The hues of these images nearly cancel out: their resultant lengths are {lengths[0]} and {lengths[1]}, "
            f"where 1 is one hue and below {WEAK_RESULTANT:g} the mean hue has hardly a direction. So the angle may "
            "turn far without a visible change: trust its interval, and the rows below it.")


def counts(numbers: Mapping[str, int]) -> str:
    """How much of everything there was."""
    items = "".join(f"<div><dt>{escape(words(name))}</dt><dd>{count:,}</dd></div>" for name, count in numbers.items())
    return section("Counts", "", f'<dl class="counts">{items}</dl>') if numbers else ""


def timings(seconds: Mapping[str, float]) -> str:
    """Time by stage; what was found again took none."""
    total = sum(seconds.values())
    rows = [(words(stage), duration(value), f"{100 * value / total if total else 0:.0f} %")
            for stage, value in seconds.items()]
    rows.append(("Total", duration(total), ""))
    table = Table(("Stage", "Time", "Share"), rows, caption="Time by stage; what was found again took none.")
    return section("Timings", "", table.html()) if seconds else ""


def artifacts(places: Mapping[str, str]) -> str:
    """What the run left, and where."""
    rows = [(words(name), Cell(place, code=True)) for name, place in places.items()]
    table = Table(("Artifact", "Place"), rows, caption=f"{count_of(len(rows), 'place')} in the object store.")
    return section("Artifacts", "", table.html()) if rows else ""


def variety(change: Estimate | None) -> str:
    """Whether the images still differ from each other."""
    if change is None or change.value is None:
        return ""
    interval = span(change.ci_low, change.ci_high, lambda end: f"{signed(end, 1)} %")
    text = (f"The spread of the tuned model's images changed by {signed(change.value, 1)} % of the target's (95 % "
            f"interval {interval}): the distance of 8 x 8 thumbnails from their mean, over the images of a prompt, or "
            "over all prompts where each has one image. Far below 0, a model paints everything alike.")
    return section("Variety", "", f"<p>{sentence(text)}</p>")


def _origin(data: ReportData, name: str) -> str:
    return "<small>ranked the training pools</small>" if name == data.training_judge else ""
