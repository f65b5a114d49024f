"""The cost of an ablation, estimated before it runs."""

from dataclasses import replace
from typing import Any

from hgdpo_core.ablate.arms import WITH_DIVERSITY, Arm, arm_config, evaluation_scorers, steps_of, training_of
from hgdpo_core.ablate.program import Ablation
from hgdpo_core.built_in import is_built_in
from hgdpo_core.config import RunConfig
from hgdpo_core.training.objective import find_objective

STEPS_PER_SECOND, IMAGES_PER_SECOND, SCORES_PER_SECOND = 1.7, 12.0, 300.0
"""The built-in models on 2 idle CPU cores without AVX-512; a busy machine is slower."""
STEPS_LIKE = {"alignprop": 7.0}
"""How many DPO steps a step of another objective takes as long as."""


def _steps(config: RunConfig, arm: Arm) -> float:
    """Steps of a training, as many as DPO would do in its time."""
    training = find_objective(arm.objective).settings(arm_config(config, arm, 0))
    return STEPS_LIKE.get(arm.objective, 1.0) * steps_of(training, arm)


def plan_ablation(ablation: Ablation) -> dict[str, Any]:
    """Counts of all work, as if nothing existed yet; existing results are not made again, so a run may do less.

    `minutes` is an estimate for the built-in model on 2 idle CPU cores, None for any other model. Images with
    latent normalisation count twice: two models generate them.
    """
    run, settings, arms, seeds = ablation.run, ablation.settings, ablation.arms, ablation.settings.seeds
    config, prompts = run.config, len(run.evaluation_prompts.prompts)
    trained = {training_of(arm) for arm in arms}
    tuned = [arm for arm in arms if arm.chosen and not arm.chosen_weight]
    trials = [replace(arm, rate_factor=rate, length_factor=length) for arm in tuned for rate, length in settings.trials]
    trainings = len(trained) * seeds + len(trials)
    foreign = any(arm.data == "foreign_pool" for arm in arms)
    pool = len(run.prompts.prompts) * config.pool.images_per_prompt * (1 + foreign)
    one_evaluation = prompts * config.evaluation.images_per_prompt
    generated = one_evaluation * (1 + seeds * sum(1 + arm.latent_normalisation for arm in arms))
    weights = [arm for arm in arms if arm.chosen_weight for weight in settings.lora_weights
               if weight != arm.lora_weight]  # at its own weight it is a trial already
    validated = len(ablation.trial_prompts.prompts) * config.evaluation.images_per_prompt * (
        1 + len(trials) + len(weights)) if ablation.trial_prompts else 0
    sweep = sum(len(table.rows) for table in ablation.tables if table.number in WITH_DIVERSITY)
    diversity = settings.diversity_prompts * settings.diversity_images * (1 + seeds * sweep) if sweep else 0
    scorers = {world: len(evaluation_scorers(config, world)) for world in settings.worlds}
    scores = pool * len(settings.worlds) + one_evaluation * (
        max(scorers.values()) + seeds * sum(scorers[arm.world] for arm in arms)) + validated
    steps = seeds * sum(_steps(config, arm) for arm in trained) + sum(_steps(config, arm) for arm in trials) + (
        config.sft.max_steps or 0 if config.images else 0)
    people, texts = ablation.people, ablation.concept_prompts
    one_personal = len(people.concepts) * min(settings.concepts.prompts_per_concept or len(texts.prompts), len(
        texts.prompts)) * config.evaluation.images_per_prompt if people and texts and settings.concepts else 0
    generated += one_personal * (2 + seeds)  # with and without the adapter, and with each training's LoRA
    images = pool + generated + validated + diversity
    seconds = steps / STEPS_PER_SECOND + images / IMAGES_PER_SECOND + scores / SCORES_PER_SECOND
    return {"ablation_id": ablation.ablation_id, "arms": len(arms), "seeds": seeds, "trainings": trainings,
            "pool_images": pool, "evaluation_images": generated + validated, "diversity_images": diversity,
            "scores": scores,
            "minutes": round(seconds / 60, 1) if is_built_in(config.target.source) else None}
