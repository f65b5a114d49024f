"""The section on LoRA weights: what more of the LoRA gains, and what it costs (paper Figure 8)."""

from collections.abc import Sequence

from hgdpo_core.evaluate import Comparison
from hgdpo_core.rendering.charts import IntervalPoint, interval_chart
from hgdpo_core.rendering.parts import NOTHING, percent, rate_interval, section, signed, span
from hgdpo_core.rendering.tables import Cell, Table, with_interval
from hgdpo_core.scorers import scorer_title
from hgdpo_core.statistics.intervals import Estimate


def lora_weights(sweep: Sequence[Comparison]) -> str:
    """Win rates, defects, colours and variety by weight, with intervals; "" without a sweep."""
    if not sweep:
        return ""
    charts = "".join(_chart(name, sweep) for name in sweep[0].win_rates)
    intro = ("The tuned model against the target at several weights of its LoRA. More weight moves the images further: "
             "look for the weight after which the win rate no longer grows, or variety falls.")
    return section("LoRA weight", intro, f'<div class="charts">{charts}</div>' + _table(sweep))


def _chart(scorer: str, sweep: Sequence[Comparison]) -> str:
    points = [IntervalPoint(_weight(point), rate.rate, rate.ci_low, rate.ci_high)
              for point in sweep if (rate := point.win_rates[scorer]).rate is not None]
    return interval_chart(scorer_title(scorer), "win rate against the LoRA's weight; dashed: 50 %", points,
                          baseline=0.5)


def _table(sweep: Sequence[Comparison]) -> str:
    scorers, inspectors = list(sweep[0].win_rates), list(sweep[0].defects)
    titles = {name: scorer_title(name) for name in scorers}
    columns = ["Weight", *titles.values(), *(f"Defective by {titles[name]}" for name in inspectors), "Saturation",
               "Value", "Variety"]
    rows = [(_weight(point),
             *(with_interval(percent(rate.rate), rate_interval(rate)) for rate in point.win_rates.values()),
             *(percent(point.defects[name].tuned) for name in inspectors),
             *(_change(estimate) for estimate in (point.colour_change.saturation_percent,
                                                  point.colour_change.value_percent, point.variety_change)))
            for point in sweep]
    return Table(columns, rows, caption="Win rates with their 95 % intervals; saturation, value and the variety of the "
                 "images as changes against the target.").html()


def _change(estimate: Estimate) -> str | Cell:
    if estimate.value is None:
        return NOTHING
    interval = span(estimate.ci_low, estimate.ci_high, lambda end: f"{signed(end, 1)} %")
    return with_interval(f"{signed(estimate.value, 1)} %", interval)


def _weight(point: Comparison) -> str:
    return f"{point.lora_weight:g}"
