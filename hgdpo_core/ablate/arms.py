"""Arms: what one row of the paper's tables trains and samples. Rows that coincide are one arm, trained once."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any, Literal

from hgdpo_core.ablate import paper
from hgdpo_core.ablate.settings import AblationConfig, World
from hgdpo_core.built_in import FOREIGN_SOURCE, STAND_IN_PAIRS, is_built_in
from hgdpo_core.config import RunConfig, ScorerConfig, TrainingConfig, TripletConfig
from hgdpo_core.config.pair_source import PairSource
from hgdpo_core.training.loop import step_batch
from hgdpo_core.training.objective import find_objective

TableName = Literal["1", "1-weights", "3", "2", "4", "5", "6", "8", "length"]
TrainingData = Literal["own", "pairs", "foreign_pool", "labelled"]
"""Pools of the target's own; pairs that others labelled; and, of the built-in setting, two controls: pools of the
foreign generator, ranked as the own ones are, and the target's own first two images, labelled as the stand-in pairs."""

WITH_DIVERSITY: tuple[TableName, ...] = ("1", "8", "length")
ADDED_LATER = ("objective", "epochs", "rate_factor", "length_factor", "chosen", "data", "pairs", "chosen_weight")
READ_FOR_ONE = 1.4
"""Stand-in pairs of people that are read for one that is used: the others are ties."""
OURS = "HG-DPO"
"""The label of the method itself, the first row of Table 1."""


@dataclass(frozen=True)
class Arm:
    """One way to train and sample a tuned model."""

    world: World
    pool_size: int
    loser_rank: int
    prompts: int
    beta: float
    lambda_stat: float
    lora_weight: float
    latent_normalisation: bool = False
    objective: str = "dpo"
    epochs: int | None = None
    """Passes over the data; None: the length in the run's settings."""
    rate_factor: float = 1.0
    length_factor: float = 1.0
    """Learning rate and steps, as factors of those in the run's settings."""
    chosen: bool = False
    """Whether these factors are the best of the ablation's trials, on validation prompts."""
    data: TrainingData = "own"
    pairs: str = ""
    """Of "pairs": which, the settings of a PairSource as JSON."""
    chosen_weight: bool = False
    """Whether the LoRA weight is the best of the ablation's on validation prompts, and `lora_weight` one of them."""

    @property
    def pair_source(self) -> PairSource | None:
        """The pairs that others labelled; None for other data."""
        return PairSource.model_validate_json(self.pairs) if self.pairs else None

    def identity(self) -> dict[str, Any]:
        """Plain data for ids; fields that were added later enter where they differ from their defaults."""
        defaults = {field.name: field.default for field in fields(self) if field.name in ADDED_LATER}
        return {name: value for name, value in asdict(self).items() if value != defaults.get(name, MISSING)}


@dataclass(frozen=True)
class TableRow:
    """An arm under its name in the paper; `paper_row` is the key of its row there, None if the paper has none."""

    label: str
    arm: Arm
    paper_row: str | None = None


@dataclass(frozen=True)
class PlannedTable:
    """One of the paper's comparisons in one world."""

    number: TableName
    world: World
    rows: tuple[TableRow, ...]


def base_arm(config: RunConfig, prompts: int, world: World) -> Arm:
    """N-20 of the paper: best and worst of the whole pool, all prompts, plain Diffusion-DPO."""
    size = config.pool.images_per_prompt
    return Arm(world, size, size, prompts, config.dpo.beta, 0.0, config.evaluation.lora_weight)


def plan_tables(config: RunConfig, settings: AblationConfig, prompts: int) -> tuple[PlannedTable, ...]:
    """The tables of the requested comparisons. `prompts`: number of prompts of the whole data set of triplets."""
    return tuple(table for world in settings.worlds
                 for table in _world_tables(base_arm(config, prompts, world), config, settings))


