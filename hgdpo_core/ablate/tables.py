"""The paper's table shapes with our numbers, intervals and seeds in them and the paper's beside."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hgdpo_core.ablate import paper
from hgdpo_core.ablate.arms import Arm, PlannedTable, arm_labels, base_arm
from hgdpo_core.ablate.claims import Claim
from hgdpo_core.ablate.estimates import scaled
from hgdpo_core.ablate.result import Results
from hgdpo_core.ablate.settings import World
from hgdpo_core.built_in import is_built_in
from hgdpo_core.rendering.tables import Table
from hgdpo_core.scorers import defect_limit, scorer_title
from hgdpo_core.statistics.intervals import Estimate

TITLES = {"3": "Table 3: pool size, and what keeps the colours", "5": "Table 5: the loser's rank",
          "6": "Table 6: size of the data set", "2": "Table 2: colour shift", "8": "Figure 8: LoRA weight"}
WORLDS: dict[World, str] = {
    "plain": "plain world",
    "tinted": "TINTED WORLD: the judge that ranks the pools is made fond of warm tints"}
PAPER_TABLES = {"3": paper.TABLE_3, "5": paper.TABLE_5, "6": paper.TABLE_6}
COLOUR_ROWS = (("Hue, %", "hue", 0), ("Saturation, %", "saturation", 1), ("Value, %", "value", 2),
               ("Hue, degrees", "hue_degrees", None), ("Red minus blue, levels of 255", "warmth", None),
               ("Distance in RGB, levels of 255", "distance", None))


@dataclass(frozen=True)
class AblationTable(Table):
    """A table of plain strings, and its plot."""

    plot: str = ""
    """Name of the image of the same numbers, where there is one."""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values under the field names."""
        return {"title": self.title, "notes": list(self.notes), "columns": list(self.columns),
                "rows": [list(row) for row in self.rows], "plot": self.plot}


def plot_name(number: str, world: World) -> str:
    """File name, without its end, of a table's or figure's plot."""
    return f"{'figure' if number in ('5b', '8') else 'table'}-{number}-{world}"


def make_tables(results: Results, claims: Sequence[Claim]) -> list[AblationTable]:
    """All tables of an ablation, the verdicts on the paper's trends first."""
    tables = [_claims_table(claims)] if claims else []
    for planned in results.ablation.tables:
        if planned.number == "2":
            tables.append(_colour_table(results, planned))
        elif planned.number == "8":
            tables.append(_weight_table(results, planned))
        else:
            tables.append(_win_rate_table(results, planned))
    return [*tables, *(_distance_table(results, world) for world in results.distances), _training_table(results)]


def _claims_table(claims: Sequence[Claim]) -> AblationTable:
    rows = [(claim.text, _short(claim.world), claim.verdict, _interval(claim.estimate, 2, signed=True), claim.unit,
             claim.measured) for claim in claims]
    notes = ('"holds": the 95 % interval lies on the paper\'s side of 0; "opposite": on the other side; "not shown": '
             "it contains 0. Rows are not corrected for their number: of twenty with nothing behind them one would "
             "hold or be opposite by chance.",)
    return AblationTable(("Trend", "World", "Verdict", "Difference (95 %)", "Unit", "Measured"), rows,
                         "Which of the paper's trends hold here", notes)


def _win_rate_table(results: Results, planned: PlannedTable) -> AblationTable:
    whole = base_arm(results.ablation.run.config, len(results.ablation.run.prompts.prompts), planned.world)
    scorers = list(results.records[planned.rows[0].arm][0].win_rate)
    columns = ["Configuration", "paper: PickScore / HPS / ImageReward / Aesthetic / CLIP"]
    for scorer in scorers:
        columns += [f"{scorer_title(scorer)}: wins, %", "per seed", "wins/losses/ties",
                    "against the whole pool, points", "mean score change"]
        if defect_limit(scorer) is not None:
            columns.append("defective images, points")
    rows = []
    for row in planned.rows:
        cells = [row.label, _paper_row(PAPER_TABLES[planned.number].get(row.paper_row or ""))]
        for scorer in scorers:
            cells += _win_rate_cells(results, row.arm, whole, scorer)
        rows.append(tuple(cells))
    notes = [_how(results, planned.world)]
    if planned.number == "3" and planned.world == "tinted":
        notes.append("The paper's numbers are of its own judge, which nobody tinted on purpose.")
    if planned.number == "5":
        notes.append(paper.COPYING_ERROR)
    if planned.number == "6":
        notes.append("The paper's rows are 2 %, 50 % and 100 % of 100 000 triplets; all rows here train for the same "
                     "number of steps where dpo.max_steps is set.")
    return AblationTable(columns, rows, _title(planned), notes, plot=plot_name(planned.number, planned.world))


def _win_rate_cells(results: Results, arm: Arm, whole: Arm, scorer: str) -> list[str]:
    records = results.records[arm]
    counts = [tuple(record.win_rate[scorer][name] for name in ("wins", "losses", "ties")) for record in records]
    seeds = ", ".join(_percent(record.win_rate[scorer]["rate"]) for record in records)
    gap = "–" if arm == whole or whole not in results.records else _interval(
        scaled(results.win_rate_gap(arm, whole, scorer), 100), 1, signed=True)
    cells = [_interval(scaled(results.win_rate(arm, scorer), 100), 1), seeds,
             "/".join(str(sum(count[i] or 0 for count in counts)) for i in range(3)), gap,
             _interval(results.score_change(arm, scorer), 3, signed=True)]
    defects = results.defects(arm, scorer)
    return cells if defects is None else [*cells, _interval(scaled(defects, 100), 2, signed=True)]


