"""A shard run of the pool of `benchmarks.null_shard` that loads no torch: the same to Prefect, for half of the work.

It is watched, has a task, a log, a bar and a table as the real one has, and commits a real shard. A server and a
database get more to do in a minute than by any shard run that generates.
"""

from typing import Any

from prefect import flow
from prefect.logging import get_run_logger

from hgdpo_core.execution import imports
from hgdpo_core.progress import ShouldStop
from tasks.options import stage_task
from tasks.ui import show_table, stage_progress

imports.load_libraries = lambda: None  # `flows` would call it in the process of a flow run

from flows.watch import watch_this_run  # noqa: E402

__all__ = ["hgdpo_shard"]


@flow(name="hgdpo-shard")
def hgdpo_shard(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Commit the shards of a request."""
    with watch_this_run() as watch:
        return make_shards(request, watch)


@stage_task("make shards", "{request[stage]} {request[shards]}")
def make_shards(request: dict[str, Any], should_stop: ShouldStop) -> list[dict[str, Any]]:
    """A row for each shard."""
    import pyarrow as pa

    from hgdpo_core.prompts import prompt_id
    from hgdpo_core.storage import Store
    from hgdpo_core.storage.shards import ShardFolder, parse_range

    folder, rows = ShardFolder.open(Store(request["root"]), request["folder"]), []
    indices = parse_range(request["shards"])
    with stage_progress(request["stage"]) as progress:
        for done, index in enumerate(indices, 1):
            should_stop()
            details = {"prompt_ids": [prompt_id(f"prompt {index}")]}  # as `null_shard.plan` has them
            manifest = folder.commit(index, pa.table({"index": [0]}), details=details)
            rows.append({"shard": index, "rows": manifest.rows, "bytes": manifest.bytes})
            get_run_logger().info("Shard %d of %s: %d rows", index, request["folder"], manifest.rows)
            progress(done, len(indices), "images")
    show_table("shards", rows, f"{request['folder']}: shards made by this run")
    return rows
