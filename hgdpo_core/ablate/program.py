"""An opened ablation, and what its arms have in common: the fine-tuned target, the pool, its scores, target images."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hgdpo_core import __version__, pipeline
from hgdpo_core.ablate.arms import Arm, PlannedTable, arm_labels, evaluation_scorers, plan_tables, ranking_scorer
from hgdpo_core.ablate.settings import AblationConfig, World, build_settings, check, validation_prompts
from hgdpo_core.built_in import concept_prompts, concept_settings, is_any_built_in, is_built_in
from hgdpo_core.config import ScorerConfig
from hgdpo_core.config.base import apply_overrides, content_hash
from hgdpo_core.config.presets import DEFAULT_PRESET, build_config
from hgdpo_core.errors import InputError
from hgdpo_core.evaluate import refuse_seen_prompts, seen_prompts
from hgdpo_core.execution.runner import IN_PROCESS, Runner
from hgdpo_core.models import Model
from hgdpo_core.models.personaliser import find_adapter
from hgdpo_core.pair_sets.stand_ins import open_pairs
from hgdpo_core.progress import StageProgress, silent_stages
from hgdpo_core.prompts import PromptList, read_prompts, save_prompts
from hgdpo_core.prompts.concepts import ConceptList, save_concept
from hgdpo_core.prompts.syntax import check_syntax
from hgdpo_core.run import Run, resolve_run, shell_command
from hgdpo_core.run.comparison import open_people
from hgdpo_core.scorers import find_scorer
from hgdpo_core.stages.pool import PoolPlan
from hgdpo_core.storage.shards import ShardFolder

PREFIX = "ablation."
"""Overrides with this prefix are settings of the ablation, the others of the run that it varies."""


@dataclass(frozen=True)
class Ablation:
    """Checked inputs of an ablation. Cheap to keep."""

    run: Run
    """The run that the arms vary."""
    settings: AblationConfig
    ablation_id: str
    tables: tuple[PlannedTable, ...]
    command: str
    """Shell line that starts this ablation again."""
    trial_prompts: PromptList | None = None
    """What trials of settings are judged on; None without trials."""
    people: ConceptList | None = None
    """Of Table 4; None without it."""
    detector: Path | None = None
    concept_prompts: PromptList | None = None

    @property
    def arms(self) -> list[Arm]:
        return list(arm_labels(self.tables))

    @property
    def seeds(self) -> range:
        return range(self.settings.seeds)

    def key(self, name: str) -> str:
        """Key of a file of this ablation, for example `ablations/<id>/result.json`."""
        return f"ablations/{self.ablation_id}/{name}"


def open_ablation(preset: str = DEFAULT_PRESET, root: str | None = None, *, prompts: str | None = None,
                  target: str | None = None, images: str | None = None, overrides: Mapping[str, Any] | None = None,
                  settings: Mapping[str, Any] | None = None) -> Ablation:
    """Check all inputs before any model loads, and write `ablations/<id>/config.json`.

    `settings` holds fields of AblationConfig, None for the default; `overrides` those of the run, and with the prefix
    `ablation.` those of the ablation.
    """
    given = dict(overrides or {})
    own = {name.removeprefix(PREFIX): given.pop(name) for name in list(given) if name.startswith(PREFIX)}
    base = build_config(preset, target=target, prompts=prompts, images=images)
    # others than the built-in scorer have preferences enough
    defaults: dict[str, Any] = {} if is_built_in(base.scorer.source) else {"worlds": ("plain",)}
    chosen = {name: value for name, value in (settings or {}).items() if value is not None}
    if is_built_in(base.target.source) and "personalised" in {**chosen, **own}.get("comparisons", ()):
        defaults["concepts"] = concept_settings()
    config = build_settings({**defaults, **chosen, **own})
    varied = apply_overrides(base, given)
    check(config, varied)
    if config.split != "test":
        held_out = varied.evaluation.prompts.model_copy(update={"split": config.split})
        given["evaluation.prompts"] = held_out.model_dump()
    run = resolve_run(preset, root, prompts=prompts, target=target, images=images, overrides=given)
    scorer = ranking_scorer(run.config, config.worlds[-1])
    find_scorer(scorer.name, scorer.source)
    identity = {"run": run.config.identity("run"), "ablation": config.identity("run")}
    if "baselines" in config.comparisons:
        identity["alignprop"] = run.config.alignprop.identity("run")
    changed = {PREFIX + name: value for name, value in config.model_dump(mode="json", exclude_defaults=True).items()}
    inputs = {"preset": preset, "root": run.store.root, "prompts": prompts, "target": target, "images": images}
    command = shell_command("ablate", inputs, {**(overrides or {}), **changed})
    tables = plan_tables(run.config, config, len(run.prompts.prompts))
    for source in dict.fromkeys(arm.pair_source for arm in arm_labels(tables)):
        if source is not None and not is_any_built_in(source.source):  # the built-in pairs are made when needed
            open_pairs(source, run.store)
    personal = _open_personal(run, config) if "personalised" in config.comparisons else {}
    ablation = Ablation(run, config, f"{preset}-{content_hash(identity)}",
                        tables, command, _read_trials(run, config), **personal)
    for person in ablation.people.concepts if ablation.people else ():
        save_concept(run.store, person)
    for prompt_list in (run.prompts, run.evaluation_prompts, ablation.trial_prompts, ablation.concept_prompts):
        if prompt_list is not None:
            save_prompts(run.store, prompt_list)
    run.store.write_json(ablation.key("config.json"), {"code_version": __version__, **identity})
    return ablation


def _open_personal(run: Run, settings: AblationConfig) -> dict[str, Any]:
    """People, detector and prompts of Table 4, and a look at the adapter; errors as `open_comparison`."""
    assert settings.concepts is not None
    find_adapter(settings.concepts.personaliser, run.target)
    people, detector = open_people(settings.concepts, run.config.target)
    prompts = run.evaluation_prompts
    if is_built_in(settings.concepts.source):
        prompts = PromptList(concept_prompts())
    if settings.concept_prompts is not None:
        prompts = read_prompts(settings.concept_prompts, run.store)
        check_syntax(prompts.prompts, run.config.evaluation.prompt_syntax)
        refuse_seen_prompts(prompts.prompts, run.prompts.prompts)
    return {"people": people, "detector": detector, "concept_prompts": prompts}


def _read_trials(run: Run, settings: AblationConfig) -> PromptList | None:
    source = validation_prompts(settings, run.config)
    if source is None or "baselines" not in settings.comparisons or not settings.trials:
        return None
    prompts = read_prompts(source, run.store)
    for others, what in ((run.prompts, "training"), (run.evaluation_prompts, "the evaluation")):
        if seen := seen_prompts(prompts.prompts, others.prompts):
            raise InputError(f"{len(seen)} of {len(prompts.prompts)} prompts for trials occur in {what} too, the first "
                             f"is {seen[0]!r}: choose others in ablation.validation")
    return prompts


@dataclass(frozen=True)
class Shared:
    """What every arm starts from and is compared with."""

    ablation: Ablation
    model: Model
    """The target, after SFT where there are images."""
    pool: PoolPlan
    scores: dict[World, ShardFolder]
    """The pool's scores by each world's ranking scorer."""
    target_images: PoolPlan
    target_scores: dict[str, ShardFolder]
    """Scores of the target's evaluation images by scorer name."""
    validation: "Shared | None" = None
    """The same on the prompts of trials, scored by the ranking scorer alone; None without trials."""


