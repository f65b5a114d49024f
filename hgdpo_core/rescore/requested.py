"""The requested scorers: named ones, a preset's, or those that the runs of a root use."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import ValidationError

from hgdpo_core.config import RunConfig, ScorerConfig, WorkersConfig
from hgdpo_core.config.base import StageConfig, apply_overrides, describe
from hgdpo_core.config.presets import build_config
from hgdpo_core.errors import ConfigError
from hgdpo_core.storage import Store

Pools = Literal["training", "evaluation", "all"]


class RequestedScorer(StageConfig):
    """A scorer and the pools it is for: a scorer that only evaluates must not cost a score for every training image."""

    scorer: ScorerConfig
    pools: Pools = "all"


def requested_scorers(store: Store | None, *, names: Sequence[str] = (), preset: str | None = None,
                   overrides: Mapping[str, Any] | None = None) -> list[RequestedScorer]:
    """One scorer for each name; [] if no name, preset or run of `store` requests one.

    Known are the preset's scorers (with `overrides`), or without a preset those of the root's runs: the ranking one for
    training pools, the others for evaluation images. `names` selects from them, for all pools: "pickscore" is the known
    scorer of that name, else its public checkpoint; "pickscore=source" is a folder or hub id. ConfigError for an
    unknown or repeated name.
    """
    if overrides and preset is None:
        raise ConfigError(f"settings ({', '.join(overrides)}) change a preset's scorers: name the preset as well")
    if preset is not None:
        config = _read_preset(preset, overrides or {})
        known = _assign(config.scorer, config.evaluation.scorers)
    else:
        known = {} if store is None else _run_scorers(store)
    if not names:
        return list(known.values())
    requested = [RequestedScorer(scorer=_named(name, known)) for name in names]
    counts = Counter(item.scorer.name for item in requested)
    repeated = sorted(name for name, count in counts.items() if count > 1)
    if repeated:
        raise ConfigError(f"{', '.join(repeated)} is named twice: earlier scores are found by a scorer's name, so "
                          "name each once")
    return requested


def _run_scorers(store: Store) -> dict[str, RequestedScorer]:
    """The scorers of the root's runs by name; where runs differ, that of the run that was started last."""
    scorers: dict[str, RequestedScorer] = {}
    for text in _saved_runs(store):
        for name, latest in _of_saved_run(text).items():
            same = scorers.get(name, latest).pools == latest.pools
            scorers[name] = latest if same else latest.model_copy(update={"pools": "all"})
    return scorers


def requested_workers(store: Store, preset: str | None, overrides: Mapping[str, Any] | None = None) -> WorkersConfig:
    """How work is divided among workers: by the preset, else by the run of the root that was started last."""
    if preset is not None:
        return _read_preset(preset, overrides or {}).workers
    for text in reversed(_saved_runs(store)):
        try:
            return WorkersConfig.model_validate(json.loads(text)["workers"])
        except (ValueError, KeyError, TypeError):
            continue        # of another version of this project
    return WorkersConfig()


def _assign(ranking: ScorerConfig, evaluating: Sequence[ScorerConfig]) -> dict[str, RequestedScorer]:
    """A ranking scorer that also evaluates has one config for both: earlier scores are found by its name."""
    both = ranking.name in {scorer.name for scorer in evaluating}
    scorers = {ranking.name: RequestedScorer(scorer=ranking, pools="all" if both else "training")}
    for scorer in evaluating:
        scorers.setdefault(scorer.name, RequestedScorer(scorer=scorer, pools="evaluation"))
    return scorers


def _read_preset(preset: str, overrides: Mapping[str, Any]) -> RunConfig:
    unread = "not read"  # presets for users' models require these; none is loaded here
    return apply_overrides(build_config(preset, target=unread, prompts=unread), overrides)


def _saved_runs(store: Store) -> list[bytes]:
    """`config.json` of every run, ordered by its latest start."""
    started = sorted((changed, key) for key, _, changed in store.walk("runs") if key.endswith("/config.json"))
    configs = store.read_many(key for _, key in started)
    return [configs[key] for _, key in started if key in configs]


def _of_saved_run(text: bytes) -> dict[str, RequestedScorer]:
    """{} for the config of another version of this project that cannot be parsed."""
    try:
        data = json.loads(text)
        ranking, *evaluating = (ScorerConfig.model_validate(scorer)
                                for scorer in (data["scorer"], *data["evaluation"]["scorers"]))
        return _assign(ranking, evaluating)
    except (ValueError, KeyError, TypeError):
        return {}


def _named(text: str, known: Mapping[str, RequestedScorer]) -> ScorerConfig:
    name, _, source = text.partition("=")
    if not source and name in known:
        return known[name].scorer
    try:
        return ScorerConfig.model_validate({"name": name, "source": source or None})
    except ValidationError as error:
        raise ConfigError(f"scorer {text!r}: {describe(error)}") from None