def _colour_table(results: Results, planned: PlannedTable) -> AblationTable:
    rows: list[tuple[str, ...]] = []
    for title, name, channel in COLOUR_ROWS:
        rows.append((title, *(_interval(results.colour(row.arm, name), 2, signed=name != "distance")
                              for row in planned.rows)))
        if channel is not None:
            found = [paper.TABLE_2.get(row.paper_row or "") for row in planned.rows]
            rows.append((f"{title}: the paper, without sign",
                         *("–" if value is None else f"{value[channel]:.2f}" for value in found)))
    notes = (_how(results, planned.world),
             "Tuned model minus target over all pixels of the evaluation images, with sign (the paper prints sizes). "
             "Hue is an angle: read the degrees, which are of the saturation-weighted circular mean; where the "
             "pictures hold all hues alike that mean has hardly a direction, its interval is wide, and red minus blue "
             "tells more. The distance in RGB has no sign, so noise alone puts it above 0.")
    return AblationTable(("Channel", *(row.label for row in planned.rows)), rows, _title(planned), notes,
                         plot=plot_name("2", planned.world))


def _weight_table(results: Results, planned: PlannedTable) -> AblationTable:
    scorers = list(results.records[planned.rows[0].arm][0].win_rate)
    target = results.diversity_of(None)
    rows: list[tuple[str, ...]] = [("weight 0 (target)", *("–" for _ in range(2 * len(scorers))), _or_dash(target, 4))]
    for row in planned.rows:
        cells = [row.label]
        for scorer in scorers:
            cells += [_interval(scaled(results.win_rate(row.arm, scorer), 100), 1),
                      _interval(results.score_change(row.arm, scorer), 3, signed=True)]
        rows.append((*cells, _or_dash(results.diversity_of(row.arm), 4)))
    columns = ["N-20-SML with the LoRA at"]
    for scorer in scorers:
        columns += [f"{scorer_title(scorer)}: wins, %", "mean score change"]
    settings = results.ablation.settings
    notes = (_how(results, planned.world),
             "Diversity: mean of 1 - cosine between the image features of every two of "
             f"{settings.diversity_images} images of a prompt, over {settings.diversity_prompts} prompts. The paper "
             "shows pictures and chooses weight 0.5.")
    return AblationTable((*columns, "diversity"), rows, _title(planned), notes, plot=plot_name("8", planned.world))


def _distance_table(results: Results, world: World) -> AblationTable:
    pools, ranks, _ = results.distances[world].shape
    means = results.distances[world].mean(axis=0)
    error = results.distances[world].std(axis=0, ddof=1) / pools**0.5 if pools > 1 else 0 * means
    rows = [(str(n + 2), *(f"{means[n, i]:.4f} ± {1.96 * error[n, i]:.4f}" for i in range(2))) for n in range(ranks)]
    notes = (f"Cosine distance to the best image's channels, mean over {pools} pools with 1.96 standard errors. The "
             "paper prints a curve, no numbers: its means drift apart with the rank, its deviations stay close.",)
    return AblationTable(("Rank n", "channel means", "channel standard deviations"), rows,
                         f"Figure 5b: latent statistics against rank{'' if world == 'plain' else ', TINTED WORLD'}",
                         notes, plot=plot_name("5b", world))


def _training_table(results: Results) -> AblationTable:
    labels, rows = arm_labels(results.ablation.tables), []
    for arm, records in results.records.items():
        means = {name: sum(record.training[name] for record in records) / len(records)
                 for name in records[0].training}
        rows.append((f"{labels[arm]}, {_short(arm.world)}", str(records[0].triplets), f"{means['dpo_loss']:.4f}",
                     f"{arm.lambda_stat * means['stat_loss']:.4f}", f"{means['implicit_accuracy']:.3f}"))
    notes = ("Means over the last fifth of the log and over the seeds. An arm that only samples otherwise (LAN, LoRA "
             "weight) shows its training's row.",)
    return AblationTable(("Arm", "triplets", "DPO loss", "lambda * statistic loss", "implicit accuracy"), rows,
                         "How the trainings ended", notes)


def _how(results: Results, world: World) -> str:
    ablation, prompts = results.ablation, results.ablation.run.evaluation_prompts.prompts
    source = ablation.run.config.evaluation.prompts
    split = f"{source.split} " if is_built_in(source.source) else ""
    seeds = ablation.settings.seeds
    return (f"{WORLDS[world][0].upper()}{WORLDS[world][1:]}. {len(prompts)} held-out {split}prompts, "
            + ("1 training an arm; 95 % intervals by resampling prompts: how trainings differ is not in them."
               if seeds == 1 else f"{seeds} trainings an arm; 95 % intervals by resampling prompts and seeds."))


def _title(planned: PlannedTable) -> str:
    return TITLES[planned.number] + ("" if planned.world == "plain" else ", TINTED WORLD")


def _short(world: World) -> str:
    return "plain" if world == "plain" else "TINTED"


def _paper_row(row: paper.Row | None) -> str:
    return "–" if row is None else " / ".join(f"{value:.1f}" for value in row)


def _percent(value: float | int | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _or_dash(value: Estimate | None, digits: int) -> str:
    return "–" if value is None else _interval(value, digits)


def _interval(value: Estimate, digits: int, *, signed: bool = False) -> str:
    if value.value is None or value.ci_low is None or value.ci_high is None:
        return "–"
    sign = "+" if signed else ""
    return f"{value.value:{sign}.{digits}f} ({value.ci_low:{sign}.{digits}f} to {value.ci_high:{sign}.{digits}f})"
