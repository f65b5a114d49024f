"""Settings of an ablation, in addition to those of the run that it varies."""

from typing import Annotated, Literal

from pydantic import Field, ValidationError

from hgdpo_core.built_in import DATA_SET, is_built_in
from hgdpo_core.config import ConceptsConfig, PromptSource, RunConfig, ScorerConfig
from hgdpo_core.config.base import ADDED, StageConfig, describe
from hgdpo_core.config.pair_source import PairSource
from hgdpo_core.errors import ConfigError
from hgdpo_core.training.objective import find_objective

TRIAL_PROMPTS = 128
World = Literal["plain", "tinted"]
Comparison = Literal["pool_size", "loser_rank", "dataset_size", "statistics", "beta", "lora_weight", "length",
                     "baselines", "personalised"]
Split = Literal["test", "validation"]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]


class AblationConfig(StageConfig):
    """Which of the paper's comparisons are made, in which worlds, with how many trainings per arm."""

    seeds: int = Field(default=3, ge=1, description="trainings per arm, with dpo.seed 0, 1, ...")
    worlds: tuple[World, ...] = Field(
        default=("plain", "tinted"), min_length=1,
        description="plain: the run's own scorer ranks the pools; tinted: the same scorer, made to prefer warm tints "
                    "(default for the preset figures alone)")
    comparisons: tuple[Comparison, ...] = Field(
        default=("pool_size", "loser_rank", "dataset_size", "statistics", "beta", "lora_weight"), min_length=1,
        description="the tinted world is for statistics and beta alone; not by default: length of training, and "
                    "baselines, paper Table 1, and personalised, Table 4")
    split: Split = Field(default="test", description="figures prompts to measure on; choose settings on validation")
    pool_sizes: tuple[int, ...] = Field(default=(2, 5, 10, 20), description="N of Table 3")
    loser_ranks: tuple[int, ...] = Field(default=(2, 5, 10, 20), description="l of Table 5")
    dataset_shares: tuple[Fraction, ...] = Field(
        default=(0.125, 0.5, 1.0), description="fractions of the triplets, Table 6")
    beta_factors: tuple[Positive, ...] = Field(default=(4.0, 20.0), description="times dpo.beta, Table 2")
    lambdas: tuple[Positive, ...] = Field(
        default=(1e4, 1e5), description="lambda_stat besides dpo.lambda_stat, above 0: N-20 is without; paper: 1e4")
    lora_weights: tuple[Positive, ...] = Field(
        default=(0.25, 0.5, 1.0, 1.5), description="LoRA weights of Figure 8, and those that each arm of Table 1 tries "
        "on validation prompts; [] for a Table 1 at one weight")
    epochs: Annotated[tuple[Annotated[int, Field(ge=1)], ...], ADDED] = Field(
        default=(1, 4, 16), description="lengths of training, comparison length; the paper does not name its own")
    trials: Annotated[tuple[tuple[Positive, Positive], ...], ADDED] = Field(
        default=((1.0, 1.0), (0.3, 1.0), (3.0, 1.0), (1.0, 0.5)),
        description="comparison baselines: learning rate and length of trainings, as factors of those in the settings. "
                    "Each arm takes what is best by the ranking scorer on validation prompts, one training each")
    validation: Annotated[PromptSource | None, ADDED] = Field(
        default=None, description="prompts for trials; default: 128 of the built-in validation split")
    pairs: Annotated[tuple[PairSource, ...] | None, ADDED] = Field(
        default=None, description="comparison baselines: pairs that others labelled, each as it is and its human "
        "images alone; default: of the built-in target its stand-ins, else none")
    concepts: Annotated[ConceptsConfig | None, ADDED] = Field(
        default=None, description="comparison personalised: people, the adapter that reads their images, judges of "
        "identity, and the margin within which it counts as kept")
    concept_prompts: Annotated[PromptSource | None, ADDED] = Field(
        default=None, description="comparison personalised: prompts for these people, best with {person}; default: the "
        "evaluation's")
    diversity_prompts: int = Field(default=32, ge=1, description="prompts that diversity is measured on")
    diversity_images: int = Field(default=8, ge=2, description="images per prompt for diversity")
    distance_pools: int = Field(default=128, ge=1, description="pools that Figure 5b is measured on, at least")


