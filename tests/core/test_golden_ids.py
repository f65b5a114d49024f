"""Every id that users' stores are found by is what commit 42be5bc made it (tests/golden/ids.py)."""

import json
from pathlib import Path

import pytest
from golden import ids


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, str]:
    return dict(ids.flat(ids.all_ids(tmp_path_factory.mktemp("ids"))))


def test_ids_never_change(made):
    golden = dict(ids.flat(json.loads(Path(ids.__file__).with_name("ids.json").read_text())))
    assert len(golden) > 200
    assert {name: made.get(name) for name in golden} == golden
    assert sorted(made) == sorted(golden), "ids without a golden one: add them to ids.json"


@pytest.mark.parametrize(("case", "same_as"), [
    ("runs / workers / run", "runs / figures / run"), ("pools / batch", "pools / plain"),
    ("trained / dpo validation", "trained / dpo sd15"), ("prompts / cleaned", "prompts / three"),
    ("evaluation pools / normalised target", "evaluation pools / plain")])
def test_what_changes_no_result_is_in_no_id(made, case, same_as):
    assert made[case] == made[same_as]


@pytest.mark.parametrize("kind", ["pools", "scores", "triplets"])
def test_other_settings_have_other_ids(made, kind):
    same = {"pools / batch"}
    found = [value for name, value in made.items() if name.startswith(f"{kind} / ") and name not in same]
    repeated = {value for value in found if found.count(value) > 1}
    assert repeated == set(), [name for name, value in made.items() if value in repeated]