def _world_tables(base: Arm, config: RunConfig, settings: AblationConfig) -> Iterator[PlannedTable]:
    requested, world, plain, name = settings.comparisons, base.world, base.world == "plain", f"N-{base.pool_size}"
    statistics = _statistic_rows(base, name, config, settings) if "statistics" in requested else []
    betas = [_row(base, f"{name} (beta x{factor:g})", f"N-20 (beta x{factor:g})", beta=base.beta * factor)
             for factor in settings.beta_factors] if "beta" in requested else []
    # the whole pool, which all arms are compared with, is always among the sizes
    sizes = dict.fromkeys([*(settings.pool_sizes if plain and "pool_size" in requested else ()), base.pool_size])
    by_size = [_row(base, f"N-{size}", f"N-{size}", pool_size=size, loser_rank=size) for size in sizes]
    if len(by_size) > 1 or statistics or (betas and not plain):
        yield PlannedTable("3", world, (*by_size, *statistics, *(() if plain else betas)))
    if statistics or betas:
        yield PlannedTable("2", world, (*by_size, *betas, *statistics))
    if plain and "loser_rank" in requested:
        yield PlannedTable("5", world, tuple(_row(base, f"{name}-L-{rank}", f"N-20-L-{rank}", loser_rank=rank)
                                             for rank in settings.loser_ranks))
    if plain and "dataset_size" in requested:
        counts = [(part, max(1, round(part * base.prompts))) for part in settings.dataset_shares]
        yield PlannedTable("6", world, tuple(
            _row(base, f"{name}-D-{count}", paper.TABLE_6_ROWS.get(part), prompts=count)
            for part, count in counts))
    if plain and "length" in requested:
        yield PlannedTable("length", world, tuple(
            _row(base, f"{epochs} epoch{'s' if epochs > 1 else ''}", lambda_stat=config.dpo.lambda_stat, epochs=epochs)
            for epochs in settings.epochs))
    if plain and "baselines" in requested:
        rows = tuple(_baseline_rows(base, config, settings))
        yield PlannedTable("1", world, rows)
        if settings.trials and settings.lora_weights:
            yield PlannedTable("1-weights", world, tuple(
                replace(row, arm=replace(row.arm, chosen_weight=True)) for row in rows))
    if plain and "personalised" in requested:
        yield PlannedTable("4", world, (_row(base, OURS, lambda_stat=config.dpo.lambda_stat),))
    if plain and "lora_weight" in requested:
        yield PlannedTable("8", world, tuple(
            _row(base, f"weight {weight:g}", lambda_stat=config.dpo.lambda_stat, lora_weight=weight)
            for weight in settings.lora_weights))


def _statistic_rows(base: Arm, name: str, config: RunConfig, settings: AblationConfig) -> list[TableRow]:
    own = config.dpo.lambda_stat  # the paper's row goes with the weight that this model is trained with
    return [_row(base, f"{name}-LAN", "N-20-LAN", latent_normalisation=True),
            *(_row(base, f"{name}-SML (lambda {format_lambda(weight)})", "N-20-SML" if weight == own else None,
                   lambda_stat=weight) for weight in dict.fromkeys([own, *settings.lambdas]))]


def _baseline_rows(base: Arm, config: RunConfig, settings: AblationConfig) -> Iterator[TableRow]:
    """HG-DPO, and what it is compared with. All are tuned alike: by as many trials."""
    plain = replace(base, chosen=bool(settings.trials))
    yield _row(plain, OURS, lambda_stat=config.dpo.lambda_stat)
    for source in pair_sources(settings, config, base.prompts):
        label, paper_row = _name_pairs(source)
        yield _row(plain, label, paper_row, data="pairs", pairs=source.model_dump_json(exclude_defaults=True))
    if is_built_in(config.target.source):
        yield _row(plain, "control: stand-in's images, our N and scorer", data="foreign_pool")
        yield _row(plain, "control: our images, stand-in's N and labels", data="labelled")
    yield _row(plain, "SFT on winners", "SFT on winners", objective="sft_winners")
    yield _row(plain, "AlignProp", "AlignProp", objective="alignprop")
    for factor in settings.beta_factors:
        yield _row(plain, f"DPO, beta x{factor:g}", f"beta x{factor:g}", beta=base.beta * factor)


def pair_sources(settings: AblationConfig, config: RunConfig, prompts: int) -> list[PairSource]:
    """Others' pairs, each as it is named and its human images alone; by default the stand-ins, for the built-in target.

    Of the stand-ins so many are read that about `prompts` are used: some are ties, and three in ten show no person.
    """
    if settings.pairs is not None:
        return [source.model_copy(update={"human_only": human}) for source in settings.pairs
                for human in ((True,) if source.human_only else (False, True))]
    if not is_built_in(config.target.source):
        return []
    return [PairSource(source=FOREIGN_SOURCE, limit=min(STAND_IN_PAIRS, round(share * prompts)), human_only=human)
            for human, share in ((False, READ_FOR_ONE), (True, READ_FOR_ONE / 0.7))]


