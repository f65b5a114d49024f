"""The section of what people preferred, from the results of user studies that compare the same images."""

from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from html import escape
from typing import Any

from hgdpo_core.errors import StorageError
from hgdpo_core.metrics import WinRate
from hgdpo_core.progress import count_of
from hgdpo_core.rendering.charts import rate_bar
from hgdpo_core.rendering.parts import describe_rate, percent, percent_interval, section, signed, signed_interval
from hgdpo_core.rendering.tables import Cell, Table, with_interval
from hgdpo_core.scorers import scorer_title
from hgdpo_core.storage import Store
from hgdpo_core.study.study import serve_command

STUDIES = "studies"
FIELDS: dict[str, Any] = {
    "study_id": str, "sources": list[str], "win_rates": list[dict[str, Any]], "participants": dict[str, Any],
    "krippendorff_alpha": dict[str, Any], "judges": dict[str, dict[str, dict[str, Any]]], "rule": str}
"""Of `studies/<id>/results.json` that the section needs."""

Results = Mapping[str, Any]


def read_people(store: Store, sources: Set[str]) -> list[Results]:
    """Results of all studies with pairs of some sources, such as `evaluations/<id>`.

    Of a study that was not evaluated yet there are id and sources, and no win rates. Damaged ones are left
    out: a run does not fail at its end because of them.
    """
    found: list[Results] = []
    for study in store.list_folders(STUDIES):
        with suppress(StorageError):
            if store.exists(f"{STUDIES}/{study}/results.json"):
                results = store.read_object(f"{STUDIES}/{study}/results.json", **FIELDS)
            else:
                record = store.read_object(f"{STUDIES}/{study}/config.json", config=dict[str, Any])
                results = {"study_id": study, "sources": record["config"]["sources"], "win_rates": []}
            if sources & set(results["sources"]):
                found.append(results)
    return found


def people(studies: Sequence[Results], judged: Mapping[str, WinRate], root: str) -> str:
    """A section with win rates by people, and each judge beside them; "" without studies.

    `judged`: the run's own win rates by each judge. A study without results shows how to ask people.
    """
    blocks = "".join(_study(results, judged) if shown_rates(results) else _waiting(results, root)
                     for results in studies)
    intro = ("User studies of these images: people saw the two images of a prompt side by side, without knowing which "
             "is which. Intervals count people and prompts: they are about other people and prompts too.")
    return section("People", intro, blocks) if blocks else ""


def shown_rates(results: Results) -> list[dict[str, Any]]:
    """The win rates of a study from the side of the tuned model, or of the judge's winners; else all of them."""
    ours = [rate for rate in results["win_rates"] if rate["model"].split()[0] in ("tuned", "winner")
            and rate["against"].split()[0] in ("target", "loser")]
    return ours or list(results["win_rates"])


def preference(rate: Mapping[str, Any]) -> str:
    """People preferred tuned to target on 61.0 % (interval; counts) of the answers with a preference."""
    if rate["rate"] is None:
        return f"People had no preference between {rate['model']} and {rate['against']} ({describe_rate(rate)})"
    return f"People preferred {rate['model']} to {rate['against']}: {describe_rate(rate)}"


def _waiting(results: Results, root: str) -> str:
    command = escape(serve_command(results["study_id"], root))
    return (f"<p>A study waits for people: <code>{command}</code>. Its results are here once "
            "<code>hgdpo study results</code> and the run's own command have run again.</p>")


def _study(results: Results, judged: Mapping[str, WinRate]) -> str:
    rates = shown_rates(results)
    bars = "".join(f"<li><span>{escape(rate['model'])} against {escape(rate['against'])}</span>"
                   f"<b>{percent(rate['rate'])}</b>{rate_bar(_win_rate(rate))}</li>" for rate in rates)
    sentences = "".join(f"<p>{escape(_with_reading(rate))}</p>" for rate in rates)
    return f'<ul class="bars">{bars}</ul>{sentences}{_judges(results, judged)}<p class="meta">{_facts(results)}</p>'


def _win_rate(rate: Mapping[str, Any]) -> WinRate:
    return WinRate(*(rate[name] for name in ("rate", "wins", "losses", "ties", "n", "ci_low", "ci_high")))


def _with_reading(rate: Mapping[str, Any]) -> str:
    who = f"{count_of(rate['people'], 'person', 'people')}, {count_of(rate['prompts'], 'prompt')}"
    if rate["ci_low"] is None:
        reading = "There is no interval with so few people, prompts or preferences."
    elif rate["ci_low"] > 0.5 or rate["ci_high"] < 0.5:
        reading = "The interval excludes 50 %."
    else:
        reading = "The interval contains 50 %: these answers do not show which is preferred."
    return f"{preference(rate)}; {who}. {reading}"


def _judges(results: Results, judged: Mapping[str, WinRate]) -> str:
    rows = []
    for name, agreement in results["judges"].items():
        own = judged.get(name)
        rows.append((scorer_title(name), "no win rate" if own is None else
                     with_interval(percent(own.rate), percent_interval(own.ci_low, own.ci_high)),
                     _agreement(agreement["votes"]), _agreement(agreement["pairs"])))
    caption = ("Each judge's win rate of the tuned model on all prompts, and how often the image that it scores higher "
               "is the one that people chose: over single answers, and over the pairs' majorities.")
    return Table(("Judge", "Win rate", "Agrees with answers", "Agrees with majorities"), rows,
                 caption=caption).html() if rows else ""


def _agreement(rate: Mapping[str, Any]) -> Cell:
    return with_interval(percent(rate["rate"]), percent_interval(rate["ci_low"], rate["ci_high"]))


def _facts(results: Results) -> str:
    """Alpha, and who was left out by which rule, as HTML."""
    alpha, participants = results["krippendorff_alpha"], results["participants"]
    value = "not defined" if alpha["value"] is None else signed(alpha["value"], 2)
    interval = signed_interval(alpha["ci_low"], alpha["ci_high"], 2)
    with_ends = f" (95 % interval {interval})" if alpha["ci_low"] is not None else ""
    return escape(f"Agreement among people, Krippendorff's alpha: {value}{with_ends}. Rule: {results['rule']}; "
                  f"{participants['excluded']} of {participants['answered']} were. Study {results['study_id']}.")
