"""The cost of an ablation, estimated before it runs."""

from typing import Any

from hgdpo_core.ablate.arms import evaluation_scorers, training_of
from hgdpo_core.ablate.program import Ablation
from hgdpo_core.built_in import is_built_in

STEPS_PER_SECOND, IMAGES_PER_SECOND, SCORES_PER_SECOND = 3.5, 40.0, 100.0
"""The built-in models on 2 idle CPU cores; a busy machine is slower."""


def plan_ablation(ablation: Ablation) -> dict[str, Any]:
    """Counts of all work, as if nothing existed yet; existing results are not made again, so a run may do less.

    `minutes` is an estimate for the built-in model on 2 idle CPU cores, None for any other model. Images with
    latent normalisation count twice: two models generate them.
    """
    run, settings, arms, seeds = ablation.run, ablation.settings, ablation.arms, ablation.settings.seeds
    config, prompts = run.config, len(run.evaluation_prompts.prompts)
    trainings = len({training_of(arm) for arm in arms}) * seeds
    pool = len(run.prompts.prompts) * config.pool.images_per_prompt
    one_evaluation = prompts * config.evaluation.images_per_prompt
    generated = one_evaluation * (1 + seeds * sum(1 + arm.latent_normalisation for arm in arms))
    sweep = sum(len(table.rows) for table in ablation.tables if table.number == "8")
    diversity = settings.diversity_prompts * settings.diversity_images * (1 + seeds * sweep) if sweep else 0
    scorers = {world: len(evaluation_scorers(config, world)) for world in settings.worlds}
    scores = pool * len(settings.worlds) + one_evaluation * (
        max(scorers.values()) + seeds * sum(scorers[arm.world] for arm in arms))
    steps = trainings * (config.dpo.max_steps or 0) + (config.sft.max_steps or 0 if config.images else 0)
    images = pool + generated + diversity
    seconds = steps / STEPS_PER_SECOND + images / IMAGES_PER_SECOND + scores / SCORES_PER_SECOND
    return {"ablation_id": ablation.ablation_id, "arms": len(arms), "seeds": seeds, "trainings": trainings,
            "pool_images": pool, "evaluation_images": generated, "diversity_images": diversity, "scores": scores,
            "minutes": round(seconds / 60, 1) if is_built_in(config.target.source) else None}
