"""The report of a rescore run, as Markdown and as one self-contained HTML page."""

from collections.abc import Mapping
from html import escape
from typing import Any

from hgdpo_core.progress import count_of
from hgdpo_core.rendering.charts import count_chart
from hgdpo_core.rendering.grids import format_score
from hgdpo_core.rendering.html import html_page
from hgdpo_core.rendering.parts import describe_rate
from hgdpo_core.rendering.tables import Table

MAX_CHARTED = 12  # pools; those with rankings first: an evaluation has two pools without one
FLIPS = ("winner_flipped", "loser_flipped")

Report = Mapping[str, Any]


def headline(report: Report) -> str:
    """The rescore run in one or two sentences."""
    images = sum(pool["images_scored"] for pool in report["pools"])
    pools = len({pool["pool_id"] for pool in report["pools"]})
    text = f"{count_of(images, 'image')} of {count_of(pools, 'pool')} scored"
    ranked = [pool["ranking"] for pool in report["pools"] if pool["ranking"]]
    paired = sum(ranking["pairs_compared"] for ranking in ranked)
    if paired:
        flipped = sum(ranking["winner_or_loser_flipped"]["prompts"] for ranking in ranked)
        text += f"; winner or loser changed for {_fraction(flipped, paired, ' prompts')}"
    text += f"; {count_of(len(report['triplets']), 'data set')} of triplets ranked"
    return f"{text}. Nothing was trained."


def drift_rows(report: Report) -> list[dict[str, Any]]:
    """A row of plain numbers for every pool and scorer."""
    rows = []
    for pool in report["pools"]:
        ranking, before = pool["ranking"] or {"tau": {}}, pool["scores_before"] or {}
        rows.append({
            "pool": pool["pool_id"], **{name: pool[name] for name in ("scorer", "images_scored", "prompts_compared")},
            "tau_mean": ranking["tau"].get("mean"), "tau_min": ranking["tau"].get("min"),
            **{name: ranking.get(name, {}).get("share") for name in FLIPS},
            "mean_before": before.get("mean"), "mean_now": pool["scores_now"]["mean"]})
    return rows


def render_markdown(report: Report) -> str:
    """The report as GitHub and the Prefect UI show it."""
    parts = [f"# Scored again, {report['night']}", headline(report),
             f"Root: `{report['root']}`; started {report['started_at']}, finished {report['finished_at']}."]
    return "\n\n".join([*parts, *(table.markdown() for table in _tables(report))]) + "\n"


def render_html(report: Report) -> str:
    """The report with histograms of tau and of the scores. Texts are escaped."""
    sections = "".join(table.section() for table in _tables(report))
    pools = sorted(report["pools"], key=lambda pool: pool["ranking"] is None)
    charts = "".join(_pool_charts(pool) for pool in pools[:MAX_CHARTED])
    if charts:
        more = f"<p>The first {MAX_CHARTED} of {len(pools)} pools.</p>" if len(pools) > MAX_CHARTED else ""
        charts = f'<section><h2>Distributions</h2>{more}<div class="charts">{charts}</div></section>\n'
    times = f"{report['started_at']} to {report['finished_at']}"
    below = f'<p class="meta">{escape(times)} ·\n<code>{escape(report["root"])}</code></p>'
    return html_page(f"Scored again, {report['night']}", eyebrow="HG-DPO · scoring again", lead=headline(report),
                     below=below, main=charts + sections)


def _tables(report: Report) -> list[Table]:
    makers = (_rankings, _scores, _worst, _triplets, _evaluations, _scorers, _skipped)
    return [table for make in makers if (table := make(report)).rows]


def _rankings(report: Report) -> Table:
    rows = []
    for pool in (pool for pool in report["pools"] if pool["ranking"] is not None):
        ranking = pool["ranking"]
        taus = (_tau(ranking["tau"][name]) for name in ("mean", "median", "min"))
        flips = (_fraction(ranking[name]["prompts"], ranking["pairs_compared"]) for name in FLIPS)
        rows.append((pool["pool_id"], pool["scorer"], f"{ranking['prompts']:,}", *taus, *flips,
                     f"{ranking['pairs_lost']} / {ranking['pairs_gained']}"))
    return Table(("Pool", "Scorer", "Prompts", "Tau, mean", "Median", "Lowest", "Winner changed", "Loser changed",
                  "Pairs lost / gained"), rows, "Rankings",
                 ["Kendall's tau between the scores before and now of a prompt's candidates: 1 for the same ranking, 0 "
                  "for unrelated rankings, -1 for the reversed ranking."])


