"""An ablation opened, and what all its arms share: one fine-tuned target, one pool, its scores, the target's images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hgdpo_core import __version__
from hgdpo_core.ablate.arms import Arm, PlannedTable, all_arms, evaluation_scorers, plan_tables, ranking_scorer
from hgdpo_core.ablate.settings import AblationConfig, World, build_settings, check
from hgdpo_core.config import ScorerConfig, apply_overrides, content_hash
from hgdpo_core.evaluate import plan_evaluation
from hgdpo_core.execution.jobs import offer_pool, offer_scores
from hgdpo_core.execution.runner import IN_PROCESS, Runner
from hgdpo_core.models import Model
from hgdpo_core.presets import build_config
from hgdpo_core.progress import StageProgress, silent_stages
from hgdpo_core.prompts import save_prompts
from hgdpo_core.run import Run, check_run, shell_command
from hgdpo_core.scorers import find_scorer
from hgdpo_core.stages.pool import PoolPlan, plan_pool
from hgdpo_core.stages.scores import score_folder
from hgdpo_core.storage.shards import ShardFolder
from hgdpo_core.training.request import TrainRequest
from hgdpo_core.training.tune import find_tuned_target

PREFIX = "ablation."
"""Overrides that start so are settings of the ablation, the others of the run that it varies."""

@dataclass(frozen=True)
class Ablation:
    """Checked inputs of an ablation. Cheap to hold."""

    run: Run
    """The run that the arms vary."""
    settings: AblationConfig
    ablation_id: str
    tables: tuple[PlannedTable, ...]
    command: str
    """Shell line that starts this ablation again."""

    @property
    def arms(self) -> list[Arm]:
        return all_arms(self.tables)

    @property
    def seeds(self) -> range:
        return range(self.settings.seeds)

    def key(self, name: str) -> str:
        """Key of a file of this ablation, for example `ablations/<id>/result.json`."""
        return f"ablations/{self.ablation_id}/{name}"


def open_ablation(preset: str = "figures", root: str | None = None, *, prompts: str | None = None,
                  target: str | None = None, images: str | None = None, overrides: Mapping[str, Any] | None = None,
                  settings: Mapping[str, Any] | None = None) -> Ablation:
    """Check everything a user can get wrong, before any model loads, and write `ablations/<id>/config.json`.

    `settings` holds fields of AblationConfig; `overrides` those of the run, and of the ablation under `ablation.`.
    """
    given = dict(overrides or {})
    own = {name.removeprefix(PREFIX): given.pop(name) for name in list(given) if name.startswith(PREFIX)}
    usual = {} if preset == "figures" else {"worlds": ("plain",)}  # real judges have tastes enough
    config = build_settings({**usual, **(settings or {}), **own})
    varied = apply_overrides(build_config(preset, target=target, prompts=prompts, images=images), given)
    check(config, varied)
    if config.split != "test":
        held_out = varied.evaluation.prompts.model_copy(update={"split": config.split})
        given["evaluation.prompts"] = held_out.model_dump()
    run = check_run(preset, root, prompts=prompts, target=target, images=images, overrides=given)
    scorer = ranking_scorer(run.config, config.worlds[-1])
    find_scorer(scorer.name, scorer.source)
    deciding = run.config.model_dump(mode="json", exclude={"workers"})  # how work is cut changes no result
    identity = {"run": deciding, "ablation": config.model_dump(mode="json")}
    changed = {name: value for name, value in config.model_dump(mode="json").items()
               if value != AblationConfig().model_dump(mode="json")[name]}
    command = shell_command("ablate", {"preset": preset, "root": run.store.root, "prompts": prompts, "target": target,
                                       "images": images},
                            {**(overrides or {}), **{PREFIX + name: value for name, value in changed.items()}})
    ablation = Ablation(run, config, f"{preset}-{content_hash(identity)}",
                        plan_tables(run.config, config, len(run.prompts.prompts)), command)
    save_prompts(run.store, run.prompts)
    save_prompts(run.store, run.evaluation_prompts)
    run.store.write_json(ablation.key("config.json"), {"code_version": __version__, **identity})
    return ablation


@dataclass(frozen=True)
class Shared:
    """What every arm starts from and is compared with."""

    ablation: Ablation
    model: Model
    """The target, after SFT where there are images."""
    pool: PoolPlan
    scores: dict[World, ShardFolder]
    """The pool's scores by each world's judge."""
    target_images: PoolPlan
    target_scores: dict[str, ShardFolder]
    """Scores of the target's evaluation images by scorer name."""


def prepare_shared(ablation: Ablation, stages: StageProgress = silent_stages, runner: Runner = IN_PROCESS) -> Shared:
    """SFT, the pool, its scores in every world, the target's evaluation images and their scores; found where made."""
    run, config = ablation.run, ablation.run.config
    model = _fine_tune(run, stages, runner)
    pool = plan_pool(run.store, model, config.sampler.plain, config.pool, run.prompts.prompts)
    draw(pool, "pool", stages, runner)
    images = plan_evaluation(run.store, model, config.sampler, config.pool, config.evaluation,
                             run.evaluation_prompts.prompts)
    draw(images, "target", stages, runner)
    worlds: tuple[World, ...] = ablation.settings.worlds
    scorers = {scorer.name: scorer for world in worlds for scorer in evaluation_scorers(config, world)}
    ranking: dict[World, ScorerConfig] = {world: ranking_scorer(config, world) for world in worlds}
    pool_scores = score(run, pool, list(ranking.values()), stages, runner)
    return Shared(ablation, model, pool, {world: pool_scores[scorer.name] for world, scorer in ranking.items()},
                  images, score(run, images, list(scorers.values()), stages, runner))


def draw(plan: PoolPlan, title: str, stages: StageProgress, runner: Runner) -> None:
    """Make what is missing of a pool."""
    runner.make([offer_pool(plan, title=title, share=runner.share)], stages)


def score(run: Run, pool: PoolPlan, scorers: Sequence[ScorerConfig], stages: StageProgress,
          runner: Runner) -> dict[str, ShardFolder]:
    """A pool's scores by scorer name, those missing made."""
    folders = {scorer.name: score_folder(run.store, pool.pool_id, scorer) for scorer in scorers}
    runner.make([offer_scores(pool, folders[scorer.name], scorer, share=runner.share) for scorer in scorers], stages)
    return folders


def _fine_tune(run: Run, stages: StageProgress, runner: Runner) -> Model:
    if run.images is None:
        return run.target
    size = (run.config.sampler.width, run.config.sampler.height)
    request = TrainRequest.for_sft(run.store, run.images, run.target, size, run.config.sft, share=runner.share)
    with stages("encode") as encoding, stages("sft") as progress:
        return find_tuned_target(run.target, runner.train(request, progress, encoding))
