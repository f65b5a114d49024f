"""The paper's tables with our numbers, intervals and seeds, next to the paper's numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hgdpo_core.ablate import paper
from hgdpo_core.ablate.arms import Arm, PlannedTable, arm_labels, base_arm
from hgdpo_core.ablate.claims import Claim
from hgdpo_core.ablate.personal import LEAST_CONTROL, NARROW, Personal
from hgdpo_core.ablate.result import Results
from hgdpo_core.ablate.settings import World
from hgdpo_core.built_in import is_built_in
from hgdpo_core.rendering.parts import NOTHING
from hgdpo_core.rendering.tables import Table
from hgdpo_core.scorers import defect_limit, scorer_title
from hgdpo_core.scorers.identity import judge_title
from hgdpo_core.statistics.intervals import Estimate

TITLES = {"1": "Table 1: HG-DPO against the baselines",
          "1-weights": "Table 1, each arm at a LoRA weight of its own", "length": "Length of training",
          "3": "Table 3: pool size, and what keeps the colours", "5": "Table 5: the loser's rank",
          "4": "Table 4: a personalised model with the LoRA against the same without",
          "6": "Table 6: size of the data set", "2": "Table 2: colour shift", "8": "Figure 8: LoRA weight"}
WORLDS: dict[World, str] = {
    "plain": "plain world",
    "tinted": "TINTED WORLD: the scorer that ranks the pools is made to prefer warm tints"}
PAPER_TABLES = {"1": paper.TABLE_1, "3": paper.TABLE_3, "5": paper.TABLE_5, "6": paper.TABLE_6}
STAND_IN_NOTE = (
    "Stand-in: no public data set is used here. Its images are stood in for by those of another small generator, of "
    "another style, three in ten without people; its people by a third network, the labeller, which sees two images of "
    "a prompt and is wrong in some pairs (figures/weights/README.md). (H): the pairs whose prompt names a person. The "
    "controls part what differs between those pairs and ours: the images, N and who ranks them.")
COLOUR_ROWS = (("Hue, %", "hue", 0), ("Saturation, %", "saturation", 1), ("Value, %", "value", 2),
               ("Hue, degrees", "hue_degrees", None), ("Red minus blue, levels of 255", "warmth", None),
               ("Distance in RGB, levels of 255", "distance", None))


@dataclass(frozen=True)
class AblationTable(Table):
    """A table of plain strings, and its plot."""

    plot: str = ""
    """Name of the plot of the same numbers, if there is one."""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values under the field names."""
        return {"title": self.title, "notes": list(self.notes), "columns": list(self.columns),
                "rows": [list(row) for row in self.rows], "plot": self.plot}


def plot_name(number: str, world: World) -> str:
    """File name, without suffix, of the plot of a table or figure."""
    return f"{'figure' if number in ('5b', '8') else 'table'}-{number}-{world}"


def make_tables(results: Results, claims: Sequence[Claim], personal: Personal | None = None) -> list[AblationTable]:
    """All tables of an ablation, the verdicts on the paper's trends first; `personal`: the numbers of Table 4."""
    makers = {"1": _baseline_table, "1-weights": _baseline_table, "2": _colour_table, "8": _weight_table,
              "length": _length_table}
    return [*([_claims_table(claims)] if claims else ()),
            *(makers.get(planned.number, _win_rate_table)(results, planned) for planned in results.ablation.tables
              if planned.number != "4"), *((_personal_table(personal),) if personal else ()),
            *(_distance_table(results, world) for world in results.distances), _training_table(results)]


def _claims_table(claims: Sequence[Claim]) -> AblationTable:
    rows = [(claim.text, _short(claim.world), claim.verdict, _interval(claim.estimate, 2, signed=True), claim.unit,
             claim.measured) for claim in claims]
    notes = ('"holds": the 95 % interval is on the paper\'s side of 0; "opposite": on the other side; "not shown": '
             "it contains 0. Rows are not corrected for multiple comparisons: of twenty rows without any effect, one "
             "would hold or be opposite by chance.",)
    return AblationTable(("Trend", "World", "Verdict", "Difference (95 %)", "Unit", "Measured"), rows,
                         "Which of the paper's trends hold here", notes)


