"""Every setting of a run, from its definition: value in a preset, unit and meaning.

    python -m hgdpo_core.rendering.settings > docs/SETTINGS.md
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

from pydantic.fields import FieldInfo

from hgdpo_core.config import RunConfig
from hgdpo_core.config.base import StageConfig
from hgdpo_core.config.presets import INSTANTBOOTH, PRESETS, build_config, build_personalise_config
from hgdpo_core.errors import ConfigError, InputError
from hgdpo_core.rendering.parts import NOTHING
from hgdpo_core.rendering.tables import Table

PAGE = """# Settings

Every setting of a run, as `--set NAME=VALUE` on the command line, as `{"NAME": VALUE}` in a flow's `overrides`, and its
value in each preset. `null` is the default that the meaning names. Made from the definitions in `hgdpo_core/config/`;
`hgdpo settings --preset NAME` prints the same.

"""
ADAPTERS = """

## Of `hgdpo personalise`

Beside `target` and `workers`, which are those of a run.

"""
SHARED = ("target.", "workers.")


def list_settings(config: StageConfig, parent: str = "") -> Iterator[tuple[str, Any, FieldInfo]]:
    """(dotted name, value, definition) of every setting; those of several scorers are one setting."""
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, StageConfig):
            yield from list_settings(value, f"{parent}{name}.")
        elif name != "preset":  # it is not a setting: it names the others
            yield parent + name, value, field


def unit_of(field: FieldInfo) -> str:
    """"none" for a number without a unit, "" for what is not a number."""
    extra = field.json_schema_extra
    return str(extra["unit"]) if isinstance(extra, dict) else ""


def settings_table(**configs: StageConfig) -> Table:
    """A row per setting, with a column of values for each of the configs, which are of one kind."""
    listed = [list(list_settings(config)) for config in configs.values()]
    rows = [(name, *(_shown(settings[number][1]) for settings in listed), unit_of(field) or NOTHING,
             field.description or "") for number, (name, _, field) in enumerate(listed[0])]
    return Table(("setting", *configs, "unit", "meaning"), rows)


def preset_table(*presets: str) -> Table:
    """`settings_table` of presets; where one has no target or prompts of its own, they are named as the user's."""
    return settings_table(**{preset: _config_of(preset) for preset in presets})


def adapter_table(*presets: str) -> Table:
    """As `preset_table`, for what `hgdpo personalise` has beside the settings of a run."""
    def own(preset: str) -> StageConfig:
        try:
            return build_personalise_config(preset)
        except (ConfigError, InputError):
            return build_personalise_config(preset, target="(yours)", images="(yours)")

    table = settings_table(**{preset: own(preset) for preset in presets})
    return Table(table.columns, [row for row in table.rows if not str(row[0]).startswith(SHARED)])


def _config_of(preset: str) -> RunConfig:
    try:
        return build_config(preset)
    except ConfigError:
        return build_config(preset, target="(yours)", prompts="(yours)")


def _shown(value: Any) -> str:
    """The value as `--set` takes it."""
    if isinstance(value, tuple) and value and isinstance(value[0], StageConfig):
        return ",".join(map(str, value))
    return value or '""' if isinstance(value, str) else json.dumps(value)


def settings_page() -> str:
    """docs/SETTINGS.md."""
    return PAGE + preset_table(*PRESETS).markdown() + ADAPTERS + adapter_table(*INSTANTBOOTH).markdown() + "\n"


if __name__ == "__main__":
    sys.stdout.write(settings_page())
