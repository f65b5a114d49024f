"""Samples of images for the report: pairs side by side and ranked pools, read from the store."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from hgdpo_core.config import TripletConfig
from hgdpo_core.evaluate import Comparison, read_images
from hgdpo_core.images import decode_image
from hgdpo_core.prompts import concept_of
from hgdpo_core.prompts.concepts import load_concept
from hgdpo_core.rendering.grids import PairSample, PoolSample
from hgdpo_core.selection import select_pair
from hgdpo_core.stages.pair_sets import PairSetStage
from hgdpo_core.stages.pool import PoolPlan
from hgdpo_core.stages.triplets import read_ranked_pools
from hgdpo_core.storage.shards import ShardFolder


def sample_pairs(comparison: Comparison, target: PoolPlan, tuned: PoolPlan, scorer: str,
                 positions: Sequence[int]) -> list[PairSample]:
    """Both models' first image of some of the evaluation's prompts (positions in `comparison.prompts`)."""
    prompts = [comparison.prompts[position] for position in positions]
    target_images, tuned_images = read_images(target, prompts), read_images(tuned, prompts)
    people = {concept: load_concept(target.folder.store, concept).pictures()[0]
              for concept in {*map(concept_of, prompts)} if concept}
    return [PairSample(str(prompt), decode_image(target_images[prompt]), decode_image(tuned_images[prompt]),
                       comparison.target_scores[scorer][position], comparison.tuned_scores[scorer][position],
                       people.get(concept_of(prompt) or ""))
            for prompt, position in zip(prompts, positions, strict=True)]


def random_positions(comparison: Comparison, count: int) -> list[int]:
    """A seeded random sample of prompts."""
    total = len(comparison.prompts)
    return sorted(np.random.default_rng(0).choice(total, size=min(count, total), replace=False).tolist())


def extreme_positions(comparison: Comparison, scorer: str, count: int) -> tuple[list[int], list[int]]:
    """Prompts of the largest gains and of the largest losses by a scorer; only positive gains and losses."""
    gain = np.subtract(comparison.tuned_scores[scorer], comparison.target_scores[scorer])
    order = np.argsort(gain, kind="stable").tolist()
    return ([i for i in reversed(order[-count:]) if gain[i] > 0], [i for i in order[:count] if gain[i] < 0])


def sample_pools(plan: PoolPlan, scores: ShardFolder, count: int, config: TripletConfig) -> list[PoolSample]:
    """The first few pools of the first shard, ranked (arXiv:2405.20216v1, Figure 6)."""
    pools: list[PoolSample] = []
    for pool in read_ranked_pools(plan.folder, scores, plan.indices[0], config.pool_size):
        winner, loser = select_pair(torch.tensor([pool.scores]), loser_rank=config.loser_rank)
        if int(winner) < 0:
            continue
        images = [decode_image(data) for data in pool.images]
        pools.append(PoolSample(pool.prompt, images, pool.scores, int(winner), int(loser)))
        if len(pools) == count:
            break
    return pools


def sample_foreign(stage: PairSetStage, count: int) -> list[tuple[str, Image.Image, Image.Image]]:
    """Prompt, winner and loser of the first pairs that others labelled."""
    for index in stage.indices:
        rows = stage.folder.read_columns(index, ["caption", "jpg_0", "jpg_1"]).slice(0, count).to_pylist()
        if rows:
            return [(row["caption"], decode_image(row["jpg_0"]), decode_image(row["jpg_1"])) for row in rows]
    return []