def _win_rate_table(results: Results, planned: PlannedTable) -> AblationTable:
    whole = base_arm(results.ablation.run.config, len(results.ablation.run.prompts.prompts), planned.world)
    scorers = results.scorers(planned)
    columns = ["Configuration", "paper: PickScore / HPS / ImageReward / Aesthetic / CLIP"]
    for scorer in scorers:
        columns += [f"{scorer_title(scorer)}: wins, %", "per seed", "wins/losses/ties",
                    "against the whole pool, points", "mean score change"]
        if defect_limit(scorer) is not None:
            columns.append("defective images, points")
    rows = []
    for row in planned.rows:
        published = PAPER_TABLES[planned.number].get(row.paper_row or "")
        cells = (cell for scorer in scorers for cell in _win_rate_cells(results, row.arm, whole, scorer))
        rows.append((row.label, " / ".join(f"{value:.1f}" for value in published) if published else NOTHING, *cells))
    notes = [_method(results, planned.world)]
    if planned.number == "3" and planned.world == "tinted":
        notes.append("The paper's numbers are by its own scorer, without an added preference.")
    if planned.number == "5":
        notes.append(paper.COPYING_ERROR)
    if planned.number == "6":
        notes.append("The paper's rows are 2 %, 50 % and 100 % of 100 000 triplets; all rows here train for the same "
                     "number of steps where dpo.max_steps is set.")
    return AblationTable(columns, rows, _title(planned), notes, plot=plot_name(planned.number, planned.world))


def _win_rate_cells(results: Results, arm: Arm, whole: Arm, scorer: str) -> list[str]:
    records = results.records[arm]
    counts = [tuple(record.win_rate[scorer][name] for name in ("wins", "losses", "ties")) for record in records]
    rates = (record.win_rate[scorer]["rate"] for record in records)
    gap = None if arm == whole or whole not in results.records else results.win_rate_gap(arm, whole, scorer).scaled(100)
    cells = [_interval(results.win_rate(arm, scorer).scaled(100), 1),
             ", ".join(NOTHING if rate is None else f"{100 * rate:.1f}" for rate in rates),
             "/".join(str(sum(count[i] or 0 for count in counts)) for i in range(3)), _interval(gap, 1, signed=True),
             _interval(results.score_change(arm, scorer), 3, signed=True)]
    defects = results.defects(arm, scorer)
    return cells if defects is None else [*cells, _interval(defects.scaled(100), 2, signed=True)]


def _colour_table(results: Results, planned: PlannedTable) -> AblationTable:
    rows: list[tuple[str, ...]] = []
    for title, name, channel in COLOUR_ROWS:
        rows.append((title, *(_interval(results.colour(row.arm, name), 2, signed=name != "distance")
                              for row in planned.rows)))
        if channel is not None:
            published = (paper.TABLE_2.get(row.paper_row or "") for row in planned.rows)
            rows.append((f"{title}: the paper, without sign",
                         *(NOTHING if value is None else f"{value[channel]:.2f}" for value in published)))
    notes = (_method(results, planned.world),
             "Tuned model minus target over all pixels of the evaluation images, with sign (the paper prints absolute "
             "values). Hue is an angle: use the row in degrees, of the saturation-weighted circular mean. If all hues "
             "are equally frequent, this mean has hardly a direction and a wide interval; red minus blue is more "
             "informative then. The distance in RGB has no sign, so noise alone makes it positive.")
    return AblationTable(("Channel", *(row.label for row in planned.rows)), rows, _title(planned), notes,
                         plot=plot_name("2", planned.world))


