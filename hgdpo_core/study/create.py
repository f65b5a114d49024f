"""Making a study: pairs of a finished run, an evaluation or triplets, re-encoded alike under names that say nothing.

`studies/<id>/pairs.parquet` is written first, `config.json` last: a study exists once it has that. The same settings
are the same study, which is made once.
"""

import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa

from hgdpo_core import __version__
from hgdpo_core.config.base import content_hash
from hgdpo_core.config.study import StudyConfig
from hgdpo_core.errors import ConfigError, InputError
from hgdpo_core.images import decode_image
from hgdpo_core.progress import Progress, count_of, silent
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import write_table
from hgdpo_core.study.sources import (
    Candidate,
    PairsOfSource,
    describe_refused,
    in_random_order,
    open_sources,
    resolve_source,
)
from hgdpo_core.study.study import CONFIG_NAME, PAIRS_NAME, Study, encode_alike, open_study
from hgdpo_core.study.votes import PAIRS, STUDIES

UNREADABLE = "an image does not decode"
OTHER_SIZE = "the two images differ in size"
SAME_IMAGE = "both images are the same"
PAIR_BYTES = 16


@dataclass(frozen=True)
class CreatedStudy:
    """A study, and what became of the pairs that were looked at."""

    study: Study
    refused: dict[str, int]
    """Reason -> pairs."""
    existing: bool
    """Whether it was there before."""

    @property
    def sentence(self) -> str:
        """What was made, and how many people it takes."""
        study = self.study
        return (f"Study {study.id}{' (it was there already)' if self.existing else ''}: "
                f"{count_of(len(study.pairs), 'pair')} of {' and '.join(study.models)} for "
                f"{count_of(study.people, 'person', 'people')}, {count_of(study.trials_each, 'question')} and about "
                f"{study.minutes_each} min each")


def create_study(store: Store, config: StudyConfig, progress: Progress = silent) -> CreatedStudy:
    """Make the study of these settings, or find it. `config.sources` are keys or ids of runs, evaluations, triplets.

    Pairs that cannot be compared are refused and counted by reason, and others take their places. InputError for a
    source that is missing or unfinished, or where no pair can be compared; ConfigError for a source named twice.
    """
    keys = tuple(resolve_source(store, name) for name in config.sources)
    if len(set(keys)) < len(keys):
        raise ConfigError(f"sources are {', '.join(keys)}: name each once")
    config = config.model_copy(update={"sources": keys})
    study_id = f"{'-'.join(sorted({key.split('/')[0] for key in keys}))}-{content_hash(config)}"
    key = f"{STUDIES}/{study_id}"
    if store.exists(f"{key}/{CONFIG_NAME}"):
        refused = store.read_object(f"{key}/{CONFIG_NAME}", refused=dict[str, int])["refused"]
        return CreatedStudy(open_study(store, study_id), refused, existing=True)
    chosen = _choose(open_sources(store, keys), config, progress)
    if not chosen.rows:
        raise InputError(f"no pair of {', '.join(keys)} can be compared, of {chosen.refused.total()} looked at: "
                         f"{describe_refused(chosen.refused)}")
    write_table(store, f"{key}/{PAIRS_NAME}", pa.Table.from_pylist(chosen.rows, schema=PAIRS))
    store.write_json(f"{key}/{CONFIG_NAME}", {
        "config": config.model_dump(mode="json"), "pairs": len(chosen.rows), "refused": dict(chosen.refused),
        "code_version": __version__, "created_at": datetime.now(UTC).isoformat(timespec="seconds")})
    return CreatedStudy(open_study(store, study_id), dict(chosen.refused), existing=False)


@dataclass
class _Chosen:
    """Rows of PAIRS, and why other pairs were refused."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)


def _choose(sources: Sequence[PairsOfSource], config: StudyConfig, progress: Progress) -> _Chosen:
    """The first pairs of the sources' random order that can be compared, as many as requested."""
    chosen, left = _Chosen(), in_random_order(sources, config.seed)
    while left and len(chosen.rows) < config.pairs:
        missing = config.pairs - len(chosen.rows)
        batch, left = left[:missing], left[missing:]
        for number, items in groupby(sorted(batch, key=itemgetter(0)), itemgetter(0)):
            for candidate in sources[number].read([key for _, key in items]):
                row = candidate if isinstance(candidate, str) else _to_row(candidate)
                if isinstance(row, str):
                    chosen.refused[row] += 1
                else:
                    chosen.rows.append(row)
                    progress(len(chosen.rows), config.pairs, "pairs")
    return chosen


def _to_row(candidate: Candidate) -> dict[str, Any] | str:
    """A row of PAIRS, or why the pair cannot be compared."""
    try:
        first, second = (np.asarray(decode_image(data)) for data in candidate.images)
    except InputError:
        return UNREADABLE
    if first.shape != second.shape:
        return OTHER_SIZE
    if np.array_equal(first, second):
        return SAME_IMAGE
    first_image, second_image = encode_alike((first, second))
    return {"pair": secrets.token_hex(PAIR_BYTES), "prompt_id": candidate.prompt_id, "prompt": candidate.prompt,
            "first": candidate.first, "second": candidate.second, "first_image": first_image,
            "second_image": second_image, "first_scores": list(candidate.scores[0].items()),
            "second_scores": list(candidate.scores[1].items())}
