"""What an ablation compares, beside the settings of the run that it varies."""

from typing import Literal

from pydantic import Field, ValidationError

from hgdpo_core.built_in import DATA_SET, is_built_in
from hgdpo_core.config import RunConfig, ScorerConfig, StageConfig, describe
from hgdpo_core.errors import ConfigError

World = Literal["plain", "tinted"]
Comparison = Literal["pool_size", "loser_rank", "dataset_size", "statistics", "beta", "lora_weight"]
Split = Literal["test", "validation"]


class AblationConfig(StageConfig):
    """Which of the paper's comparisons are made, in which worlds, with how many trainings each."""

    seeds: int = Field(default=3, ge=1, description="trainings of every arm, with dpo.seed 0, 1, ...")
    worlds: tuple[World, ...] = Field(
        default=("plain", "tinted"), min_length=1,
        description="plain: the run's own judge ranks the pools; tinted: the same judge, made fond of warm tints "
                    "(default for the preset figures alone)")
    comparisons: tuple[Comparison, ...] = Field(
        default=("pool_size", "loser_rank", "dataset_size", "statistics", "beta", "lora_weight"), min_length=1,
        description="the tinted world is for statistics and beta alone")
    split: Split = Field(default="test", description="figures prompts to measure on; choose settings on validation")
    pool_sizes: tuple[int, ...] = Field(default=(2, 5, 10, 20), description="N of Table 3")
    loser_ranks: tuple[int, ...] = Field(default=(2, 5, 10, 20), description="l of Table 5")
    dataset_shares: tuple[float, ...] = Field(default=(0.125, 0.5, 1.0), description="shares of the triplets, Table 6")
    beta_factors: tuple[float, ...] = Field(default=(4.0, 20.0), description="times dpo.beta, Table 2")
    lambdas: tuple[float, ...] = Field(default=(1e4, 1e5), description="lambda_stat beside dpo.lambda_stat; paper: 1e4")
    lora_weights: tuple[float, ...] = Field(default=(0.25, 0.5, 1.0, 1.5), description="LoRA weights of Figure 8")
    diversity_prompts: int = Field(default=32, ge=1, description="prompts that diversity is measured on")
    diversity_images: int = Field(default=8, ge=2, description="images a prompt for diversity")
    distance_pools: int = Field(default=128, ge=1, description="pools that Figure 5b is measured on, at least")


def build_settings(values: dict) -> AblationConfig:
    """AblationConfig from plain values; ConfigError in one line for what is unknown or out of range."""
    unknown = sorted(set(values) - set(AblationConfig.model_fields))
    if unknown:
        raise ConfigError(f"ablation.{unknown[0]} names no setting; there are "
                          f"{', '.join(sorted(AblationConfig.model_fields))}")
    try:
        return AblationConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"ablation: {describe(error)}") from None


def feature_scorer(config: RunConfig) -> ScorerConfig:
    """The judge whose image tower tells how much images differ: PickScore, of the evaluation or of the pools."""
    for scorer in (*config.evaluation.scorers, config.scorer):
        if scorer.name == "pickscore":
            return scorer
    raise ConfigError("diversity (comparison lora_weight) is measured with PickScore's image tower, but pickscore is "
                      "not among evaluation.scorers: add it, or leave lora_weight out of ablation.comparisons")


def check(settings: AblationConfig, config: RunConfig) -> None:
    """ConfigError for what contradicts the run that is varied."""
    held = config.pool.images_per_prompt
    for name in ("pool_sizes", "loser_ranks"):
        wrong = [value for value in getattr(settings, name) if not 2 <= value <= held]
        if wrong:
            raise ConfigError(f"ablation.{name} holds {wrong[0]}, but a pool holds {held} images: choose from 2 to "
                              f"{held}, or a larger pool.images_per_prompt")
    for name in ("dataset_shares", "beta_factors", "lora_weights"):
        wrong = [value for value in getattr(settings, name) if value <= 0 or name == "dataset_shares" and value > 1]
        if wrong:
            raise ConfigError(f"ablation.{name} holds {wrong[0]}: expected numbers above 0"
                              + (" and up to 1" if name == "dataset_shares" else ""))
    if any(value <= 0 for value in settings.lambdas):
        raise ConfigError("ablation.lambdas holds a value that is not above 0: without SML is what N-20 is")
    if config.dpo.lambda_stat == 0 and {"statistics", "lora_weight"} & set(settings.comparisons):
        raise ConfigError("dpo.lambda_stat is 0: the comparisons statistics and lora_weight need the weight of the "
                          "statistic matching loss, as the paper's 10000")
    if settings.worlds == ("tinted",) and not {"statistics", "beta"} & set(settings.comparisons):
        raise ConfigError("the tinted world is for the comparisons statistics and beta: name one of them, or the plain "
                          "world")
    if "lora_weight" in settings.comparisons:
        feature_scorer(config)
    if "tinted" in settings.worlds and config.scorer.name != "pickscore":
        raise ConfigError(f"the tinted world tints PickScore, but scorer.name is {config.scorer.name}: leave tinted "
                          "out of ablation.worlds, or rank by pickscore")
    if settings.split == "validation" and not is_built_in(config.evaluation.prompts.source):
        raise ConfigError(f"only the {DATA_SET}'s prompts have a validation split: give other prompts in "
                          "evaluation.prompts instead")
