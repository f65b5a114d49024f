"""`hgdpo rescore` and `hgdpo score`."""

import argparse
import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flows.terminal import call_opened, open_store, plan_text, terminal_bar


def rescore(options: argparse.Namespace) -> int:
    """Score again the pools whose scores are missing or come from a scorer that changed; report the drift."""
    from flows.parameters import RESCORE, values_of
    from hgdpo_core.rescore.plan import plan_root
    from hgdpo_core.rescore.rescore_run import find_unfinished, last_report

    store = open_store(options.root)
    store.check_writable()
    inputs = {"root": store.root, "names": options.scorers, "preset": options.preset,
              "overrides": options.overrides, "verify": options.verify}
    plan = plan_root(**inputs)
    _print_skipped([item.model_dump() for item in plan.skipped])
    if options.plan_only:
        print(plan_text(f"re-scoring {store.root}", plan.rows(), plan.rows() if options.json else None))
        return 0
    if plan.nothing_to_do and find_unfinished(store) is None:
        report = last_report(store)
        print(plan.describe().capitalize() + (f"\nLast report: {store.url(report)}" if report else ""))
        return 0
    from flows.rescore import hgdpo_rescore

    parameters = {**values_of(options, RESCORE), "root": store.root}
    _print_rescore(call_opened(hgdpo_rescore, parameters, plan_root, inputs, plan))
    return 0


def score(options: argparse.Namespace) -> int:
    """Score image files, or all pools of a root."""
    if options.images:
        return _score_files(options)
    if options.prompt or options.csv:
        from hgdpo_core.errors import ConfigError

        raise ConfigError("--prompt and --csv go with image files: name an image or a folder of them")
    return _score_pools(options)


def _score_files(options: argparse.Namespace) -> int:
    from hgdpo_core.config import ScorerConfig
    from hgdpo_core.rescore.plan import find_versions
    from hgdpo_core.rescore.requested import RequestedScorer, requested_scorers
    from hgdpo_core.rescore.score_images import images_to_score, score_images

    images = images_to_score(options.images, options.prompt)
    store = open_store(options.root) if options.root else None
    requested = requested_scorers(store, names=options.scorers, preset=options.preset, overrides=options.overrides)
    requested = requested or [RequestedScorer(scorer=ScorerConfig())]
    find_versions(requested, required=True)
    scorers = [item.scorer for item in requested]
    columns = {}
    for scorer in scorers:
        with terminal_bar(scorer.name) as progress:
            columns[scorer.name] = score_images(images, scorer, progress=progress)
    rows = [{"file": str(image.path), "prompt": image.caption,
             **{name: scored[number].score for name, scored in columns.items()}}
            for number, image in enumerate(images)]
    first = scorers[0].name
    rows.sort(key=lambda row: -math.inf if math.isnan(row[first]) else row[first], reverse=True)
    if options.csv:
        with Path(options.csv).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    _print_table([{**{name: _number(row[name]) for name in columns}, "file": Path(row["file"]).name,
                   "prompt": _shorten(row["prompt"])} for row in rows])
    for scored in columns[first]:
        if scored.problem is not None:
            print(f"no score: {scored.image.path}: {scored.problem}")
    return 0


def _score_pools(options: argparse.Namespace) -> int:
    from hgdpo_core.rescore import score_missing, summarise_pools
    from hgdpo_core.rescore.plan import plan_requested

    store = open_store(options.root)
    plan = plan_requested(store, options.scorers, preset=options.preset, overrides=options.overrides)
    skipped = list(plan.skipped)
    for version, jobs in plan.by_version():
        with terminal_bar(version.scorer.name) as progress:
            skipped += score_missing(store, jobs, progress=progress)
    rows = summarise_pools(store, plan)
    _print_table([{name: _number(value) if isinstance(value, float) else str(value) for name, value in row.items()}
                  for row in rows])
    if not rows:
        print(f"No complete pool in {store.root}")
    _print_skipped([item.model_dump() for item in skipped])
    return 0


def _print_rescore(summary: dict[str, Any]) -> None:
    if "night" not in summary:
        print(summary["status"])
        return
    print("\n" + summary["headline"])
    for row in summary["drift"]:
        if row["tau_mean"] is not None:
            print(f"{row['scorer']}, pool {row['pool']}: Kendall's tau {row['tau_mean']:.2f} on average, "
                  f"{row['tau_min']:.2f} at worst; winner changed on {100 * (row['winner_flipped'] or 0):.1f} %, loser "
                  f"on {100 * (row['loser_flipped'] or 0):.1f} % of {row['prompts_compared']:,} prompts")
    for item in summary["triplets"]:
        print(f"Triplets: {summary['root']}/{item['triplets']} ({item['rows']:,})")
    print(f"Report: {summary['artifacts']['report']}")


def _print_skipped(skipped: Sequence[dict[str, Any]]) -> None:
    for item in skipped:
        print(f"Skipped: {item['what']}: {item['reason']}")


def _print_table(rows: Sequence[dict[str, str]]) -> None:
    from hgdpo_core.rendering.tables import Table

    if rows:
        print(Table(list(rows[0]), [list(row.values()) for row in rows]).text())


def _number(value: float) -> str:
    return "no score" if math.isnan(value) else f"{value:.3f}"


def _shorten(text: str, width: int = 80) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[:width - 1] + "…"