def _scores(report: Report) -> Table:
    rows = []
    for pool in report["pools"]:
        before, now = pool["scores_before"], pool["scores_now"]
        rows.append((pool["pool_id"], pool["scorer"], f"{pool['images_scored']:,}",
                     "no earlier scores" if before is None else _spread(before), _spread(now),
                     "" if before is None else _shift(before, now), f"{now['not_finite']:,}"))
    return Table(("Pool", "Scorer", "Images scored", "Before", "Now", "Shift", "Not finite"), rows, "Scores",
                 ["Mean and standard deviation over all images that have both scores; the shift is in standard "
                  "deviations of the scores before. Different scorers may have different scales."])


def _worst(report: Report) -> Table:
    rows = [(worst["prompt"], pool["scorer"], _tau(worst["tau"]), " → ".join(map(str, worst["winner"])),
             " → ".join(map(str, worst["loser"]))) for pool in report["pools"] for worst in pool["worst_prompts"]]
    return Table(("Prompt", "Scorer", "Tau", "Winner", "Loser"), rows, "Prompts that changed most",
                 ["The lowest tau of each pool. Winner and loser are indices of images in the pool, from 0, before and "
                  "now; -1: the pool has no pair."])


def _triplets(report: Report) -> Table:
    rows = [(item["triplets"], item["replaces"] or "none", f"{item['rows']:,}", f"{item['rejected']:,}",
             _fraction(item["same_pair"], item["prompts_compared"])) for item in report["triplets"]]
    return Table(("Data set", "Before", "Triplets", "Pools without a pair", "Same pair"), rows, "Data sets of triplets",
                 ["Ranked by the current scores. Earlier data sets are kept, and no training is started."])


def _evaluations(report: Report) -> Table:
    rows = [(item["evaluation_id"], item["scorer"], _rate(item["before"]), _rate(item["now"]))
            for item in report["evaluations"]]
    return Table(("Evaluation", "Scorer", "Before", "Now"), rows, "Win rates",
                 ["Of the tuned model over its target, on evaluation images that were scored again; evaluations/ is "
                  "not changed."])


def _scorers(report: Report) -> Table:
    rows = [(item["name"], item["source"] or "public checkpoint", item["dtype"], item["fingerprint"][:12])
            for item in report["scorers"]]
    return Table(("Scorer", "Source", "Precision", "Version"), rows, "Scorers",
                 ["Version: the start of the fingerprint of the weights."])


def _skipped(report: Report) -> Table:
    return Table(("What", "Reason"), [(item["what"], item["reason"]) for item in report["skipped"]], "Skipped",
                 ["What was not scored or not ranked, and why."])


def _pool_charts(pool: Mapping[str, Any]) -> str:
    name, histogram = f"{pool['scorer']}, pool {pool['pool_id']}", pool["histogram"]
    charts = ""
    if pool["ranking"] is not None:
        tau = pool["ranking"]["tau"]
        charts += count_chart("Kendall's tau", f"{name}: prompts by tau; mean {_tau(tau['mean'])}", (-1, 1),
                              tau["histogram"])
    if edges := histogram["edges"]:
        sides = [counts for counts in (histogram["before"], histogram["now"]) if counts]
        meaning = f"{name}: images by score" + (". Area: before, line: now" if len(sides) > 1 else "")
        charts += count_chart("Scores", meaning, (edges[0], edges[-1]), *sides)
    return charts


def _fraction(part: int, whole: int, noun: str = "") -> str:
    return f"{part:,} of {whole:,}{noun}" + (f" ({100 * part / whole:.1f} %)" if whole else "")


def _tau(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"


def _spread(scores: Mapping[str, Any]) -> str:
    return "no score" if scores["mean"] is None else f"{format_score(scores['mean'])} ± {format_score(scores['std'])}"


def _shift(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if before["mean"] is None or now["mean"] is None or not before["std"]:
        return ""
    return f"{(now['mean'] - before['mean']) / before['std']:+.2f}"


def _rate(rate: Mapping[str, Any] | None) -> str:
    return "not measured" if rate is None else describe_rate(rate)