def prepare_shared(ablation: Ablation, stages: StageProgress = silent_stages, runner: Runner = IN_PROCESS) -> Shared:
    """SFT, the pool, its scores in every world, the target's evaluation images and their scores, if missing."""
    run, config = ablation.run, ablation.run.config
    model, _ = pipeline.tune_target(run, runner, stages, validate=False)
    pool = pipeline.make_pool(run, model, runner, stages)
    images = pipeline.generate_evaluation(run, {"target": model}, runner, stages)
    worlds: tuple[World, ...] = ablation.settings.worlds
    scorers = {scorer.name: scorer for world in worlds for scorer in evaluation_scorers(config, world)}
    ranking: dict[World, ScorerConfig] = {world: ranking_scorer(config, world) for world in worlds}
    pool_scores = pipeline.score_images_by(list(ranking.values()), {"pool": pool}, runner, stages)["pool"]
    target_scores = pipeline.score_images_by(list(scorers.values()), images, runner, stages)["target"]
    shared = Shared(ablation, model, pool, {world: pool_scores[scorer.name] for world, scorer in ranking.items()},
                    images["target"], target_scores)
    return replace(shared, validation=_for_trials(shared, stages, runner)) if ablation.trial_prompts else shared


def _for_trials(shared: Shared, stages: StageProgress, runner: Runner) -> Shared:
    ablation, prompts = shared.ablation, shared.ablation.trial_prompts
    assert prompts is not None
    config = ablation.run.config
    run = replace(ablation.run, evaluation_prompts=prompts, config=config.model_copy(update={
        "evaluation": config.evaluation.model_copy(update={"scorers": (config.scorer,)})}))
    images = pipeline.generate_evaluation(run, {"target": shared.model}, runner, stages)
    scores = pipeline.score_evaluation(run, images, runner, stages)["target"]
    return replace(shared, ablation=replace(ablation, run=run, trial_prompts=None), target_images=images["target"],
                   target_scores=scores)
