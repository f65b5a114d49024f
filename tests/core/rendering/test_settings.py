"""Every setting is explained at its definition, and the page of docs is made from there."""

from pathlib import Path
from typing import get_args

import pytest

from hgdpo_core.config.base import apply_overrides
from hgdpo_core.config.presets import PRESETS, build_config, build_personalise_config
from hgdpo_core.rendering import settings
from hgdpo_core.scorers import SCORERS

DOCS = Path(__file__).resolve().parents[3] / "docs" / "SETTINGS.md"
LISTED = [*settings.list_settings(build_config("sd15", target="mine", prompts="mine.txt")),
          *settings.list_settings(build_personalise_config("sd15", target="mine", images="mine"))]


def kinds(annotation) -> set[type]:
    if isinstance(annotation, type) and not get_args(annotation):
        return {annotation}
    return set().union(*(kinds(part) for part in get_args(annotation)))


@pytest.mark.parametrize(("name", "field"), [(name, field) for name, _, field in LISTED],
                         ids=[name for name, *_ in LISTED])
def test_each_setting_has_a_meaning_and_each_number_a_unit(name, field):
    assert field.description, f"{name} has no description"
    assert bool(settings.unit_of(field)) is bool(kinds(field.annotation) & {int, float}), name


def test_what_is_listed_can_be_set_and_nothing_else():
    config = build_config("figures")
    names = [name for name, _, _ in settings.list_settings(config)]
    assert len(set(names)) == len(names) > 80 and "dpo.beta" in names and "preset" not in names
    assert apply_overrides(config, {name: value for name, value, _ in settings.list_settings(config)
                                    if name != "evaluation.scorers"}) == config


def test_the_page_in_docs_is_that_of_the_definitions():
    assert DOCS.read_text() == settings.settings_page(), "python -m hgdpo_core.rendering.settings > docs/SETTINGS.md"


def test_a_table_shows_values_as_set_takes_them():
    rows = {row[0]: row[1] for row in settings.preset_table("figures").rows}
    assert (rows["dpo.beta"], rows["target.vae"], rows["dpo.flip"], rows["target.negative_prompt"]) == (
        "1000.0", "null", "false", '""')
    assert rows["evaluation.scorers"] == "pickscore=figures,inspector=figures"
    assert {*PRESETS} <= {*settings.preset_table(*PRESETS).columns}
    scorer = next(row for row in settings.preset_table("sd15").rows if row[0] == "scorer.name")
    assert all(name in scorer[-1] for name in SCORERS)


def test_settings_of_adapters_are_those_of_their_own_command():
    rows = {row[0]: row[1:3] for row in settings.adapter_table("figures", "sd15").rows}
    assert rows["instantbooth.concept_word"] == ("V", "sks") and rows["images"] == ("figures", "(yours)")
    assert not any(name.startswith(("target.", "workers.")) for name in rows)


def test_settings_of_several_parts_are_written_as_they_are_given():
    given = {"pool.race": "4:10,7:4", "evaluation.scorers": "pickscore=a,clip"}
    config = apply_overrides(build_config("figures"), given)
    rows = {row[0]: row[1] for row in settings.settings_table(value=config).rows}
    assert {name: rows[name] for name in given} == given
