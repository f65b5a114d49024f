"""Sections of numbers: win rates, LoRA weights, defects, colours, variety, counts, timings, artifacts."""

from collections.abc import Mapping, Sequence
from html import escape

from hgdpo_core.evaluate import Comparison
from hgdpo_core.progress import count_of
from hgdpo_core.rendering import parts
from hgdpo_core.rendering.charts import HISTOGRAMS, fraction_bar, histogram, interval_chart, rate_bar
from hgdpo_core.rendering.parts import NOTHING, percent, percent_interval, section, signed, signed_interval, split
from hgdpo_core.rendering.tables import Cell, Table, with_interval
from hgdpo_core.report.data import ReportData
from hgdpo_core.scorers import scorer_title
from hgdpo_core.statistics.colours import WEAK_RESULTANT, ColourChange
from hgdpo_core.statistics.intervals import Estimate

SCALE = '<p class="scale" aria-hidden="true"><span>0 %</span><span>50 %</span><span>100 %</span></p>'
UNDEFINED = "not defined"


def win_rates(data: ReportData) -> str:
    """Bars with error bars, the table in the form of the paper's Table 1, counts, and mean scores."""
    comparison, origin = data.comparison, "<small>used in training</small>"
    bars = "".join(f"<li><span>{escape(scorer_title(name))}</span><b>{percent(rate.rate)}</b>"
                   f"{origin if name == data.training_scorer else ''}{rate_bar(rate)}</li>"
                   for name, rate in comparison.win_rates.items())
    weight = "" if comparison.lora_weight is None else f" (LoRA weight {float(comparison.lora_weight)})"
    several = ("" if comparison.images_per_prompt == 1 else
               f" Each prompt's score is the mean over its {comparison.images_per_prompt} images.")
    personal = (f" Both models are personalised by one adapter, for {count_of(comparison.people, 'person', 'people')}."
                if comparison.people else "")
    intro = f"How often the tuned model{weight} scores above the target model.{several}{personal}"
    tables = _paper_table(comparison) + _tally(comparison) + _score_table(comparison)
    return section("Win rates", intro, f'<ul class="bars">{bars}</ul>{SCALE}{tables}')


def _paper_table(comparison: Comparison) -> str:
    """One row of the paper's Table 1, with intervals, which the paper omits."""
    return Table(("Tuned model", *map(scorer_title, comparison.win_rates)), [("vs. target", *_rate_cells(comparison))],
                 caption="In the form of the paper's Table 1: win rate by each scorer, the 95 % interval below.").html()


def _rate_cells(comparison: Comparison) -> list[Cell]:
    return [with_interval(percent(rate.rate), percent_interval(rate.ci_low, rate.ci_high))
            for rate in comparison.win_rates.values()]


def _tally(comparison: Comparison) -> str:
    several = comparison.images_per_prompt > 1 and not comparison.people
    rows = []
    for name, rate in comparison.win_rates.items():
        cells = [f"{count:,}" for count in (rate.wins, rate.losses, rate.ties, rate.n)]
        cells.append(parts.p_value(comparison.score_changes[name].sign_test_p))
        if several:
            cells.append(percent_interval(*(comparison.win_rate_intervals[name] or (None, None))))
        rows.append((scorer_title(name), *cells))
    columns = ["Scorer", "Wins", "Losses", "Ties", "Prompts", "p"]
    kind = "interval over people and prompts" if comparison.people else "Clopper-Pearson interval"
    caption = f"Win rate = wins / (wins + losses), {kind}; ties count apart. p: two-sided exact sign test."
    if several:
        columns.append("Bootstrap over prompts")
        caption += " The bootstrap resamples whole prompts."
    return Table(columns, rows, caption=caption).html()