def _weight_table(results: Results, planned: PlannedTable) -> AblationTable:
    scorers, settings = results.scorers(planned), results.ablation.settings
    rows = [("weight 0 (target)", *[NOTHING] * (2 * len(scorers)), _interval(results.diversity_of(None), 4))]
    for row in planned.rows:
        cells = (cell for scorer in scorers
                 for cell in (_interval(results.win_rate(row.arm, scorer).scaled(100), 1),
                              _interval(results.score_change(row.arm, scorer), 3, signed=True)))
        rows.append((row.label, *cells, _interval(results.diversity_of(row.arm), 4)))
    columns = (column for name in scorers for column in (f"{scorer_title(name)}: wins, %", "mean score change"))
    notes = (_method(results, planned.world),
             f"Diversity: mean of 1 - cosine between the image features of all pairs of {settings.diversity_images} "
             f"images of a prompt, over {settings.diversity_prompts} prompts. The paper shows images and chooses "
             "weight 0.5.")
    return AblationTable(("N-20-SML with the LoRA at", *columns, "diversity"), rows, _title(planned), notes,
                         plot=plot_name("8", planned.world))


def _baseline_table(results: Results, planned: PlannedTable) -> AblationTable:
    ours, scorers, own_weights = planned.rows[0], results.scorers(planned), planned.number == "1-weights"
    rows = []
    for row in planned.rows:
        published = PAPER_TABLES["1"].get(row.paper_row or "")
        against = [NOTHING if row is ours else
                   _interval(results.win_rate_against(ours.arm, row.arm, scorer).scaled(100), 1) for scorer in scorers]
        rows.append((row.label if row is ours else f"vs. {row.label}", *against,
                     " / ".join(f"{value:.1f}" for value in published) if published else NOTHING,
                     *(_interval(results.win_rate(row.arm, scorer).scaled(100), 1) for scorer in scorers),
                     *_effects(results, row.arm, scorers, diversity=not own_weights),
                     *((_weight_cell(results, row.arm),) if own_weights else _settings_cells(results, row.arm))))
    columns = ("Baseline", *(f"HG-DPO wins by {scorer_title(scorer)}, %" for scorer in scorers),
               "paper: PickScore / HPS / ImageReward / Aesthetic / CLIP",
               *(f"wins against the target by {scorer_title(scorer)}, %" for scorer in scorers),
               *_effect_columns(scorers, diversity=not own_weights),
               *(("LoRA weight chosen of",) if own_weights else
                 ("learning rate, steps: factor chosen of", "pairs", "training, s")))
    notes = [_method(results, planned.world), *(_weight_notes() if own_weights else _baseline_notes(results, planned)),
             "The paper's numbers are of 177 prompts, one training each; 50 % is no difference."]
    return AblationTable(columns, rows, _title(planned), notes, plot=plot_name(planned.number, planned.world))


def _weight_notes() -> list[str]:
    return ["The same trainings. Each arm's LoRA is at the weight that was best by the ranking scorer on validation "
            "prompts, of its first training; the table before has all at one weight."]


def _baseline_notes(results: Results, planned: PlannedTable) -> list[str]:
    trials = len(results.ablation.settings.trials)
    fair = (f"Every arm had {trials} trials of learning rate and steps on validation prompts, one training each, and "
            "took the best by the ranking scorer." if trials else "All arms are trained by the settings as they are.")
    notes = [f"{fair} All have the same LoRA layers and weight. Those trained on triplets see as many images in a "
             "step; AlignProp samples its own. Pairs: how many different ones. The seconds are of one training, and "
             "hold none of its data."]
    if any(row.arm.data in ("foreign_pool", "labelled") for row in planned.rows):
        notes.append(STAND_IN_NOTE)
    return notes


def _length_table(results: Results, planned: PlannedTable) -> AblationTable:
    scorers, rows = results.scorers(planned), []
    for row in planned.rows:
        cells = (cell for scorer in scorers
                 for cell in (_interval(results.win_rate(row.arm, scorer).scaled(100), 1),
                              _interval(results.score_change(row.arm, scorer), 3, signed=True)))
        rows.append((row.label, *cells, *_effects(results, row.arm, scorers), _warnings(results, row.arm)))
    columns = (column for name in scorers for column in (f"{scorer_title(name)}: wins, %", "mean score change"))
    notes = (_method(results, planned.world), f"Diversity of the target: {_interval(results.diversity_of(None), 4)}. "
             "Checks: those of a run, and in how many trainings they found something. "
             "The paper does not name its length; version 3 trains this stage for 300 000 steps of 16 pairs, some 16 "
             "epochs.")
    return AblationTable(("N-20-SML trained for", *columns, *_effect_columns(scorers), "checks"), rows, _title(planned),
                         notes, plot=plot_name("length", planned.world))