def _name_pairs(source: PairSource) -> tuple[str, str | None]:
    """The label of a row, and its row in the paper."""
    name = source.source.rstrip("/").rpartition("/")[2]
    simple, end = re.sub(r"[^a-z0-9]", "", name.lower()), " (H)" if source.human_only else ""
    if source.source == FOREIGN_SOURCE:
        return f"Pick-a-Pic v2{end}: stand-in", f"Pick-a-Pic v2{end}"
    known = next((row for text, row in (("pickapic", "Pick-a-Pic v2"), ("hpd", "HPD v2")) if text in simple), None)
    return f"{name}{end}", known and f"{known}{end}"


def _row(base: Arm, label: str, paper_row: str | None = None, **changes: Any) -> TableRow:
    return TableRow(label, replace(base, **changes), paper_row)


def format_lambda(weight: float) -> str:
    """A weight of the statistic matching loss in short notation: 10000, 1e6."""
    return f"{weight:g}".replace("e+0", "e").replace("e+", "e")


def arm_labels(tables: Iterable[PlannedTable]) -> dict[Arm, str]:
    """Every arm once, in the order of the tables, with its label in the first of them that has it."""
    labels: dict[Arm, str] = {}
    for row in (row for table in tables for row in table.rows):
        labels.setdefault(row.arm, row.label)
    return labels


def training_of(arm: Arm) -> Arm:
    """The part of an arm that determines its LoRA: arms that differ only in how it is used have one training."""
    return replace(arm, lora_weight=1.0, latent_normalisation=False, chosen_weight=False)


def arm_config(config: RunConfig, arm: Arm, seed: int) -> RunConfig:
    """The run's settings with those of the arm; values that mean "all" stay at their default, to keep the ids."""
    whole = config.pool.images_per_prompt
    triplets = TripletConfig(pool_size=None if arm.pool_size == whole else arm.pool_size,
                             loser_rank=None if arm.loser_rank == arm.pool_size else arm.loser_rank)
    objective = find_objective(arm.objective)
    training = getattr(config, objective.section)
    if arm.data != "own" and training.max_steps is None:  # as long as the own pools' training, by whatever is read
        training = training.model_copy(update={"max_steps": max(1, round(steps_of(training, arm)))})
    update: dict[str, Any] = {"seed": seed, "learning_rate": training.learning_rate * arm.rate_factor,
                              **_length(training, arm)}
    if arm.data in ("foreign_pool", "labelled"):
        update["allow_foreign_triplets"] = True
    update |= {"beta": arm.beta, "lambda_stat": arm.lambda_stat} if objective.section == "dpo" else {
        "lora_rank": config.dpo.lora_rank}
    return config.model_copy(update={
        "triplets": triplets, "objective": arm.objective, "pairs": arm.pair_source,
        "scorer": ranking_scorer(config, arm.world),
        "sampler": config.sampler.model_copy(update={"latent_normalisation": arm.latent_normalisation}),
        objective.section: training.model_copy(update=update),
        "evaluation": config.evaluation.model_copy(update={
            "lora_weight": arm.lora_weight, "scorers": evaluation_scorers(config, arm.world)})})


def _length(training: TrainingConfig, arm: Arm) -> dict[str, int | None]:
    if arm.epochs is not None:
        return {"epochs": arm.epochs, "max_steps": None}
    if arm.length_factor == 1:
        return {}
    return {"max_steps": max(1, round(arm.length_factor * steps_of(training, arm)))}


def steps_of(training: TrainingConfig, arm: Arm) -> float:
    """Optimizer steps of a training over all of an arm's prompts."""
    return training.max_steps or training.epochs * arm.prompts / step_batch(training)


def ranking_scorer(config: RunConfig, world: World) -> ScorerConfig:
    """The scorer that ranks the pools of a world."""
    return config.scorer if world == "plain" else config.scorer.model_copy(update={"name": "tinted"})


def evaluation_scorers(config: RunConfig, world: World) -> tuple[ScorerConfig, ...]:
    """The scorers of a world's arms: the run's own and, in the tinted world, the one that ranked its pools."""
    own = config.evaluation.scorers
    named = any(scorer.name == "tinted" for scorer in own)
    return own if world == "plain" or named else (*own, ranking_scorer(config, world))
