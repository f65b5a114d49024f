"""How many requests to an S3 server a shard costs each stage: they are 20 to 50 ms each."""

from faulty_s3 import served_bucket

from hgdpo_core.config import PoolConfig, SamplerConfig, ScorerConfig, TargetConfig, TripletConfig
from hgdpo_core.models import find_model
from hgdpo_core.prompts import PromptList
from hgdpo_core.stages.base import Worker
from hgdpo_core.stages.pool import plan_pool
from hgdpo_core.stages.scores import ScoreStage
from hgdpo_core.stages.triplets import TripletStage
from hgdpo_core.storage import Store

MOST = {"pool": 7, "score": 8, "triplets": 10}  # 8, 16 and 18 before stages had one loop


def test_requests_per_shard(target_folder, judge_folder):
    """Of a stage with six shards minus those of one with three, so that what a stage costs once does not count."""
    model = find_model(TargetConfig(source=str(target_folder), dtype="float32"))
    scorer, costs = ScorerConfig(source=str(judge_folder)), {}
    with served_bucket() as server:
        for shards in (3, 6):
            store = Store(f"s3://bucket/{shards}")
            prompts = PromptList(tuple(f"a person, number {i}" for i in range(shards)))
            pool = plan_pool(store, model, SamplerConfig(width=32, height=32, steps=1),
                             PoolConfig(images_per_prompt=2, prompts_per_shard=1), prompts.prompts)
            costs[shards, "pool"] = _cost(server, pool)
            scores = ScoreStage.of(pool, scorer)
            costs[shards, "score"] = _cost(server, scores)
            costs[shards, "triplets"] = _cost(server, TripletStage.of(pool, scores.folder, prompts, TripletConfig()))
    per_shard = {name: (costs[6, name] - costs[3, name]) / 3 for name in MOST}
    assert all(0 < per_shard[name] <= most for name, most in MOST.items()), per_shard


def _cost(server, stage):
    server.requests.clear()
    stage.make(Worker("cpu"))
    return len(server.requests)
