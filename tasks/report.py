"""Write the summary and the report, and show both in the UI."""

from datetime import UTC, datetime
from typing import Any

from prefect import task
from prefect.logging import get_run_logger

from hgdpo_core.evaluate import Comparison
from hgdpo_core.generate import PoolPlan
from hgdpo_core.grids import pair_grid, pool_grid
from hgdpo_core.guards import Alarm
from hgdpo_core.report import ReportData, headline, render_report
from hgdpo_core.run import Run
from hgdpo_core.shards import ShardFolder
from hgdpo_core.showcase import extreme_positions, random_positions, sample_pairs, sample_pools
from hgdpo_core.tuning import Tuned
from tasks.options import STAGE
from tasks.triplets import Triplets
from tasks.ui import show_image, show_text

PAIRS, EXTREMES, POOLS = 24, 6, 4


@task(name="report", **STAGE)
def publish(run: Run, pool: PoolPlan, scores: ShardFolder, triplets: Triplets, lora: Tuned,
            sft_log: list[dict[str, float]], target_images: PoolPlan, tuned_images: PoolPlan, comparison: Comparison,
            alarms: list[Alarm], seconds: dict[str, float]) -> dict[str, Any]:
    """`summary.json` and `report.html` in `runs/<run_id>/`; returns the summary."""
    scorer = run.config.evaluation.scorers[0].name
    gains, losses = extreme_positions(comparison, scorer, EXTREMES)

    def pairs(positions: list[int]) -> list:
        return sample_pairs(comparison, target_images, tuned_images, scorer, positions)

    sample = pairs(random_positions(comparison, PAIRS))
    pools = sample_pools(pool, scores, POOLS, run.config.triplets)
    artifacts = {"report": run.store.url(run.key("report.html")), "summary": run.store.url(run.key("summary.json")),
                 "lora": run.store.url(f"models/{lora.model_id}"), "triplets": run.store.url(triplets.folder.key),
                 "pool": run.store.url(pool.folder.key)}
    data = ReportData(
        preset=run.config.preset, title=f"HG-DPO on {run.config.target.source}", config=run.config, root=run.store.root,
        created_at=datetime.now(UTC), command=run.command, win_rates=comparison.win_rates,
        lora_weight=comparison.lora_weight, colour_shift=comparison.colour_shift,
        counts={"prompts": len(run.prompts.prompts), "pool_images": pool.images, "triplets": triplets.counts.triplets,
                "rejected": triplets.counts.rejected, "evaluation_prompts": len(comparison.prompts)},
        pairs=sample, best_wins=pairs(gains), worst_losses=pairs(losses), pools=pools, training_log=lora.log,
        sft_log=sft_log, timings=seconds, artifacts=artifacts, notes=_notes(run),
        warnings=[alarm.message for alarm in alarms])
    summary = {
        "preset": run.config.preset, "root": run.store.root, "run_id": run.run_id,
        **comparison.findings(), "warnings": [alarm.as_dict() for alarm in alarms],
        "triplets": triplets.counts.triplets, "rejected": triplets.counts.rejected, "pool_images": pool.images,
        "evaluation_prompts": len(comparison.prompts), "timings": seconds, "artifacts": artifacts}
    run.store.write_bytes(run.key("report.html"), render_report(data).encode())
    run.store.write_json(run.key("summary.json"), summary)
    show_image("pairs", pair_grid(sample), "Target and tuned model side by side, random held-out prompts")
    show_image("pool-ranking", pool_grid(pools), "Pools in their ranking, winner and loser outlined")
    show_text("result", f"## {headline(data)}\n\n" + "\n".join(f"- {name}: `{url}`" for name, url in artifacts.items()))
    get_run_logger().info(headline(data))
    return summary


def _notes(run: Run) -> list[str]:
    if not any(scorer.source == "figures" for scorer in run.config.evaluation.scorers):
        return []
    return ["Where this page says PickScore, the judge is the figures world's own: a small model of PickScore's shape, "
            "trained on drawings. Nothing here says anything about photographs."]