def build_settings(values: dict) -> AblationConfig:
    """AblationConfig from plain values; ConfigError in one line for what is unknown or out of range."""
    unknown = sorted(set(values) - set(AblationConfig.model_fields))
    if unknown:
        raise ConfigError(f"ablation.{unknown[0]} is not a setting; there are "
                          f"{', '.join(sorted(AblationConfig.model_fields))}")
    try:
        return AblationConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"ablation: {describe(error)}") from None


def validation_prompts(settings: AblationConfig, config: RunConfig) -> PromptSource | None:
    """The prompts that trials are judged on; None where there are none."""
    held_out = config.evaluation.prompts
    if settings.validation is not None or not is_built_in(held_out.source):
        return settings.validation
    return held_out.model_copy(update={"split": "validation", "limit": TRIAL_PROMPTS})


def feature_scorer(config: RunConfig, comparison: str = "lora_weight") -> ScorerConfig:
    """The scorer whose image tower measures how much images differ: PickScore, of the evaluation or of the pools."""
    for scorer in (*config.evaluation.scorers, config.scorer):
        if scorer.name == "pickscore":
            return scorer
    raise ConfigError(f"diversity (comparison {comparison}) is measured with PickScore's image tower, but pickscore is "
                      f"not among evaluation.scorers: add it, or leave {comparison} out of ablation.comparisons")


def check(settings: AblationConfig, config: RunConfig) -> None:
    """ConfigError for settings that contradict the run that is varied."""
    whole = [name for name in ("pool_size", "loser_rank") if name in settings.comparisons]
    if config.pool.race and (whole or "tinted" in settings.worlds):
        what = f"comparison {whole[0]}" if whole else "tinted world"
        raise ConfigError(f"the {what} needs whole pools, but of raced ones (pool.race) only "
                          f"{config.pool.images_kept} images of a prompt are finished, chosen by the run's own scorer: "
                          f"leave it out of ablation.{'comparisons' if whole else 'worlds'}, or set pool.race to []")
    images = config.pool.images_per_prompt
    for name in ("pool_size", "loser_rank"):
        given = getattr(settings, f"{name}s") != AblationConfig.model_fields[f"{name}s"].default
        if not given and name not in whole:
            continue  # nothing asks for it
        for value in getattr(settings, f"{name}s"):
            if not 2 <= value <= images:
                raise ConfigError(f"ablation.{name}s holds {value}, but a pool holds {images} images: choose from 2 to "
                                  f"{images}, or a larger pool.images_per_prompt")
    if config.dpo.lambda_stat == 0 and {"statistics", "lora_weight"} & set(settings.comparisons):
        raise ConfigError("dpo.lambda_stat is 0: the comparisons statistics and lora_weight need the weight of the "
                          "statistic matching loss, as the paper's 10000")
    if "lora_weight" in settings.comparisons and not settings.lora_weights:
        raise ConfigError("ablation.lora_weights is empty, but comparison lora_weight varies it: name some, or leave "
                          "it out of ablation.comparisons")
    if settings.worlds == ("tinted",) and not {"statistics", "beta"} & set(settings.comparisons):
        raise ConfigError("the tinted world is for the comparisons statistics and beta: name one of them, or the plain "
                          "world")
    for name in ("lora_weight", "length", "baselines"):
        if name in settings.comparisons:
            feature_scorer(config, name)
    if "personalised" in settings.comparisons and settings.concepts is None:
        raise ConfigError("comparison personalised needs people and an adapter: set ablation.concepts to {source: "
                          "FOLDER, personaliser: {source: FILE}, judges: sface}")
    if "baselines" in settings.comparisons:
        find_objective("alignprop").check(config)
    if "baselines" in settings.comparisons and settings.trials and validation_prompts(settings, config) is None:
        raise ConfigError("trials need prompts apart from those of the evaluation: name them in ablation.validation, "
                          "or set ablation.trials to []")
    if "tinted" in settings.worlds and config.scorer.name != "pickscore":
        raise ConfigError(f"the tinted world tints PickScore, but scorer.name is {config.scorer.name}: leave tinted "
                          "out of ablation.worlds, or rank by pickscore")
    if settings.split == "validation" and not is_built_in(config.evaluation.prompts.source):
        raise ConfigError(f"only the {DATA_SET}'s prompts have a validation split: give other prompts in "
                          "evaluation.prompts instead")
