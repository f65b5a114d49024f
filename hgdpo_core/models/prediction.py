"""What the model of a single file predicts: its weights do not show it, so a yaml beside the file or a setting does."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import yaml

from hgdpo_core.errors import ModelError, first_line
from hgdpo_core.models.fingerprints import refuse_special_files
from hgdpo_core.models.weight_files import read_config

LONGEST_YAML = 1 << 20
WORDS = {"eps": "epsilon", "v": "v_prediction"}
"""`model.params.parameterization` of CompVis' and Stability's configs."""
SCALINGS = {"EpsScaling": "epsilon", "VScaling": "v_prediction"}
"""Classes of `model.params.denoiser_config.params.scaling_config.target`, of those of SDXL."""


def find_prediction(path: Path, chosen: str | None, default: str | None) -> str | None:
    """What `chosen`, else `NAME.yaml` beside `NAME.safetensors`, says that a single file predicts; None if neither.

    `default`: what its keys and configs say. ModelError, in one line, for a yaml that is none, says something else
    than epsilon or v, or says epsilon against a default of v.
    """
    if chosen is not None:
        return chosen
    beside = path.with_suffix(".yaml")
    if not beside.exists():
        return None
    stated = _read_yaml(beside)
    if stated == "epsilon" and default != stated:
        raise ModelError(f"{beside} says that the model predicts epsilon, the keys or configs of {path.name} say "
                         f"{default}: remove the one that is wrong, or set target.prediction_type")
    return stated


def _read_yaml(path: Path) -> str | None:
    """What A1111's and Forge's config of a checkpoint says about its prediction; None for one that says nothing."""
    refuse_special_files(path)
    try:
        if path.stat().st_size > LONGEST_YAML:
            raise ModelError(f"{path} is no config of a checkpoint, it is too long: rename it")
        config = yaml.safe_load(path.read_bytes())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ModelError(f"{path} cannot be read as the config of a checkpoint ({first_line(error)}): correct or "
                         "remove it") from None
    word = _value(config, "model", "params", "parameterization")
    scaling = _value(config, "model", "params", "denoiser_config", "params", "scaling_config", "target")
    if word is None and scaling is None:
        return None
    found = WORDS.get(str(word)) if word is not None else SCALINGS.get(str(scaling).rpartition(".")[2])
    if found is None:
        raise ModelError(f"{path} says that the model predicts {str(word or scaling)[:80]!r}: expected eps or v, as "
                         "DDPM models do; if it is wrong set target.prediction_type")
    return found


def _value(config: Any, *names: str) -> Any:
    for name in names:
        config = config.get(name) if isinstance(config, Mapping) else None
    return config


def default_prediction(configs: Path) -> str | None:
    """What a folder of component configs says; None for one without a scheduler."""
    scheduler = configs / "scheduler" / "scheduler_config.json"
    return read_config(scheduler).get("prediction_type", "epsilon") if scheduler.exists() else None


def check_prediction(configs: Path) -> None:
    """Refuse a model that predicts anything but noise or v."""
    if (stated := default_prediction(configs)) not in WORDS.values():
        raise ModelError(f"{configs} predicts {stated!r}: expected {' or '.join(WORDS.values())}")


def scheduler_with(configs: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The `scheduler` of a folder of component configs with other settings; {} where nothing is set."""
    if not settings:
        return {}
    path = configs / "scheduler" / "scheduler_config.json"
    config = read_config(path)
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise ModelError(f"{path} names {config.get('_class_name')!r}: expected a scheduler of diffusers")
    return {"scheduler": kind.from_config({**config, **settings})}  # pyright: ignore[reportAttributeAccessIssue]
