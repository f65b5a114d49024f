"""The cost of planning and committing per prompt, from a hundred prompts to many, without generating anything.

    python -m benchmarks.scaling                        # 100, 1 000, 10 000 prompts
    python -m benchmarks.scaling --prompts 100 1000 10000 100000

Each number runs in a process of its own on a local disk, after a run of a few prompts that pays what is paid once:
prompts -> plan of the pool -> shards of one-pixel images -> scores by a scorer that reads nothing -> triplets -> the
same plans again, where everything exists. Processor seconds, so that other work on the machine does not count; memory
is the process's peak above what that first run took.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hgdpo_core.config import PoolConfig, SamplerConfig, ScorerConfig, TargetConfig, TripletConfig
from hgdpo_core.images import encode_image
from hgdpo_core.models import Model, find_model
from hgdpo_core.progress import ShouldStop, never_stop
from hgdpo_core.prompts import image_seed, prompt_id
from hgdpo_core.stages.base import Worker
from hgdpo_core.stages.pool import PoolPlan, plan_pool
from hgdpo_core.stages.scores import ScoreStage, missing_scores, score_folder
from hgdpo_core.stages.triplets import TripletStage, triplet_folder
from hgdpo_core.storage import Store

IMAGES_PER_PROMPT = 2
STAGES = ("plan", "pool", "scores", "triplets", "plans again")
SAMPLER = SamplerConfig(width=64, height=64, steps=1)


class NullGenerator:
    """Stands in for `ImageGenerator`: no model, one grey pixel an image."""

    device, pool = "cpu", PoolConfig()
    image = encode_image(np.full((1, 1, 3), 128, np.uint8), "png")

    def generate(self, prompts: Sequence[str], should_stop: ShouldStop = never_stop) -> Iterator[dict]:
        """Rows as `ImageGenerator` gives them."""
        for prompt in prompts:
            should_stop()
            for index in range(IMAGES_PER_PROMPT):
                yield {"prompt_id": prompt_id(prompt), "prompt": prompt, "index": index,
                       "seed": image_seed(0, prompt, index), "image": self.image, "width": 1, "height": 1}


class NullScorer:
    """Stands in for a scorer: the score of an image is its position in the batch."""

    fingerprint = "null"

    def score(self, images: Sequence[Any], prompts: Sequence[str]) -> torch.Tensor:
        """float32 [B]."""
        return torch.arange(len(images), dtype=torch.float32)


@dataclass(frozen=True)
class Row:
    """One line of the table: milliseconds per prompt by stage, and MiB."""

    prompts: int
    milliseconds: dict[str, float]
    peak_mib: float

    @property
    def total(self) -> float:
        return sum(self.milliseconds.values())


def run_pipeline(root: str, count: int, prompts_per_shard: int) -> Row:
    """The pipeline for `count` prompts below `root`."""
    store, model = Store(root), find_model(TargetConfig(source="figures", dtype="float32"))
    scorer = ScorerConfig(name="pickscore", source="figures", batch_size=256)
    pool = PoolConfig(images_per_prompt=IMAGES_PER_PROMPT, prompts_per_shard=prompts_per_shard)
    before, cost, seen = _peak_mib(), {}, {}

    def timed(stage: str, step: Callable[[], Any]) -> Any:
        start = time.process_time()
        seen[stage] = step()
        cost[stage] = 1000 * (time.process_time() - start) / count
        return seen[stage]

    prompts = [f"a person, number {i}" for i in range(count)]
    plan: PoolPlan = timed("plan", lambda: plan_pool(store, model, SAMPLER, pool, prompts))
    generator, network = NullGenerator(), NullScorer()
    timed("pool", lambda: plan.make(Worker(network=generator)))  # pyright: ignore[reportArgumentType]
    scores = score_folder(store, plan.pool_id, scorer)
    timed("scores", lambda: ScoreStage.of(plan, scorer).make(Worker("cpu", network=network)))  # pyright: ignore[reportArgumentType]
    triplets = triplet_folder(store, plan.folder, scores, "prompts", TripletConfig())
    stage = TripletStage(plan.folder, scores, triplets, frozenset(map(prompt_id, prompts)), TripletConfig(),
                         tuple(plan.indices))
    timed("triplets", lambda: stage.make(Worker("cpu")))
    timed("plans again", lambda: _find_all(store, model, pool, prompts, plan, scores))
    return Row(count, cost, _peak_mib() - before)


def _find_all(store: Store, model: Model, pool: PoolConfig, prompts: list[str], plan: PoolPlan, scores: Any) -> None:
    missing = plan_pool(store, model, SAMPLER, pool, prompts).missing
    if missing or missing_scores(plan.folder, scores, plan.indices):
        sys.exit("error: the plan does not find what was just made")


def _peak_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def format_table(rows: Sequence[Row]) -> str:
    """A Markdown table; costs are milliseconds of processor time per prompt, changes against the first row."""
    lines = [f"| prompts | {' | '.join(STAGES)} | all | change | peak MiB above the first run |",
             "|" + "---|" * (len(STAGES) + 4)]
    for row in rows:
        stages = " | ".join(f"{row.milliseconds[stage]:.2f}" for stage in STAGES)
        lines.append(f"| {row.prompts} | {stages} | {row.total:.2f} | {100 * (row.total / rows[0].total - 1):+.0f} % | "
                     f"{row.peak_mib:.0f} |")
    return "\n".join(lines)


def _in_own_process(count: int, prompts_per_shard: int) -> Row:
    command = [sys.executable, "-m", "benchmarks.scaling", "--only", str(count), "--prompts-per-shard",
               str(prompts_per_shard)]
    line = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
    *costs, peak = map(float, line.split())
    print(f"{count} prompts: {sum(costs):.2f} ms per prompt", file=sys.stderr)
    return Row(count, dict(zip(STAGES, costs, strict=True)), peak)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, nargs="+", default=[100, 1_000, 10_000])
    parser.add_argument("--prompts-per-shard", type=int, default=20)
    parser.add_argument("--only", type=int, help="run the pipeline for so many prompts and print bare numbers")
    options = parser.parse_args(arguments)
    if options.only:
        with tempfile.TemporaryDirectory() as name:
            run_pipeline(f"{name}/first", options.prompts_per_shard, options.prompts_per_shard)
            row = run_pipeline(f"{name}/measured", options.only, options.prompts_per_shard)
        print(*(row.milliseconds[stage] for stage in STAGES), row.peak_mib)
        return 0
    rows = [_in_own_process(count, options.prompts_per_shard) for count in options.prompts]
    print(f"{options.prompts_per_shard} prompts per shard, {IMAGES_PER_PROMPT} images per prompt, local disk\n\n"
          f"{format_table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
