"""Which scorers somebody wants scores by: named ones, a preset's, or those that the runs of a root use."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from hgdpo_core.config import RunConfig, ScorerConfig, apply_overrides, describe
from hgdpo_core.errors import ConfigError
from hgdpo_core.presets import build_config
from hgdpo_core.storage import Store


def wanted_scorers(store: Store | None, *, names: Sequence[str] = (), preset: str | None = None,
                   overrides: Mapping[str, Any] | None = None) -> list[ScorerConfig]:
    """One config a scorer name; [] where no run of `store` says which scorers are wanted.

    Known are the preset's scorers (with `overrides`), or without a preset those of the root's runs. `names` chooses:
    "pickscore" takes the known scorer of that name, else its public checkpoint; "pickscore=place" that folder or
    hub id. Without names all known ones are wanted. ConfigError for an unknown or repeated name.
    """
    if overrides and preset is None:
        raise ConfigError(f"settings ({', '.join(overrides)}) change a preset's scorers: name the preset as well")
    if preset is not None:
        known = preset_scorers(preset, overrides or {})
    else:
        known = run_scorers(store) if store is not None else {}
    if not names:
        return list(known.values())
    chosen = [_named(name, known) for name in names]
    repeated = sorted({scorer.name for scorer in chosen if sum(other.name == scorer.name for other in chosen) > 1})
    if repeated:
        raise ConfigError(f"{', '.join(repeated)} is named twice: earlier scores are found by a scorer's name, so "
                          "name each once")
    return chosen


def preset_scorers(preset: str, overrides: Mapping[str, Any]) -> dict[str, ScorerConfig]:
    """The scorers of a preset by name, the ranking one first."""
    unused = None if preset == "figures" else "not read"  # a preset for users' models wants them named; we load none
    return _of_run(apply_overrides(build_config(preset, target=unused, prompts=unused), overrides))


def run_scorers(store: Store) -> dict[str, ScorerConfig]:
    """The scorers of the root's runs by name; where runs differ, as the run that was started last has them."""
    started = sorted((changed, key) for key, _, changed in store.walk("runs") if key.endswith("/config.json"))
    configs = store.read_many(key for _, key in started)
    found: dict[str, ScorerConfig] = {}
    for _, key in started:
        found |= _of_saved_run(configs.get(key, b""))
    return found


def _of_run(config: RunConfig) -> dict[str, ScorerConfig]:
    return _by_name((config.scorer, *config.evaluation.scorers))


def _by_name(scorers: Iterable[ScorerConfig]) -> dict[str, ScorerConfig]:
    found: dict[str, ScorerConfig] = {}
    for scorer in scorers:
        found.setdefault(scorer.name, scorer)
    return found


def _of_saved_run(text: bytes) -> dict[str, ScorerConfig]:
    """{} for the config of another version of this project that cannot be read as ours."""
    try:
        data = json.loads(text)
        return _by_name(ScorerConfig.model_validate(scorer)
                        for scorer in (data["scorer"], *data["evaluation"]["scorers"]))
    except (ValueError, KeyError, TypeError):
        return {}


def _named(text: str, known: Mapping[str, ScorerConfig]) -> ScorerConfig:
    name, _, source = text.partition("=")
    if not source and name in known:
        return known[name]
    try:
        return ScorerConfig.model_validate({"name": name, "source": source or None})
    except ValidationError as error:
        raise ConfigError(f"scorer {text!r}: {describe(error)}") from None
