"""The stages that make shards (`STAGES`, by their persisted names), and the page of the data set of triplets.

`base.py` is what a stage is, and the one loop that makes shards. `pool.py` makes images, `scores.py` their scores,
`triplets.py` best and worst, `pair_sets.py` pairs that others labelled (both with `dataset_card.py`), `latents.py`,
`image_latents.py`,
`concept_latents.py` and `prompt_embeds.py` what training reads, `features.py`, `distances.py` and `identities.py` what
reports measure; `probes.py` times a batch of each.
"""

from hgdpo_core.stages.base import Stage
from hgdpo_core.stages.concept_latents import ConceptLatentStage
from hgdpo_core.stages.distances import DistanceStage
from hgdpo_core.stages.features import FeatureStage
from hgdpo_core.stages.identities import IdentityStage
from hgdpo_core.stages.image_latents import ImageLatentStage
from hgdpo_core.stages.latents import LatentStage
from hgdpo_core.stages.pair_sets import PairSetStage
from hgdpo_core.stages.pool import PoolPlan
from hgdpo_core.stages.prompt_embeds import PromptEmbedStage
from hgdpo_core.stages.scores import ScoreStage
from hgdpo_core.stages.triplets import TripletStage

STAGES: dict[str, type[Stage]] = {stage.name: stage for stage in (
    PoolPlan, ScoreStage, TripletStage, PairSetStage, LatentStage, ImageLatentStage, PromptEmbedStage, FeatureStage,
    DistanceStage, IdentityStage, ConceptLatentStage)}
