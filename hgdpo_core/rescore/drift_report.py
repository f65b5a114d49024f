"""The report of a night of scoring again, as Markdown and as one HTML page that loads nothing from elsewhere."""

from collections.abc import Mapping
from html import escape
from typing import Any

from hgdpo_core.rendering.charts import count_chart
from hgdpo_core.rendering.grids import format_score
from hgdpo_core.rendering.html import html_page
from hgdpo_core.rendering.parts import count_of
from hgdpo_core.rendering.tables import Table

MAX_CHARTED = 12  # pools; rankings first, every evaluation has two pools without one

Report = Mapping[str, Any]


def headline(report: Report) -> str:
    """The night in one or two sentences."""
    images = sum(pool["images_scored"] for pool in report["pools"])
    pools = len({pool["pool_id"] for pool in report["pools"]})
    text = f"{count_of(images, 'image')} of {count_of(pools, 'pool')} scored"
    ranked = [pool["ranking"] for pool in report["pools"] if pool["ranking"]]
    paired = sum(ranking["pairs_compared"] for ranking in ranked)
    if paired:
        flipped = sum(ranking["winner_or_loser_flipped"]["prompts"] for ranking in ranked)
        text += f"; winner or loser changed for {_share(flipped, paired, ' prompts')}"
    text += f"; {count_of(len(report['triplets']), 'data set')} of triplets ranked"
    return f"{text}. Nothing was trained."


def drift_rows(report: Report) -> list[dict[str, Any]]:
    """A row of plain numbers for every pool and scorer."""
    rows = []
    for pool in report["pools"]:
        ranking, before = pool["ranking"] or {}, pool["scores_before"] or {}
        rows.append({
            "pool": pool["pool_id"], "scorer": pool["scorer"], "images_scored": pool["images_scored"],
            "prompts_compared": pool["prompts_compared"], "tau_mean": ranking.get("tau", {}).get("mean"),
            "tau_min": ranking.get("tau", {}).get("min"),
            "winner_flipped": ranking.get("winner_flipped", {}).get("share"),
            "loser_flipped": ranking.get("loser_flipped", {}).get("share"), "mean_before": before.get("mean"),
            "mean_now": pool["scores_now"]["mean"]})
    return rows


def render_markdown(report: Report) -> str:
    """The report as GitHub and the Prefect UI show it."""
    parts = [f"# Scored again, {report['night']}", headline(report),
             f"Root: `{report['root']}`; started {report['started_at']}, finished {report['finished_at']}."]
    return "\n\n".join([*parts, *(table.markdown() for table in _tables(report))]) + "\n"


def render_html(report: Report) -> str:
    """The report with histograms of tau and of the scores; texts are shown as texts, never as markup."""
    sections = "".join(table.section() for table in _tables(report))
    pools = sorted(report["pools"], key=lambda pool: pool["ranking"] is None)
    charts = "".join(_pool_charts(pool) for pool in pools[:MAX_CHARTED])
    if charts:
        more = f"<p>The first {MAX_CHARTED} of {len(pools)} pools.</p>" if len(pools) > MAX_CHARTED else ""
        charts = f'<section><h2>Distributions</h2>{more}<div class="charts">{charts}</div></section>\n'
    title = f"Scored again, {report['night']}"
    header = f"""<p class="eyebrow">HG-DPO · scoring again</p>
<h1>{escape(title)}</h1>
<p class="lead">{escape(headline(report))}</p>
<p class="meta">{escape(report["started_at"])} to {escape(report["finished_at"])} ·
<code>{escape(report["root"])}</code></p>"""
    return html_page(title, header, charts + sections)


def _tables(report: Report) -> list[Table]:
    tables = (_rankings(report), _scores(report), _worst(report), _triplets(report), _evaluations(report),
              _scorers(report), _skipped(report))
    return [table for table in tables if table.rows]


def _rankings(report: Report) -> Table:
    rows = []
    for pool in report["pools"]:
        if pool["ranking"] is None:
            continue
        ranking, tau = pool["ranking"], pool["ranking"]["tau"]
        flips = (_share(ranking[name]["prompts"], ranking["pairs_compared"])
                 for name in ("winner_flipped", "loser_flipped"))
        rows.append((pool["pool_id"], pool["scorer"], f"{ranking['prompts']:,}", _tau(tau["mean"]), _tau(tau["median"]),
                     _tau(tau["min"]), *flips, f"{ranking['pairs_lost']} / {ranking['pairs_gained']}"))
    return Table(("Pool", "Scorer", "Prompts", "Tau, mean", "Median", "Lowest", "Winner changed", "Loser changed",
                  "Pairs lost / gained"), rows, "Rankings",
                 ["Kendall's tau of each prompt's candidates, by the scores before and now: 1 for the same ranking, 0 "
                  "for no relation, -1 for the reversed one."])


