"""Shards on several GPUs without workers: processes on a CPU take the place of two."""

import json
import logging
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hgdpo_core.config import PoolConfig, SamplerConfig, ScorerConfig, TargetConfig
from hgdpo_core.errors import ConfigError, InputError, StoppedError
from hgdpo_core.execution import processes
from hgdpo_core.execution.jobs import cut, write_recipe
from hgdpo_core.execution.processes import (
    LocalProcesses,
    ProcessError,
    child_environment,
    count_processes,
    local_runner,
    main,
    write_work,
)
from hgdpo_core.execution.runner import InProcess
from hgdpo_core.models import find_model
from hgdpo_core.models.image_generator import ImageGenerator
from hgdpo_core.stages.base import Worker
from hgdpo_core.stages.features import FeatureStage
from hgdpo_core.stages.pool import plan_pool
from hgdpo_core.stages.scores import ScoreStage
from hgdpo_core.storage import Store

PROMPTS = [f"a person, number {number}" for number in range(5)]


@pytest.fixture
def on_a_cpu(monkeypatch):
    monkeypatch.setenv("HGDPO_DEVICE", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("HGDPO_PROCESSES", raising=False)


def plan(root, target_folder):
    model = find_model(TargetConfig(source=str(target_folder), dtype="float32"))
    return plan_pool(Store(str(root)), model, SamplerConfig(width=32, height=32, steps=1),
                     PoolConfig(images_per_prompt=2, prompts_per_shard=1, batch_size=2), PROMPTS)


def rows(folder):
    return {index: folder.read(index).to_pylist() for index in folder.manifests()}


@contextmanager
def counted(title, seen):
    yield lambda done, total, unit: seen.append((title, done, total, unit))


@pytest.mark.slow
def test_two_processes_make_what_one_makes(on_a_cpu, tmp_path, target_folder, judge_folder):
    """Two stages at once, so that the processes, which take seconds to start, are started once."""
    scorer, made = ScorerConfig(source=str(judge_folder), batch_size=2), {}
    for name, runner in (("one", InProcess()), ("two", LocalProcesses(2))):
        pool = plan(tmp_path / name, target_folder)
        pool.make(Worker("cpu"))
        stages = [ScoreStage.of(pool, scorer), FeatureStage.of(pool, scorer, title="features")]
        seen = []
        assert runner.make(stages, lambda title, seen=seen: counted(title, seen)) == [5, 5]
        assert [max(at for at in seen if at[0] == stage.title) for stage in stages] == [
            ("pickscore", 10, 10, "images"), ("features", 10, 10, "images")]
        assert runner.make(stages) == [0, 0]
        made[name] = [rows(stage.folder) for stage in stages]
    assert made["one"] == made["two"] and not list(Path(processes.cache_folder("logs")).glob("shards-*"))


@pytest.fixture
def exchange(tmp_path, target_folder, on_a_cpu):
    """A pool that is planned in one process, and the folder through which two would make it."""
    pool = plan(tmp_path / "root", target_folder)
    write_recipe(pool)
    folder = tmp_path / "exchange"
    folder.mkdir()
    write_work(folder, 2, cut(pool, pool.find_missing()))
    return SimpleNamespace(pool=pool, folder=folder)


def messages(folder, number):
    return [json.loads(line) for line in (folder / f"{number}.jsonl").read_text().splitlines()]


def test_each_shard_is_made_by_one_process(exchange, tmp_path, target_folder, monkeypatch):
    """The second begins in the middle and meets what the first has begun; it makes one shard and is asked to stop."""
    generate, begun = ImageGenerator.generate, []

    def stopped_once(self, prompts, *arguments):
        if begun:
            (exchange.folder / "stop").touch()
        begun.append(prompts[0])
        return generate(self, prompts, *arguments)

    monkeypatch.setattr(ImageGenerator, "generate", stopped_once)
    assert main(exchange.folder, 1) == 1
    assert begun == [PROMPTS[2], PROMPTS[3]] and list(exchange.pool.folder.manifests()) == [2]
    kind, name, text = messages(exchange.folder, 1)[-1]
    assert (kind, name) == ("error", "StoppedError") and "stopped" in text
    (exchange.folder / "stop").unlink()
    monkeypatch.setattr(ImageGenerator, "generate", generate)
    assert main(exchange.folder, 0) == 0
    assert list(exchange.pool.folder.manifests()) == [0, 1, 2, 4]  # 3 was the other's
    assert messages(exchange.folder, 0)[-1] == ["progress", 0, 6, 8, "images"]


def test_memory_that_runs_out_is_handled_where_it_does_and_reported(exchange, monkeypatch):
    generate = ImageGenerator.generate

    def small(self, *arguments):
        if self.pool.batch_size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(self, *arguments)

    monkeypatch.setattr(ImageGenerator, "generate", small)
    assert main(exchange.folder, 0) == 0
    assert list(exchange.pool.folder.manifests()) == [0, 1, 2, 3, 4]
    assert ["log", logging.WARNING, "pool: 2 images do not fit into the memory of cpu together: 1 at a time from here "
            "on"] in messages(exchange.folder, 0)


def test_a_process_ends_with_the_one_that_watches_it(exchange):
    assert main(exchange.folder, 0, 2**22 + 1) == 1  # no process has this id
    assert messages(exchange.folder, 0)[-1][:2] == ["error", "StoppedError"]


def run_script(monkeypatch, script):
    """Instead of a process that makes shards, one that runs this with the folder and the number."""
    popen = processes.subprocess.Popen
    monkeypatch.setattr(processes, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(processes.subprocess, "Popen", lambda command, **options: popen(
        [sys.executable, "-c", script, *command[3:]], **options))


def test_an_error_of_a_process_is_raised_here_and_stops_the_others(exchange, monkeypatch, caplog):
    run_script(monkeypatch, """
import json, pathlib, sys, time
folder, number = pathlib.Path(sys.argv[1]), sys.argv[2]
def say(*line):
    with (folder / f"{number}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\\n")
say("log", 30, "heard"), say("progress", 0, 3, 10, "images")
if number == "1":
    say("error", "InputError", "broken")
    sys.exit(1)
while not (folder / "stop").exists():
    time.sleep(0.01)
say("error", "StoppedError", "stopped")
sys.exit(1)
""")
    seen = []
    with pytest.raises(InputError, match="broken"):
        LocalProcesses(2).make([exchange.pool], lambda title: counted(title, seen))
    assert sorted(caplog.messages) == ["process 0: heard", "process 1: heard"]
    assert seen[-1] == ("pool", 6, 10, "images") and not list(processes.cache_folder("logs").glob("shards-*"))
    answers = iter([False, True, *[True] * 1000])
    with pytest.raises(InputError, match="broken"):  # that it was stopped is not the reason
        LocalProcesses(2, lambda: next(answers)).make([exchange.pool])


def test_a_process_that_dies_is_named_with_its_log(exchange, monkeypatch):
    run_script(monkeypatch, "import os, sys; print('a last word', flush=True); os.kill(os.getpid(), 9)")
    with pytest.raises(ProcessError, match=r"process 0 that made shards ended with status -9: its log is ") as caught:
        LocalProcesses(2).make([exchange.pool])
    log = Path(str(caught.value).partition("its log is ")[2].partition(";")[0])
    assert log.read_text() == "a last word\n"


def test_a_stop_reaches_the_processes(exchange, monkeypatch):
    run_script(monkeypatch, """
import json, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
while not (folder / "stop").exists():
    time.sleep(0.01)
(folder / f"{sys.argv[2]}.jsonl").write_text(json.dumps(["error", "StoppedError", "stopped while generating"]) + "\\n")
sys.exit(1)
""")
    with pytest.raises(StoppedError, match="stopped while generating"):
        LocalProcesses(2, lambda: True).make([exchange.pool])


def test_no_more_processes_than_shards(exchange, monkeypatch):
    run_script(monkeypatch, "import sys; print(sys.argv[2])")
    started = []
    start = processes._Child.start.__func__
    monkeypatch.setattr(processes._Child, "start", classmethod(
        lambda cls, folder, number, count: started.append((number, count)) or start(cls, folder, number, count)))
    LocalProcesses(9).make([exchange.pool])
    assert started == [(number, 5) for number in range(5)]


@pytest.mark.parametrize(("gpus", "requested", "expected"), [
    (4, None, 4), (4, "2", 2), (1, None, 1), (4, "5", "from 1 to 4, the GPUs"), (4, "0", "from 1 to 4"),
    (None, None, 1), (None, "2", 2), (None, "two", "HGDPO_PROCESSES is 'two': expected a whole number from 1")])
def test_one_process_for_each_gpu(monkeypatch, gpus, requested, expected):
    monkeypatch.delenv("HGDPO_DEVICE", raising=False)
    monkeypatch.delenv("HGDPO_PROCESSES", raising=False)
    monkeypatch.setattr(processes, "use_cpu", lambda: gpus is None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if requested:
        monkeypatch.setenv("HGDPO_PROCESSES", requested)
    if isinstance(expected, int):
        assert count_processes() == expected
        runner = local_runner()
        assert isinstance(runner, InProcess) if expected == 1 else runner.processes == expected
    else:
        with pytest.raises(ConfigError, match=expected):
            count_processes()


@pytest.mark.parametrize(("listed", "expected"), [(None, ["0", "1"]), ("3, GPU-5", ["3", "GPU-5"])])
def test_each_process_sees_a_gpu_of_its_own(monkeypatch, listed, expected):
    monkeypatch.setattr(processes, "use_cpu", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "7")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if listed:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    found = [child_environment(number, 2) for number in range(2)]
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in found] == expected
    assert {environment["OMP_NUM_THREADS"] for environment in found} == {"8"} and "WORLD_SIZE" not in found[0]


def test_training_takes_as_many(monkeypatch):
    seen = {}
    monkeypatch.setattr(processes, "run_train_everywhere", lambda request, **options: seen.update(options, of=request))
    LocalProcesses(3).train("a request")
    assert (seen["of"], seen["processes"]) == ("a request", 3)
