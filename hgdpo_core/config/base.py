"""What all settings have in common: validation, which of them enter ids, the hashes that ids end in, overrides."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from hgdpo_core.errors import ConfigError

ConfigT = TypeVar("ConfigT", bound="StageConfig")
When = Literal["always", "changed", "never"]
IdOf = Literal["result", "run"]


@dataclass(frozen=True)
class InIds:
    """Metadata of a setting: when it enters ids. "changed": only where it differs from its default."""

    result: When = "always"
    """Of what is made by these settings: pools, scores, triplets, trained models."""
    run: When = "always"
    """Of runs, comparisons and ablations, whose ids name all that was requested."""


ADDED = InIds(result="changed", run="changed")
"""For a setting added with a default: ids of earlier runs stay."""
OWN_TO_RUNS = InIds(result="never")
"""For what changes no result: how it is computed, or what is shown during the run."""
NO_ID = InIds(result="never", run="never")
"""For how work is divided."""


def number(meaning: str, unit: str, **options: Any) -> Any:
    """The field of a setting that is a number; `unit` is "none" for one without."""
    return Field(description=meaning, json_schema_extra={"unit": unit}, **options)


class StageConfig(BaseModel):
    """Base of all settings: immutable, no unknown names, JSON round trip.

    A setting enters every id, unless its definition says otherwise: `name: Annotated[int, ADDED] = 3`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would take true for 1."""
        kind = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and kind is not bool and bool not in get_args(kind):
            raise ValueError(f"expected {getattr(kind, '__name__', kind)}, not true or false")
        return value

    def identity(self, of: IdOf = "result") -> dict[str, Any]:
        """Plain data for an id: the settings that enter it by their definitions, nested ones by theirs."""
        data, identity = self.model_dump(mode="json"), {}
        for name, field in type(self).model_fields.items():
            when, value = self._when(name, of), getattr(self, name)
            if when == "always" or when == "changed" and value != field.get_default(call_default_factory=True):
                identity[name] = _identity_of(value, data[name], of)
        return identity

    @classmethod
    def from_identity(cls, record: Mapping[str, Any], **others: Any) -> Self:
        """The settings whose result identity is in `record`, among other data; `others` are in no identity."""
        names = [name for name in cls.model_fields if name in record and cls._when(name, "result") != "never"]
        return cls.model_validate({**{name: record[name] for name in names}, **others})

    @classmethod
    def _when(cls, name: str, of: IdOf) -> When:
        marks = [item for item in cls.model_fields[name].metadata if isinstance(item, InIds)]
        return getattr(marks[-1] if marks else InIds(), of)


def _identity_of(value: Any, data: Any, of: IdOf) -> Any:
    if isinstance(value, StageConfig):
        return value.identity(of)
    if isinstance(value, tuple):
        return [_identity_of(item, plain, of) for item, plain in zip(value, data, strict=True)]
    return data


def canonical_json(value: Any) -> str:
    """The one JSON text of plain data or of settings: sorted keys, no spaces, UTF-8 kept."""
    data = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def content_hash(value: BaseModel | Mapping[str, Any] | list[Any], length: int = 12) -> str:
    """First `length` hex digits of the sha256 of `canonical_json(value)`; ids end in it."""
    if not isinstance(value, list):
        return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:length]
    digest = hashlib.sha256(b"[")
    for position, item in enumerate(value):  # one by one: as one text, all prompts would be in memory twice more
        digest.update((("," if position else "") + canonical_json(item)).encode())
    digest.update(b"]")
    return digest.hexdigest()[:length]


def apply_overrides(config: ConfigT, overrides: Mapping[str, Any]) -> ConfigT:
    """`config` with dotted settings replaced, for example `{"dpo.beta": 1000}`; ConfigError names what is wrong."""
    data = config.model_dump()
    for dotted, value in overrides.items():
        *parents, leaf = dotted.split(".")
        node, kind = data, type(config)
        for name in parents:
            node, kind = _below(node, kind, name, dotted)
        if not isinstance(node, dict) or leaf not in node:
            known = ", ".join(sorted(node)) if isinstance(node, dict) else "none below that name"
            raise ConfigError(f"override {dotted!r} is not a setting; choose one of: {known}")
        if dotted == "preset":
            raise ConfigError(f"preset {value!r} as an override would only rename what runs: name it with --preset")
        node[leaf] = _merged(node[leaf], value)
    return validate(type(config), data)


def _below(node: Any, kind: Any, name: str, dotted: str) -> tuple[Any, Any]:
    """The settings of that name, and their class; what was given as a text becomes all that it stands for."""
    field = getattr(kind, "model_fields", {}).get(name)
    parts = (field.annotation, *get_args(field.annotation)) if field else ()
    below = next((part for part in parts if isinstance(part, type) and issubclass(part, StageConfig)), None)
    if not isinstance(node, dict) or name not in node or below is None:
        return (node.get(name) if isinstance(node, dict) else None), below
    if node[name] is None:
        raise ConfigError(f"override {dotted!r} needs {name}, which is not set: set {name} first")
    if isinstance(node[name], str):
        node[name] = validate(below, node[name]).model_dump()
    return node[name], below


def _merged(old: Any, new: Any) -> Any:
    """Settings `new` merged into the `old` ones; with a source they describe another thing, as a whole."""
    if not isinstance(old, dict) or not isinstance(new, Mapping) or "source" in new:
        return new
    return {**old, **{name: _merged(old.get(name), value) for name, value in new.items()}}


def validate(kind: type[ConfigT], data: Mapping[str, Any] | str) -> ConfigT:
    """A config from plain data, or from the text that stands for some; ConfigError with one line per mistake."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise ConfigError(describe(error)) from None


def describe(error: ValidationError) -> str:
    """One readable line for all mistakes in a pydantic error."""
    return "; ".join(f"{'.'.join(map(str, item['loc'])) or 'config'}: {item['msg'].removeprefix('Value error, ')}"
                     + ("" if isinstance(item["input"], dict) else f" (got {item['input']!r})")
                     for item in error.errors())