def _scores(report: Report) -> Table:
    rows = []
    for pool in report["pools"]:
        before, now = pool["scores_before"], pool["scores_now"]
        rows.append((pool["pool_id"], pool["scorer"], f"{pool['images_scored']:,}",
                     "no earlier scores" if before is None else _spread(before), _spread(now),
                     "" if before is None else _shift(before, now), f"{now['not_finite']:,}"))
    return Table(("Pool", "Scorer", "Images scored", "Before", "Now", "Shift", "Not finite"), rows, "Scores",
                 ["Mean and standard deviation over all images that have both scores; the shift is in standard "
                  "deviations of the scores before. Scores of different scorers need not share a scale."])


def _worst(report: Report) -> Table:
    rows = [(worst["prompt"], pool["scorer"], _tau(worst["tau"]), " → ".join(map(str, worst["winner"])),
             " → ".join(map(str, worst["loser"]))) for pool in report["pools"] for worst in pool["worst_prompts"]]
    return Table(("Prompt", "Scorer", "Tau", "Winner", "Loser"), rows, "Prompts that moved most",
                 ["The lowest tau of each pool; winner and loser are places in the pool, counted from 0, before and "
                  "now; -1: the pool has no pair."])


def _triplets(report: Report) -> Table:
    rows = [(item["triplets"], item["replaces"] or "none", f"{item['rows']:,}", f"{item['rejected']:,}",
             _share(item["same_pair"], item["prompts_compared"])) for item in report["triplets"]]
    return Table(("Data set", "Before", "Triplets", "Pools without a pair", "Same pair"), rows, "Data sets of triplets",
                 ["Ranked by the scores of now. The ones before stay; nothing is trained on either until you start "
                  "it."])


def _evaluations(report: Report) -> Table:
    rows = [(item["evaluation_id"], item["scorer"], _rate(item["before"]), _rate(item["now"]))
            for item in report["evaluations"]]
    return Table(("Evaluation", "Scorer", "Before", "Now"), rows, "Win rates",
                 ["Of the tuned model over its target, on evaluation images that were scored again; evaluations/ keeps "
                  "what it said."])


def _scorers(report: Report) -> Table:
    rows = [(item["name"], item["source"] or "public checkpoint", item["dtype"], item["fingerprint"][:12])
            for item in report["scorers"]]
    return Table(("Scorer", "Source", "Precision", "Version"), rows, "Scorers",
                 ["The version that scored, as the start of its fingerprint."])


def _skipped(report: Report) -> Table:
    return Table(("What", "Reason"), [(item["what"], item["reason"]) for item in report["skipped"]], "Left alone",
                 ["What was not scored or not ranked, and why."])


def _pool_charts(pool: Mapping[str, Any]) -> str:
    name, histogram = f"{pool['scorer']}, pool {pool['pool_id']}", pool["histogram"]
    charts = ""
    if pool["ranking"] is not None:
        tau = pool["ranking"]["tau"]
        charts += count_chart("Kendall's tau", f"{name}: prompts by tau; mean {_tau(tau['mean'])}", (-1, 1),
                              tau["histogram"])
    if histogram["edges"]:
        ends = (histogram["edges"][0], histogram["edges"][-1])
        before, now = histogram["before"], histogram["now"]
        meaning = f"{name}: images by score" + (". Area: before, line: now" if before else "")
        charts += count_chart("Scores", meaning, ends, *((before, now) if before else (now,)))
    return charts


def _share(part: int, whole: int, noun: str = "") -> str:
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
    if rate is None:
        return "not measured"
    if rate["rate"] is None:
        return f"no win, no loss ({rate['ties']} ties)"
    return (f"{100 * rate['rate']:.1f} % ({100 * rate['ci_low']:.1f} to {100 * rate['ci_high']:.1f} %; "
            f"{rate['wins']} wins, {rate['losses']} losses, {rate['ties']} ties)")