def _effect_columns(scorers: Sequence[str], *, diversity: bool = True) -> tuple[str, ...]:
    limited = [name for name in scorers if defect_limit(name) is not None]
    defects = (f"defective images by {scorer_title(name)}, points" for name in limited)
    return ("colour distance in RGB, levels of 255", *(("diversity",) if diversity else ()), *defects)


def _effects(results: Results, arm: Arm, scorers: Sequence[str], *, diversity: bool = True) -> list[str]:
    """Colours, diversity and defects."""
    defects = (results.defects(arm, name) for name in scorers if defect_limit(name) is not None)
    spread = [_interval(results.diversity_of(arm), 4)] if diversity else []
    return [_interval(results.colour(arm, "distance"), 2), *spread,
            *(_interval(value.scaled(100) if value else None, 2, signed=True) for value in defects)]


def _weight_cell(results: Results, arm: Arm) -> str:
    """The weight that an arm's LoRA is best at, with how it did at each."""
    tried = results.records[arm][0].weights
    best = max(tried, key=lambda one: one.win_rate)
    return f"{best.weight:g} ({', '.join(f'{one.weight:g}: {100 * one.win_rate:.1f} %' for one in tried)})"


def _settings_cells(results: Results, arm: Arm) -> tuple[str, str, str]:
    """The factors that an arm's trials chose, with how it did in each; its pairs, and the seconds of a training."""
    records = results.records[arm]
    seconds = [record.seconds for record in records if record.seconds is not None]
    best = max(records[0].trials, key=lambda trial: trial.win_rate, default=None)
    tried = ", ".join(f"{trial.rate_factor:g} x {trial.length_factor:g}: {100 * trial.win_rate:.1f} %"
                      for trial in records[0].trials)
    chosen = f"{best.rate_factor:g} x {best.length_factor:g} ({tried})" if best else "as set"
    pairs = str(records[0].triplets) if records[0].triplets else NOTHING
    return chosen, pairs, f"{sum(seconds) / len(seconds):.0f}" if seconds else NOTHING


def _warnings(results: Results, arm: Arm) -> str:
    names = [name for record in results.records[arm] for name in record.warnings]
    return ", ".join(f"{name} ({names.count(name)})" for name in dict.fromkeys(names)) or "none"


def _personal_table(personal: Personal) -> AblationTable:
    rows = []
    for name, values in {**personal.gains, **personal.nearer}.items():
        is_judge = name in personal.nearer
        title = judge_title(name) if is_judge else scorer_title(name)
        published = paper.TABLE_4.get(name.partition("_")[0])
        each = (personal.rate(row[None]).value for row in values)
        rows.append((title, _interval(personal.rate(values).scaled(100), 1),
                     ", ".join(NOTHING if rate is None else f"{100 * rate:.1f}" for rate in each),
                     *(_identity_cells(personal, name) if is_judge else (NOTHING,) * 4),
                     NOTHING if published is None else f"{published:.2f}"))
    samples, trainings = len(personal.people.of_vote), len(next(iter(personal.gains.values())))
    notes = (
        f"{personal.people.count} people, {personal.prompts.count} prompts, {samples} samples of each model, "
        f"{trainings} trainings; intervals by resampling people, prompts and trainings, which errs towards wide. By a "
        "scorer: how often the image with the LoRA scores above the one without; by a judge of identity: how often its "
        "face is nearer to the person.",
        f"Identity is kept where the whole 90 % interval is within 50 ± {100 * personal.margin:g} %, which was set "
        "before the images were seen, and changed where all of it is outside. The control: how often the judge prefers "
        "the target's image with the adapter on to that with it off; at "
        f"{100 * LEAST_CONTROL:g} % or less its verdict would mean nothing.",
        "The paper: InstantBooth, 20 people with 20 prompts, photographs, one training, no intervals.")
    return AblationTable(("By", "wins with the LoRA, %", "per training", "90 % interval", "identity", "control, %",
                          "images without a face", "paper"), rows, TITLES["4"], notes)


