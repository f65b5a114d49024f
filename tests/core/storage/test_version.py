"""Workers refuse work of code that makes other shards, and of no other."""

import ast
import shutil
from pathlib import Path

import pytest

import hgdpo_core
from hgdpo_core.storage.version import DECIDES_NO_SHARD, code_version, hash_sources

PACKAGE = Path(hgdpo_core.__file__).parent


@pytest.fixture
def copy(tmp_path):
    return Path(shutil.copytree(PACKAGE, tmp_path / "hgdpo_core", ignore=shutil.ignore_patterns("weights", "*.pyc")))


@pytest.mark.parametrize(("file", "counts"), [
    ("report/page.py", False), ("rendering/html.py", False), ("run/__init__.py", False), ("figures/make/vae.py", False),
    ("stages/pool.py", True), ("models/sampling.py", True), ("scorers/clip.py", True), ("training/loop.py", True),
    ("storage/shards.py", True), ("config/base.py", True), ("a_new_file.py", True)])
def test_what_decides_shards_decides_the_version(copy, file, counts):
    with (copy / file).open("a") as text:
        text.write("\n# changed\n")
    assert (hash_sources(copy) != hash_sources(PACKAGE)) is counts


def test_the_version_is_of_this_package_and_its_names_are_files():
    assert code_version().endswith("+" + hash_sources(PACKAGE))
    assert all((PACKAGE / name).exists() for name in DECIDES_NO_SHARD)


def test_a_worker_imports_nothing_that_does_not_count():
    reached, waiting = set(), ["execution/jobs.py", "training/request.py"]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += imported_files(PACKAGE / name)
    others = {name.partition("/")[0] for name in reached if name.startswith(DECIDES_NO_SHARD)}
    assert others <= {"rendering"}, "it shows a training's validation images and writes the data set's card"


def imported_files(path: Path) -> list[str]:
    """Files of the core that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            folders = path.relative_to(PACKAGE.parent).parent.parts
            parents = folders[:len(folders) - node.level + 1] if node.level else ()
            base = ".".join((*parents, node.module or "")).strip(".")
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    inside = [name.removeprefix("hgdpo_core.").replace(".", "/") for name in names if name.startswith("hgdpo_core.")]
    candidates = [file for name in inside for file in (f"{name}.py", f"{name}/__init__.py")]
    return [file for file in candidates if (PACKAGE / file).exists()]
