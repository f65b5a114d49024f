"""What comes with the package is resolved in one location."""

import json
import re
from pathlib import Path

import pytest

import hgdpo_core
from hgdpo_core import built_in
from hgdpo_core.config import PromptSource, TargetConfig
from hgdpo_core.errors import InputError
from hgdpo_core.models import find_model
from hgdpo_core.prompts import read_prompts
from hgdpo_core.scorers import find_scorer
from hgdpo_core.storage import DryStore, Store

ROOT = Path(hgdpo_core.__file__).parents[1]
NAMING = {"hgdpo_core/pair_sets/stand_ins.py", "hgdpo_core/built_in.py", "hgdpo_core/config/presets.py"}


def test_few_files_name_the_built_in_source():
    files = [path for layer in ("hgdpo_core", "tasks", "flows") for path in (ROOT / layer).rglob("*.py")]
    naming = {path.relative_to(ROOT).as_posix() for path in files
              if re.search('"figures"(?! is built in)|import figures', path.read_text())}
    assert {name for name in naming if not name.startswith("hgdpo_core/figures/")} == NAMING


def test_every_kind_of_input_has_a_built_in_one():
    target = find_model(TargetConfig(source=built_in.SOURCE))
    assert built_in.source_of(target.path) == built_in.SOURCE and built_in.source_of(ROOT) is None
    foreign = find_model(TargetConfig(source=built_in.FOREIGN_SOURCE))
    assert built_in.source_of(foreign.path) == built_in.FOREIGN_SOURCE
    assert foreign.vae is not None and built_in.source_of(foreign.vae) == built_in.SOURCE
    assert len({find_scorer(name, built_in.SOURCE) for name in ("pickscore", "inspector", "tinted")}) == 3
    assert find_scorer("inspector", None) == find_scorer("inspector", built_in.SOURCE)
    prompts = [read_prompts(PromptSource(source=built_in.SOURCE, split=split, limit=3)) for split in built_in.SPLITS]
    assert len({prompt for known in prompts for prompt in known.prompts}) == 9
    foreign = read_prompts(PromptSource(source=built_in.FOREIGN_SOURCE, limit=20)).prompts
    assert sum(prompt.startswith(("a big", "a tiny")) for prompt in foreign) == 6
    with pytest.raises(InputError, match="need a limit"):
        read_prompts(PromptSource(source=built_in.SOURCE))


def test_images_of_people_are_rendered_once_with_the_word_in_every_caption(tmp_path, monkeypatch):
    monkeypatch.setattr(built_in, "PEOPLE_IMAGES", 3)
    folders = [built_in.find_people_images(Store(str(tmp_path / "root"))) for _ in range(2)]
    lines = [json.loads(line) for line in (folders[0] / "metadata.jsonl").read_text().splitlines()]
    assert folders[0] == folders[1] and len({line["file_name"] for line in lines}) == 3
    assert all(line["text"].startswith("a V ") and (folders[0] / line["file_name"]).is_file() for line in lines)


def test_images_are_rendered_once_and_a_dry_store_stays_empty(tmp_path, monkeypatch):
    monkeypatch.setattr(built_in, "SFT_IMAGES", 3)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert built_in.find_images(DryStore(str(tmp_path / "root"))).is_relative_to(tmp_path / "cache")
    assert not (tmp_path / "root").exists()
    folder = built_in.find_images(Store(str(tmp_path / "root")))
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    assert folder.is_relative_to(tmp_path / "root") and len([json.loads(line)["text"] for line in lines]) == 3
    before = (folder / "metadata.jsonl").stat().st_mtime_ns
    assert built_in.find_images(DryStore(str(tmp_path / "root"))) == folder
    assert (folder / "metadata.jsonl").stat().st_mtime_ns == before