def _identity_cells(personal: Personal, judge: str) -> tuple[str, str, str, str]:
    narrow = personal.rate(personal.nearer[judge], NARROW)
    ends = NOTHING if narrow.ci_low is None else f"{100 * narrow.ci_low:.1f} to {100 * (narrow.ci_high or 0):.1f}"
    verdict = {"kept": "kept", "changed": "changed", "open": "not shown", None: "not shown: the control is too low"}
    return (ends, verdict[personal.verdict(judge)], _interval(personal.rate(personal.control[judge]).scaled(100), 1),
            f"{personal.faceless[judge]:,}")


def _distance_table(results: Results, world: World) -> AblationTable:
    pools, ranks, _ = results.distances[world].shape
    means = results.distances[world].mean(axis=0)
    error = results.distances[world].std(axis=0, ddof=1) / pools**0.5 if pools > 1 else 0 * means
    rows = [(str(n + 2), *(f"{means[n, i]:.4f} ± {1.96 * error[n, i]:.4f}" for i in range(2))) for n in range(ranks)]
    notes = (f"Cosine distance to the best image's channels, mean over {pools} pools with 1.96 standard errors. The "
             "paper prints a curve, no numbers: the distance of its means grows with the rank, that of its deviations "
             "hardly.",)
    return AblationTable(("Rank n", "channel means", "channel standard deviations"), rows,
                         f"Figure 5b: latent statistics against rank{'' if world == 'plain' else ', TINTED WORLD'}",
                         notes, plot=plot_name("5b", world))


def _training_table(results: Results) -> AblationTable:
    labels, rows = arm_labels(results.ablation.tables), []
    for arm, records in results.records.items():
        means = {name: sum(record.training[name] for record in records) / len(records)
                 for name in records[0].training}
        if arm.objective != "dpo":
            continue
        rows.append((f"{labels[arm]}, {_short(arm.world)}", str(records[0].triplets), f"{means['dpo_loss']:.4f}",
                     f"{arm.lambda_stat * means['stat_loss']:.4f}", f"{means['implicit_accuracy']:.3f}"))
    notes = ("Means over the last fifth of the log and over the seeds. Arms that differ only in sampling (LAN, LoRA "
             "weight) have the values of their common training.",)
    return AblationTable(("Arm", "triplets", "DPO loss", "lambda * statistic loss", "implicit accuracy"), rows,
                         "End of the trainings", notes)


def _method(results: Results, world: World) -> str:
    ablation, prompts = results.ablation, results.ablation.run.evaluation_prompts.prompts
    source = ablation.run.config.evaluation.prompts
    split = f"{source.split} " if is_built_in(source.source) else ""
    seeds = ablation.settings.seeds
    return (f"{WORLDS[world][0].upper()}{WORLDS[world][1:]}. {len(prompts)} held-out {split}prompts, "
            + ("1 training per arm; 95 % intervals by resampling prompts, without the variance between trainings."
               if seeds == 1 else f"{seeds} trainings per arm; 95 % intervals by resampling prompts and seeds."))


def _title(planned: PlannedTable) -> str:
    return TITLES[planned.number] + ("" if planned.world == "plain" else ", TINTED WORLD")


def _short(world: World) -> str:
    return "plain" if world == "plain" else "TINTED"


def _interval(value: Estimate | None, digits: int, *, signed: bool = False) -> str:
    if value is None or value.value is None or value.ci_low is None or value.ci_high is None:
        return NOTHING
    sign = "+" if signed else ""
    return f"{value.value:{sign}.{digits}f} ({value.ci_low:{sign}.{digits}f} to {value.ci_high:{sign}.{digits}f})"
