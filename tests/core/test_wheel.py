"""The built wheel holds all that the `hgdpo` command needs, and works away from the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "output", ".prefect", "__pycache__", "tests", "*.egg-info", "build")
CALLS = """
from deployments import __file__ as deployments
from pathlib import Path
from flows.cli import main
from hgdpo_core.figures import foreign_path, inspector_path, judge_path, labeller_path, target_path
from hgdpo_core.pair_sets.words import load_words
from hgdpo_core.config.presets import build_config
for folder in (foreign_path(), inspector_path(), judge_path(), labeller_path(), target_path()):
    assert list(folder.rglob("*.safetensors")), folder
assert (Path(deployments).parent / "prefect.yaml").is_file() and load_words().is_human("a man")
assert build_config("figures").pool.images_per_prompt == 20
raise SystemExit(main(["settings", "--preset", "figures"]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that the checkout stays as it is; no network."""
    version = int(pytest.importorskip("setuptools").__version__.split(".")[0])
    if version < 77:
        pytest.skip(f"setuptools is {version}, the build needs 77")
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=LEFT_OUT)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir",
               str(folder), str(folder / "source")]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return next(folder.glob("*.whl"))


def test_it_holds_every_file_of_the_packages_and_the_licence(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(["git", "ls-files", "hgdpo_core", "tasks", "flows", "deployments"], cwd=ROOT,
                             capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout: which files belong to the packages is not known")
    missing = {name for name in tracked.stdout.split() if not name.endswith(".md")} - names
    assert not missing
    metadata = next(name for name in names if name.endswith("/METADATA"))
    assert "License-Expression: Apache-2.0" in zipfile.ZipFile(wheel).read(metadata).decode()
    assert {Path(name).name for name in names if "/licenses/" in name} == {"LICENSE", "THIRD_PARTY_NOTICES.md"}


def test_the_command_works_from_the_wheel_alone(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", CALLS], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pool.images_per_prompt" in done.stdout
