"""Table 4: a personalised model with the LoRA of HG-DPO against the same without, over several trainings.

The adapter is the same for all; the target's images by it are made once, those of each training's LoRA beside them. As
a control, the judges of identity also compare the target's images with the adapter on and off: where they hardly prefer
"on", that identity is kept says nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hgdpo_core import pipeline
from hgdpo_core.ablate.measure import train_arm
from hgdpo_core.ablate.program import Ablation, Shared
from hgdpo_core.ablate.result import RESAMPLES
from hgdpo_core.config import ComparisonConfig, DrawingConfig
from hgdpo_core.execution.runner import IN_PROCESS, Runner
from hgdpo_core.models import Model
from hgdpo_core.models.personaliser import find_adapter
from hgdpo_core.progress import StageProgress, silent_stages
from hgdpo_core.run.comparison import ComparisonRun
from hgdpo_core.stages.identities import people_of, read_distances
from hgdpo_core.stages.pool import PoolPlan
from hgdpo_core.statistics.clusters import Clusters
from hgdpo_core.statistics.identity import TAIL, Distances, Verdict, equivalence
from hgdpo_core.statistics.intervals import PERCENTILES, Estimate
from hgdpo_core.storage.shards import ShardFolder

LEAST_CONTROL = 0.8
"""How often a judge must prefer the adapter on to off, for its verdict to mean anything."""
NARROW = 100 * (1 - TAIL), 100 * TAIL


@dataclass(frozen=True)
class Personal:
    """What was measured of S trainings on N samples."""

    gains: dict[str, np.ndarray]
    """By scorer, score of the tuned model over the target, float64 [S, N]."""
    nearer: dict[str, np.ndarray]
    """By judge, distance of the target's image minus that of the tuned model's, float64 [S, N]; NaN without a face."""
    control: dict[str, np.ndarray]
    """By judge, distance with the adapter off minus that with it on, both without the LoRA, float64 [1, N]."""
    faceless: dict[str, int]
    """By judge, images without a face among all that are compared for Table 4."""
    people: Clusters
    prompts: Clusters
    margin: float

    def rate(self, values: np.ndarray, percentiles: Sequence[float] = PERCENTILES) -> Estimate:
        """How often values [S, N] are above 0, among those that are not 0, over people, prompts and trainings.

        All three are resampled and their counts multiplied (Owen's pigeonhole bootstrap 2007), which errs towards wide.
        """
        decided, won = (values < 0) | (values > 0), values > 0
        if not decided.any():
            return Estimate(None, None, None)
        wins, all_ = (self._draws(part.astype(np.float64)) for part in (won, decided))
        draws = (wins / all_)[all_ > 0]
        return Estimate(float(won.sum() / decided.sum()), *map(float, np.percentile(draws, percentiles)))

    def _draws(self, values: np.ndarray) -> np.ndarray:
        """Weighted sums of values [S, N] in each draw, float64 [R]; the same draws at every call."""
        rng = np.random.default_rng(0)
        counts = [rng.multinomial(size, np.full(size, 1 / size), size=RESAMPLES)
                  for size in (len(values), self.people.count, self.prompts.count)]
        weights = counts[1][:, self.people.of_vote] * counts[2][:, self.prompts.of_vote]
        return np.einsum("rs,rs->r", counts[0].astype(np.float64), weights @ values.T)

    def verdict(self, judge: str) -> Verdict | None:
        """Whether identity is kept, by this judge; None where its control says that it cannot tell."""
        control = self.rate(self.control[judge]).value
        if control is None or control <= LEAST_CONTROL:
            return None
        narrow = self.rate(self.nearer[judge], NARROW)
        return equivalence(narrow.ci_low, narrow.ci_high, self.margin)

    def as_dict(self) -> dict[str, Any]:
        """All numbers as plain JSON values."""
        return {
            "people": self.people.count, "prompts": self.prompts.count, "samples": len(self.people.of_vote),
            "margin": self.margin,
            "win_rate": {name: self.rate(values).as_dict() for name, values in self.gains.items()},
            "identity": {name: {
                "win_rate": self.rate(values).as_dict(), "interval_90": self.rate(values, NARROW).as_dict(),
                "control": self.rate(self.control[name]).as_dict(), "verdict": self.verdict(name),
                "faceless": self.faceless[name]} for name, values in self.nearer.items()}}


def measure_personal(shared: Shared, stages: StageProgress = silent_stages, runner: Runner = IN_PROCESS) -> Personal:
    """Train and compare; what exists is not made again."""
    ablation = shared.ablation
    (table,) = (table for table in ablation.tables if table.number == "4")
    arm, runs = table.rows[0].arm, []
    for seed in ablation.seeds:
        tuned = train_arm(shared, arm, seed, stages, runner)[0].applied_to(shared.model, arm.lora_weight)
        runs.append(personal_run(ablation, shared.model, tuned))
    first = runs[0]
    models = {"target": first.target, "off": shared.model, **{f"training {seed}": run.tuned for seed, run in zip(
        ablation.seeds, runs, strict=True)}}
    images = pipeline.generate_evaluation(first, models, runner, stages)
    identities = pipeline.judge_identity(first, images, runner, stages)
    assert identities is not None and first.config.concepts is not None
    compared = {who: plan for who, plan in images.items() if who != "off"}
    scores = pipeline.score_evaluation(first, compared, runner, stages)
    results = [pipeline.compare_models(run, images, scores, f"training {seed}", identities)
               for seed, run in zip(ablation.seeds, runs, strict=True)]
    gains = {name: np.array([np.subtract(result.tuned_scores[name], result.target_scores[name]) for result in results])
             for name in results[0].tuned_scores}
    faces = {name: {who: _read(identities[who][name], images[who], first) for who in images}
             for name in identities["target"]}
    apart = {name: {who: found.per_sample() for who, found in by_model.items()} for name, by_model in faces.items()}
    return Personal(
        gains, {name: np.array([by_model["target"] - by_model[f"training {seed}"] for seed in ablation.seeds])
                for name, by_model in apart.items()},
        {name: (by_model["off"] - by_model["target"])[None] for name, by_model in apart.items()},
        {name: sum(int((~np.isfinite(found.distance)).sum()) for who, found in by_model.items() if who != "off")
         for name, by_model in faces.items()},
        Clusters.of(people_of(first.samples)), Clusters.of(first.sample_prompts), first.config.concepts.margin)


def _read(folder: ShardFolder, plan: PoolPlan, run: ComparisonRun) -> Distances:
    return read_distances(folder, plan, run.samples)


def personal_run(ablation: Ablation, target: Model, tuned: Model) -> ComparisonRun:
    """The comparison of a target and a tuned model, both with the ablation's adapter, on its people and prompts."""
    run, settings = ablation.run, ablation.settings
    assert settings.concepts is not None and ablation.people is not None and ablation.concept_prompts is not None
    config = ComparisonConfig(
        preset=run.config.preset, target=run.config.target, tuned="", concepts=settings.concepts,
        sampler=run.config.sampler, evaluation=run.config.evaluation, workers=run.config.workers,
        pool=DrawingConfig.model_validate(run.config.pool.model_dump(include=set(DrawingConfig.model_fields))))
    adapter = find_adapter(settings.concepts.personaliser, target)
    return ComparisonRun(
        config, run.store, ablation.ablation_id, replace(target, personaliser=adapter),
        replace(tuned, personaliser=adapter), (), ablation.concept_prompts, ablation.command, ablation.people,
        ablation.detector)
