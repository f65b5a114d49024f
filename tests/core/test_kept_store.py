"""A store made by commit 42be5bc (tests/golden/STORE.md): all of it is found, nothing is made again."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import run_tiny

KEPT = Path(__file__).parents[1] / "golden" / "store"
SETTINGS = {
    "images": None, "target.dtype": "float32", "prompts.limit": 3, "pool.images_per_prompt": 2,
    "pool.prompts_per_shard": 2, "sampler.steps": 2, "dpo.max_steps": 2, "dpo.batch_size": 2, "dpo.lora_rank": 1,
    "dpo.optimizer": "adamw", "dpo.mixed_precision": "no", "dpo.flip": True, "evaluation.prompts.limit": 2,
    "evaluation.images_per_prompt": 2, "evaluation.scorers": [{"name": "pickscore", "source": "figures"}]}
REWRITTEN = ("runs", "evaluations")
"""Folders whose JSON files every run writes again; what was kept must still be in them."""


@pytest.fixture
def root(tmp_path) -> Path:
    return Path(shutil.copytree(KEPT, tmp_path / "store"))


@pytest.fixture
def forwards(monkeypatch) -> list[str]:
    """Names of the networks that were called."""
    called: list[str] = []
    call = torch.nn.Module.__call__

    def record(module, *arguments, **named):
        called.append(type(module).__name__)
        return call(module, *arguments, **named)

    monkeypatch.setattr(torch.nn.Module, "__call__", record)
    return called


def test_a_kept_store_is_found_whole(root, forwards):
    before = stamps(root)
    run_tiny(str(root), {"overrides": SETTINGS})
    assert forwards == []
    after = stamps(root)
    assert sorted(after) == sorted(before)
    changed = {name for name in before if after[name] != before[name]}
    assert {name for name in changed if name.split("/")[0] not in REWRITTEN} == set()
    for name in sorted(before):
        if name.split("/")[0] in REWRITTEN:
            kept = read(KEPT / name)
            assert kept == like(read(root / name), kept), name


def test_the_kept_store_holds_every_kind_of_folder():
    made = {path.relative_to(KEPT).parts[0] for path in KEPT.rglob("shard-*.json")}
    assert made == {"pools", "scores", "triplets", "latents", "latent_distances"}
    assert len(list(KEPT.glob("models/dpo-*/pytorch_lora_weights.safetensors"))) == 1


def test_other_settings_are_not_found_in_it(root, forwards):
    """The test above would see work: with one more setting changed, the networks are called."""
    run_tiny(str(root), {"overrides": {**SETTINGS, "dpo.seed": 1}})
    assert forwards
    assert len(list(root.glob("models/dpo-*"))) == 2


def stamps(root: Path) -> dict[str, tuple[int, int, bytes]]:
    """Relative name -> change time, size, content."""
    return {path.relative_to(root).as_posix(): (path.stat().st_mtime_ns, path.stat().st_size, path.read_bytes())
            for path in root.rglob("*") if path.is_file()}


def read(file: Path) -> Any:
    value = json.loads(file.read_text())
    value.pop("code_version", None)
    return value


def like(value: Any, kept: Any) -> Any:
    """JSON in the shape of what was kept: settings and numbers that came later are left out, floats rounded as there.

    Statistics of the same bytes may differ in the last digit between machines.
    """
    if isinstance(value, dict) and isinstance(kept, dict):
        return {name: like(value[name], kept[name]) for name in kept if name in value}
    if isinstance(value, list) and isinstance(kept, list) and len(value) == len(kept):
        return [like(item, old) for item, old in zip(value, kept, strict=True)]
    return pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
