"""`make test-slow` on a checkout of tiny test files: what it runs, what it skips, what it says."""

import itertools
import json
import subprocess

import pytest
import slow

PYPROJECT = """[tool.pytest.ini_options]
addopts = "--strict-markers -p no:cacheprovider -m 'not slow'"
markers = ["slow: s", "gpu: g", "network: n"]
"""
GOOD = """import pytest

@pytest.mark.slow
def test_slow():
    with open("ran.txt", "a") as log:
        log.write("good ")

@pytest.mark.slow
def test_for_another_machine():
    pytest.skip("not here")

@pytest.mark.slow
@pytest.mark.gpu
def test_on_a_gpu():
    raise AssertionError

def test_quick():
    raise AssertionError
"""
SHAKY = """import os
import pytest

@pytest.fixture
def thing():
    yield 1
    assert os.path.exists("mended"), "at its end"

@pytest.mark.slow
def test_shaky(thing):
    with open("ran.txt", "a") as log:
        log.write("shaky ")
    assert os.path.exists("mended")
"""
QUICK = "def test_quick():\n    pass\n"


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git repository whose clock moves on a second at each look."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    (tmp_path / ".gitignore").write_text("output/\nran.txt\nmended\n__pycache__/\n")
    for name, code in {"good": GOOD, "shaky": SHAKY, "quick": QUICK}.items():
        (tmp_path / "tests" / f"test_{name}.py").write_text(code)
    git(tmp_path, "init", "-q")
    commit(tmp_path)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # a quick start is all that is needed here
    seconds = itertools.count()
    monkeypatch.setattr(slow, "now", lambda: f"2026-01-01 00:00:{next(seconds):02d} UTC")
    return tmp_path


def git(folder, *arguments):
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments], cwd=folder, check=True)


def commit(folder):
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "--allow-empty", "-m", "a")


def ran(folder):
    return (folder / "ran.txt").read_text().split()


def summary(folder):
    return (folder / "output" / "slow" / "summary.txt").read_text().splitlines()


def test_a_failed_file_is_run_again_and_a_passed_one_is_not(checkout):
    assert slow.run_slow_tests(checkout) == 1
    assert ran(checkout) == ["good", "shaky"]
    head, good, shaky, total = summary(checkout)
    assert head == f"slow tests at {slow.describe_commit(checkout)}, begun 2026-01-01 00:00:00 UTC"
    assert good.split()[:7] == ["tests/test_good.py", "1", "passed", "0", "failed", "1", "skipped"]
    assert shaky.split()[:7] == ["tests/test_shaky.py", "0", "passed", "1", "failed", "0", "skipped"]
    assert total.split()[:7] == ["all", "1", "passed", "1", "failed", "1", "skipped"]

    (checkout / "mended").touch()
    assert slow.run_slow_tests(checkout) == 0
    assert ran(checkout) == ["good", "shaky", "shaky"]
    _, good, shaky, total = summary(checkout)
    assert good.endswith("of 2026-01-01 00:00:01 UTC") and " of " not in shaky
    assert total.split()[:4] == ["all", "2", "passed", "0"]


class Quick:
    """Stands in for pytest: two files that pass at once, or are interrupted."""

    def __init__(self):
        self.began: list[str] = []
        self.interrupt: str | None = None

    def run_file(self, root, file, commit, result):
        self.began.append(file)
        if file == self.interrupt:
            raise KeyboardInterrupt
        return slow.Outcome(file, commit, slow.now(), passed=1)


@pytest.fixture
def quick(monkeypatch):
    quick = Quick()
    monkeypatch.setattr(slow, "find_files", lambda root: ["a.py", "b.py"])
    monkeypatch.setattr(slow, "run_file", quick.run_file)
    return quick


def test_another_commit_an_uncommitted_change_and_fresh_start_over(checkout, quick):
    assert slow.run_slow_tests(checkout) == slow.run_slow_tests(checkout) == 0
    assert quick.began == ["a.py", "b.py"]
    assert slow.run_slow_tests(checkout, fresh=True) == 0
    assert quick.began == ["a.py", "b.py"] * 2
    (checkout / "new.py").touch()
    assert slow.run_slow_tests(checkout) == 0
    assert quick.began == ["a.py", "b.py"] * 3
    assert slow.UNCOMMITTED in summary(checkout)[0]
    commit(checkout)
    assert slow.run_slow_tests(checkout) == 0
    assert quick.began == ["a.py", "b.py"] * 4


def test_an_interrupted_call_keeps_what_is_finished(checkout, quick):
    quick.interrupt = "b.py"
    assert slow.run_slow_tests(checkout) == 130
    assert summary(checkout)[2].split() == ["b.py", "not", "run"]
    quick.interrupt = None
    assert slow.run_slow_tests(checkout) == 0
    assert quick.began == ["a.py", "b.py", "b.py"]


def test_a_file_whose_process_dies_has_failed(checkout):
    code = "import os\nimport pytest\n\n@pytest.mark.slow\ndef test_it():\n    os._exit(0)\n"
    (checkout / "tests" / "test_good.py").write_text(code)
    (checkout / "mended").touch()
    commit(checkout)
    assert slow.run_slow_tests(checkout) == 1
    assert summary(checkout)[1].split()[:5] == ["tests/test_good.py", "0", "passed", "1", "failed"]


def test_what_cannot_be_collected_is_told(checkout):
    (checkout / "tests" / "test_good.py").write_text("import no_such_module\n")
    with pytest.raises(slow.SlowTestsError, match="no_such_module"):
        slow.run_slow_tests(checkout)


def test_a_damaged_state_is_no_state(checkout):
    location = checkout / "output" / "slow"
    location.mkdir(parents=True)
    for text in ("[{", json.dumps([{"file": "a"}]), "{}"):
        (location / "state.json").write_text(text)
        assert slow.read_state(location, "a") == {}
