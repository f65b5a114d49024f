"""Make the missing shards of a range: the work of a shard flow run."""

from typing import Any

from prefect.logging import get_run_logger

from hgdpo_core.execution.jobs import ShardRequest, run_shards
from hgdpo_core.progress import ShouldStop, count_of
from hgdpo_core.stages import STAGES
from hgdpo_core.storage.shards import ShardManifest
from tasks.options import stage_task
from tasks.ui import show_table, stage_progress


@stage_task("make shards", "{request.stage} {request.shards}")
def make_shards(request: ShardRequest, should_stop: ShouldStop) -> list[dict[str, Any]]:
    """A row for each shard of the range that was made now; existing ones stay as they are."""
    logger = get_run_logger()
    rows: list[dict[str, Any]] = []

    def add_row(manifest: ShardManifest) -> None:
        rows.append({"shard": manifest.index, "rows": manifest.rows, "bytes": manifest.bytes,
                     "seconds": round(manifest.seconds, 1), "device": manifest.device})
        logger.info("Shard %d of %s: %d rows, %d bytes, %.1f s on %s", manifest.index, request.folder, manifest.rows,
                    manifest.bytes, manifest.seconds, manifest.device)

    with stage_progress(request.stage) as progress:
        done = run_shards(request, progress=progress, should_stop=should_stop, on_shard=add_row)
    logger.info("%s %s of %s: %d of %s made now, %s", request.stage, request.shards, request.folder, len(rows),
                count_of(len(request.indices), "shard"), count_of(done, STAGES[request.stage].unit.removesuffix("s")))
    if rows:
        show_table("shards", rows, f"{request.folder}: shards made by this run")
    return rows
