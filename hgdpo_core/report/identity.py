"""The section of a personalised comparison: is the person still the same? (arXiv:2405.20216v1, Table 4)"""

from collections.abc import Mapping

from hgdpo_core.evaluate import Comparison
from hgdpo_core.rendering.parts import NOTHING, percent, percent_interval, section, sentence
from hgdpo_core.rendering.tables import Table, with_interval
from hgdpo_core.scorers import scorer_title
from hgdpo_core.scorers.identity import JUDGES, judge_title
from hgdpo_core.statistics.identity import IdentityChange

READINGS = {"kept": "kept", "changed": "changed", "open": "not shown"}
CONSENT = "Only faces of people who agreed may be used as concepts, and images of them shown."


def identity(comparison: Comparison) -> str:
    """Win rates in the form of the paper's Table 4, what each judge of identity finds, and whose weights they are."""
    changes = comparison.identity
    if not changes:
        return ""
    margin = next(iter(changes.values())).margin
    intro = ("How often the tuned model's face is nearer to the person than the target model's. Near 50 % is what is "
             f"hoped for; identity counts as kept where the whole 90 % interval is within 50 ± {100 * margin:g} %, and "
             "as changed where all of it is outside.")
    notes = (*map(_reading, changes, changes.values()), *_sources(changes), CONSENT)
    below = "".join(f"<p>{sentence(note)}</p>" for note in notes)
    return section("Identity", intro, _paper_table(comparison) + _table(changes) + below)


def _paper_table(comparison: Comparison) -> str:
    rates = {scorer_title(name): rate for name, rate in comparison.win_rates.items()} | {
        judge_title(name): change.win_rate for name, change in comparison.identity.items()}
    cells = [with_interval(percent(rate.rate), percent_interval(rate.ci_low, rate.ci_high)) for rate in rates.values()]
    return Table(("Tuned model", *rates), [("vs. target, both personalised", *cells)], caption="In the form of the "
                 "paper's Table 4: win rates by the scorers and by the judges of identity, the 95 % interval over "
                 "people and prompts below.").html()


def _table(changes: Mapping[str, IdentityChange]) -> str:
    rows = [(judge_title(name), percent(change.win_rate.rate), percent_interval(change.low, change.high),
             READINGS[change.verdict], _distance(change.target_distance), _distance(change.tuned_distance),
             _pair(change.faceless), _pair(change.several), f"{change.left_out:,}") for name, change in changes.items()]
    return Table(("Judge", "Win rate", "90 % interval", "Identity", "Distance, target", "Distance, tuned", "No face",
                  "Several faces", "Left out"), rows, caption="Distance: mean of 1 - cosine between image and concept. "
                 "No face, several faces: images of target and tuned model; without a face an image neither wins nor "
                 "loses, of several faces the largest counts. Left out: samples of which a model has no face.").html()


def _distance(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"


def _pair(counts: dict[str, int]) -> str:
    return f"{counts['target']:,} and {counts['tuned']:,}"


def _reading(name: str, change: IdentityChange) -> str:
    decided = change.win_rate.wins + change.win_rate.losses
    return (f"{judge_title(name)}: if nothing changed, so many samples ({decided:,}) would show it with a chance of at "
            f"most {percent(change.power)}.")


def _sources(changes: Mapping[str, IdentityChange]) -> list[str]:
    return [f"{judge_title(name)}: weights of {JUDGES[name].provenance}." for name in changes if name in JUDGES]