def _score_table(comparison: Comparison) -> str:
    rows = [(scorer_title(name), f"{change.mean_b:.3f}", f"{change.mean_a:.3f}",
             with_interval(signed(change.mean, 3), signed_interval(change.ci_low, change.ci_high, 3)))
            for name, change in comparison.score_changes.items()]
    return Table(("Scorer", "Target", "Tuned", "Change"), rows, caption="Mean scores in each scorer's own units; below "
                 f"the change its paired 95 % interval over {_clusters(comparison)}.").html()


def _clusters(comparison: Comparison) -> str:
    """What intervals are over."""
    return "people and prompts" if comparison.people else "prompts"


def _interval_over(comparison: Comparison) -> str:
    return f"{'' if comparison.people else 'bootstrap '}interval over {_clusters(comparison)}"


def lora_weights(sweep: Sequence[Comparison]) -> str:
    """Win rates, defects, colours and variety by LoRA weight (paper Figure 8), with intervals; "" without a sweep."""
    if not sweep:
        return ""
    charts = "".join(_weight_chart(name, sweep) for name in sweep[0].win_rates)
    intro = ("The tuned model against the target at several weights of its LoRA. A higher weight changes the images "
             "more: look for the weight after which the win rate no longer grows, or variety falls.")
    return section("LoRA weight", intro, f'<div class="charts">{charts}</div>' + _weight_table(sweep))


def _weight_chart(scorer: str, sweep: Sequence[Comparison]) -> str:
    rates = [(f"{point.lora_weight:g}", point.win_rates[scorer]) for point in sweep]
    points = [(label, Estimate(rate.rate, rate.ci_low, rate.ci_high)) for label, rate in rates]
    return interval_chart(scorer_title(scorer), "win rate against the LoRA's weight; dashed: 50 %", points,
                          baseline=0.5)


def _weight_table(sweep: Sequence[Comparison]) -> str:
    titles = {name: scorer_title(name) for name in sweep[0].win_rates}
    columns = ["Weight", *titles.values(), *(f"Defective by {titles[name]}" for name in sweep[0].defects), "Saturation",
               "Value", "Variety"]
    rows = []
    for point in sweep:
        defective = (percent(point.defects[name].tuned) for name in sweep[0].defects)
        changes = (point.colour_change.saturation_percent, point.colour_change.value_percent, point.variety_change)
        rows.append((f"{point.lora_weight:g}", *_rate_cells(point), *defective, *(_change(one, 1) for one in changes)))
    return Table(columns, rows, caption="Win rates with their 95 % intervals; saturation, value and the variety of the "
                 "images as changes against the target.").html()


def _change(estimate: Estimate, digits: int, undefined: str = NOTHING) -> Cell:
    """A change in percent with its interval."""
    value = undefined if estimate.value is None else f"{signed(estimate.value, digits)} %"
    return with_interval(value, signed_interval(estimate.ci_low, estimate.ci_high, digits, " %"))


def defects(comparison: Comparison) -> str:
    """Fraction of defective images before and after."""
    bars, rows = [], []
    for name, change in comparison.defects.items():
        title = scorer_title(name)
        for model, fraction in (("target", change.target), ("tuned", change.tuned)):
            bars.append(f"<li><span>{escape(title)}: {model}</span><b>{percent(fraction)}</b>"
                        f"{fraction_bar(fraction, model)}</li>")
        low, high = (None if end is None else 100 * end for end in (change.ci_low, change.ci_high))
        rows.append((title, f"{change.below:g}", percent(change.target), percent(change.tuned),
                     with_interval(f"{signed(100 * change.difference, 1)} points", signed_interval(low, high, 1))))
    intro = "An image that scores below the scorer's own limit counts as defective. Lower is better."
    table = Table(("Scorer", "Limit", "Target", "Tuned", "Difference"), rows, caption="The difference is tuned minus "
                  f"target, in percentage points; below it its 95 % {_interval_over(comparison)}.")
    return (section("Defective images", intro, f'<ul class="bars">{"".join(bars)}</ul>{SCALE}{table.html()}')
            if rows else "")


