"""A study's results as tables for people: Markdown, the terminal and the Prefect UI."""

from collections.abc import Sequence

from hgdpo_core.metrics import WinRate
from hgdpo_core.progress import count_of
from hgdpo_core.rendering.parts import NOTHING, percent, percent_interval, signed, signed_interval
from hgdpo_core.rendering.tables import Cell, Table, with_interval
from hgdpo_core.scorers import scorer_title
from hgdpo_core.statistics.intervals import Estimate
from hgdpo_core.study.findings import ModelRate, StudyResults
from hgdpo_core.study.rules import RULE

METHOD = ("Rate = wins / (wins + losses); ties count apart. Intervals are of 95 % and count people and prompts as "
          "clusters: they are about other people and other prompts of the same kinds.")


def results_markdown(results: StudyResults) -> str:
    """The content of `results.md`."""
    tables = "\n\n".join(table.markdown() for table in result_tables(results))
    return f"# User study {results.study_id}\n\n{summarise_votes(results)}\n\n{tables}\n"


def results_text(results: StudyResults) -> str:
    """The same for a terminal."""
    tables = "\n\n".join("\n".join([table.title, *table.notes, table.text()]) for table in result_tables(results))
    return f"{summarise_votes(results)}\n\n{tables}"


def result_tables(results: StudyResults) -> list[Table]:
    """All tables that have rows; the first has the win rates."""
    tables = (win_rate_table(results), _strength_table(results), _agreement_table(results), _judge_table(results),
              _participant_table(results), _vote_table(results))
    return [table for table in tables if table.rows]


def summarise_votes(results: StudyResults) -> str:
    """Who answered how much, and who was excluded by which rule, in a few sentences."""
    answered, excluded = len(results.participants), len(results.excluded)
    who = "no participant is" if not excluded else f"{count_of(excluded, 'participant is', 'participants are')}"
    return (f"{count_of(answered, 'person', 'people')} gave {count_of(results.read, 'answer')}, of which "
            f"{results.used:,} count. Rule: {RULE}; {who} excluded.")


def win_rate_table(results: StudyResults) -> Table:
    """Each model against each other, with and without excluded participants, and how many more answers are needed."""
    excluded = {(one.model, one.against): one.rate for one in results.rates_of_all}
    rows = [(f"{one.model} against {one.against}", rate_cell(one.rate), f"{one.rate.wins:,}", f"{one.rate.losses:,}",
             f"{one.rate.ties:,}", f"{one.people:,}", f"{one.prompts:,}",
             *((rate_cell(excluded[one.model, one.against]),) if results.excluded else ()), _more(one))
            for one in results.rates]
    columns = ["Model", "Win rate", "Wins", "Losses", "Ties", "People", "Prompts",
               *(("With excluded",) if results.excluded else ()), _more_title(results.rates)]
    return Table(columns, rows, "People preferred", (METHOD,))


def rate_cell(rate: WinRate) -> Cell:
    """A rate and its interval."""
    return with_interval(percent(rate.rate), percent_interval(rate.ci_low, rate.ci_high))


def _more_title(rates: Sequence[ModelRate]) -> str:
    wanted = next((one.more.half_width for one in rates if one.more), None)
    return "More answers" if wanted is None else f"More answers for ± {100 * wanted:g} points"


def _more(one: ModelRate) -> str:
    more = one.more
    if more is None:
        return NOTHING
    if more.same_prompts == 0:
        return "none"
    same, new = ("not enough at any number" if count is None else f"{count:,}"
                 for count in (more.same_prompts, more.new_prompts))
    return f"new prompts: {new}; same prompts: {same}"


def _strength_table(results: StudyResults) -> Table:
    rows = [(one.model, NOTHING if one.strength is None else
             with_interval(signed(one.strength, 2), signed_interval(one.ci_low, one.ci_high, 2)))
            for one in results.strengths]
    note = "Log odds of being preferred to a model of average strength (Bradley and Terry), ties left out."
    if any(one.strength is None for one in results.strengths):
        note += " Some models never lost to the others or were not compared with them, so no finite strengths exist."
    return Table(("Model", "Strength"), rows, "Strength of each model", (note,))


def _agreement_table(results: StudyResults) -> Table:
    repeats = results.repeats
    again = percent(repeats.consistent / repeats.repeated) if repeats.repeated else NOTHING
    rows = [("Krippendorff's alpha (nominal; 1: all agree, 0: as by chance)", alpha_cell(results.alpha)),
            ("the same answer to a repeated pair", Cell(again, f"{repeats.consistent:,} of {repeats.repeated:,}")),
            ("the left image was chosen", rate_cell(results.left_chosen)),
            ("median time for a question", NOTHING if results.median_seconds is None
             else f"{results.median_seconds:.1f} s")]
    return Table(("Measure", "Value"), rows, "Agreement among people")


def alpha_cell(alpha: Estimate) -> Cell:
    """Krippendorff's alpha with its interval."""
    return with_interval(NOTHING if alpha.value is None else signed(alpha.value, 2),
                         signed_interval(alpha.ci_low, alpha.ci_high, 2))


def _judge_table(results: StudyResults) -> Table:
    rows = [(scorer_title(one.judge), rate_cell(one.votes), f"{one.votes.wins + one.votes.losses:,}",
             rate_cell(one.pairs), f"{one.pairs.wins + one.pairs.losses:,}") for one in results.judges]
    note = ("How often the image that a judge scores higher is the one that people chose: over single votes, and over "
            "pairs with the majority of their votes. Ties are left out.")
    return Table(("Judge", "Of votes", "Votes", "Of majorities", "Pairs"), rows, "Judges with people", (note,))


def _participant_table(results: StudyResults) -> Table:
    rows = [(one.participant, f"{one.failed:,} of {one.checks:,}", "excluded" if one.excluded else "counts")
            for one in results.participants if one.failed]
    return Table(("Participant", "Failed", "Votes"), rows, "Attention checks that were failed",
                 (f"Rule: {RULE}. The table of win rates has both counts.",))


def _vote_table(results: StudyResults) -> Table:
    rows = [("read", f"{results.read:,}"), *((f"left out: {reason}", f"{count:,}")
                                             for reason, count in sorted(results.left_out.items())),
            ("used", f"{results.used:,}")]
    return Table(("Votes", "Number"), rows, "Which votes count")
