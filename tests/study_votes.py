"""A study written by hand: its settings, pairs, participants and votes, without images or a server."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa

from hgdpo_core.config.study import StudyConfig
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import write_table
from hgdpo_core.study.votes import PAIRS, VOTES, participant_key, participant_of

STUDY, SOURCE = "evaluations-abc", "evaluations/2-abc"
START = datetime(2030, 1, 2, tzinfo=UTC)


def make_pair(name: str, first: str = "target", second: str = "tuned",
              scores: Mapping[str, tuple[float, float]] | None = None) -> dict[str, Any]:
    """A pair whose prompt has its name; `scores`: judge -> of the first and of the second image."""
    sides = [{judge: both[side] for judge, both in (scores or {}).items()} for side in (0, 1)]
    return {"pair": name, "prompt_id": f"prompt {name}", "prompt": name, "first": first, "second": second,
            "first_image": b"1", "second_image": b"2", "first_scores": sides[0], "second_scores": sides[1]}


def make_vote(person: str, pair: str, chosen: str, *, kind: str = "question",
              models: Sequence[str] = ("target", "tuned"), swapped: bool = False) -> dict[str, Any]:
    """A row of VOTES; `chosen` is the name of a model, "picture", "noise" or "tie"."""
    left, right = reversed(models) if swapped else models
    choice = "left" if chosen == left else "right" if chosen == right else chosen
    return {"trial": f"{person} {pair} {kind}", "pair": pair, "prompt_id": f"prompt {pair}", "left": left,
            "right": right, "choice": choice, "kind": kind, "participant": person, "shown_at": START, "ms": 2000}


def make_check(person: str, *, passed: bool, pair: str = "p0") -> dict[str, Any]:
    """The answer to an attention check."""
    return make_vote(person, pair, "picture" if passed else "noise", kind="check", models=("picture", "noise"))


def write_study(store: Store, pairs: Sequence[Mapping[str, Any]], votes: Sequence[Mapping[str, Any]],
                sources: Sequence[str] = (SOURCE,)) -> dict[str, str]:
    """Write a study whose participants have codes like "code of ann"; returns the hash of each by name."""
    rows = [{**pair, **{name: list(pair[name].items()) for name in ("first_scores", "second_scores")}}
            for pair in pairs]
    write_table(store, f"studies/{STUDY}/pairs.parquet", pa.Table.from_pylist(rows, schema=PAIRS))
    config = StudyConfig(sources=tuple(sources)).model_dump(mode="json")
    store.write_json(f"studies/{STUDY}/config.json", {"config": config, "pairs": len(pairs), "refused": {}})
    hashes = {name: participant_of(STUDY, f"code of {name}") for name in {vote["participant"] for vote in votes}}
    for number, (name, participant) in enumerate(sorted(hashes.items())):
        store.write_json(participant_key(STUDY, participant), {"number": number, "joined": 0})
        theirs = [{**vote, "participant": participant, "trial": f"{participant} {place}",
                   "shown_at": START + timedelta(seconds=place)}
                  for place, vote in enumerate(vote for vote in votes if vote["participant"] == name)]
        write_table(store, f"studies/{STUDY}/votes/{participant}-writer.parquet",
                    pa.Table.from_pylist(theirs, schema=VOTES))
    return hashes