def colours(comparison: Comparison) -> str:
    """The shift of the colours with intervals, and their distributions."""
    shift, change = comparison.colour_shift, comparison.colour_change
    degrees = UNDEFINED if shift.hue_degrees is None else f"{signed(shift.hue_degrees, 2)}°"
    interval = signed_interval(change.hue_degrees.ci_low, change.hue_degrees.ci_high, 1, "°")
    rows = [("Hue as an angle", with_interval(degrees, interval), NOTHING)]
    for name in ("hue", "saturation", "value"):
        size = getattr(shift, name)
        rows.append((name.capitalize(), _change(getattr(change, f"{name}_percent"), 2, UNDEFINED),
                     UNDEFINED if size is None else f"{size:.2f} %"))
    table = Table(("Channel", "Change", "As in the paper"), rows, caption="Tuned against target over all pixels of the "
                  f"evaluation images; below each change its 95 % {_interval_over(comparison)}. The last column "
                  "compares with the paper's Table 2.").html()
    intro = ("A value of 0 means no shift. For hue, which is an angle, use the first row: the shift of the mean "
             "weighted by saturation, + from red towards yellow. The other rows are plain means over pixels; the paper "
             "prints their absolute values.")
    note = f'<p class="intro">{escape(_weak_hue(change))}</p>' if change.hue_is_weak else ""
    charts = "".join(histogram(spec, comparison.target_histograms, comparison.tuned_histograms) for spec in HISTOGRAMS)
    return section("Colours", intro, split(table, f'<div class="charts">{charts}</div>{note}', (2, 3)))


def _weak_hue(change: ColourChange) -> str:
    lengths = ["none" if length is None else f"{length:.2f}"
               for length in (change.target_hue_resultant, change.tuned_hue_resultant)]
    return (f"The hues of these images nearly cancel out: their resultant lengths are {lengths[0]} and {lengths[1]}, "
            f"where 1 is a single hue; below {WEAK_RESULTANT:g} the mean hue has hardly a direction. The angle may "
            "change a lot without a visible change: use its interval, and the rows below it.")


def counts(numbers: Mapping[str, int]) -> str:
    """Numbers of prompts, images, triplets and so on."""
    items = "".join(f"<div><dt>{escape(parts.words(name))}</dt><dd>{count:,}</dd></div>"
                    for name, count in numbers.items())
    return section("Counts", "", f'<dl class="counts">{items}</dl>') if numbers else ""


def timings(seconds: Mapping[str, float]) -> str:
    """Time by stage, in the run that made it."""
    total = sum(seconds.values())
    rows = [(parts.words(stage), parts.duration(value), f"{100 * value / total if total else 0:.0f} %")
            for stage, value in seconds.items()]
    rows.append(("Total", parts.duration(total), ""))
    return Table(("Stage", "Time", "Fraction"), rows, "Timings", caption="Time by stage, in the run that made "
                 "it.").section() if seconds else ""


def artifacts(locations: Mapping[str, str]) -> str:
    """The results of the run, and where they are."""
    rows = [(parts.words(name), Cell(location, code=True)) for name, location in locations.items()]
    caption = f"{count_of(len(rows), 'location')} in the object store."
    return Table(("Artifact", "Location"), rows, "Artifacts", caption=caption).section() if rows else ""


def variety(change: Estimate) -> str:
    """Whether the images still differ from each other."""
    if change.value is None:
        return ""
    text = (f"The spread of the tuned model's images changed by {signed(change.value, 1)} % of the target's (95 % "
            f"interval {signed_interval(change.ci_low, change.ci_high, 1, ' %')}): the distance of 8 x 8 thumbnails "
            "from their mean, over the images of a prompt, or over all prompts if each has one image. A value far "
            "below 0 means that the images of the tuned model have become alike.")
    return section("Variety", "", f"<p>{parts.sentence(text)}</p>")
