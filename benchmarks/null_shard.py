"""The shard flow without generating, and a parent that makes only a pool: orchestration alone."""

from collections.abc import Iterator, Sequence

import numpy as np
from prefect import flow

from flows.runner import DeploymentRunner
from flows.shard import hgdpo_shard
from flows.watch import watch_this_run
from hgdpo_core.config import PoolConfig, SamplerConfig, TargetConfig, WorkersConfig
from hgdpo_core.execution import jobs
from hgdpo_core.images import encode_image
from hgdpo_core.models import find_model
from hgdpo_core.progress import ShouldStop, never_stop
from hgdpo_core.prompts import image_seed, prompt_id
from hgdpo_core.stages import pool as pool_stage
from hgdpo_core.stages.pool import PoolPlan, plan_pool
from hgdpo_core.storage import Store

__all__ = ["hgdpo_shard", "null_parent"]


class NullGenerator:
    """Stands in for `ImageGenerator`: no model, one grey pixel an image."""

    device, pool = "cpu", PoolConfig()

    def __init__(self, *_: object):
        self.image = encode_image(np.full((1, 1, 3), 128, np.uint8), "png")

    def generate(self, prompts: Sequence[str], should_stop: ShouldStop = never_stop) -> Iterator[dict]:
        for prompt in prompts:
            should_stop()
            yield {"prompt_id": prompt_id(prompt), "prompt": prompt, "index": 0, "seed": image_seed(0, prompt, 0),
                   "image": self.image, "width": 1, "height": 1}


jobs.MAX_SHARD_RUNS = 1_000_000  # of which a parent else makes fewer, larger runs
pool_stage.ImageGenerator = NullGenerator  # pyright: ignore[reportAttributeAccessIssue]


def plan(root: str, shards: int) -> PoolPlan:
    """A pool of one prompt a shard."""
    model = find_model(TargetConfig(source="figures", dtype="float32"))
    return plan_pool(Store(root), model, SamplerConfig(width=64, height=64, steps=1),
                     PoolConfig(images_per_prompt=1, prompts_per_shard=1), [f"prompt {i}" for i in range(shards)])


@flow(name="null-parent")
def null_parent(root: str, shards: int, per_run: int, open_runs: int = 50) -> None:
    """Make a pool on the workers, as the flow `hgdpo` does, and nothing else."""
    with watch_this_run() as watch:
        pool = plan(root, shards)
        workers = WorkersConfig(draw_images_per_run=per_run, open_runs=open_runs)  # one image per shard
        DeploymentRunner(workers, pool.folder.store, watch).make([pool])
