"""Training over several processes: two on a CPU take the location of two GPUs."""

import json
import logging
import os
import subprocess

import psutil
import pytest
import torch
from accelerate.commands import launch as accelerate_launch
from accelerate.commands.config import config_args

from hgdpo_core.config import SftConfig, TargetConfig
from hgdpo_core.errors import ConfigError, StoppedError
from hgdpo_core.figures.dataset import write_image_folder
from hgdpo_core.image_sets import read_image_set
from hgdpo_core.models import find_model
from hgdpo_core.stages.base import Worker
from hgdpo_core.stages.image_latents import ImageLatentStage, image_latent_folder
from hgdpo_core.storage import Store
from hgdpo_core.training import launch
from hgdpo_core.training import tune as tuning
from hgdpo_core.training.launch import launch_command, main, run_train_everywhere
from hgdpo_core.training.request import TrainRequest, find_result, run_train
from hgdpo_core.training.sft import Sft

SFT = SftConfig(max_steps=2, batch_size=1, learning_rate=1e-4, optimizer="adamw", mixed_precision="no")


@pytest.fixture
def request_(tmp_path, target_folder):
    write_image_folder(tmp_path / "images", 4, seed=0)
    model = find_model(TargetConfig(source=str(target_folder), dtype="float32"))
    images, store = read_image_set(str(tmp_path / "images")), Store(str(tmp_path / "root"))
    stage = ImageLatentStage(images, image_latent_folder(store, images, model, (32, 32)), model)
    stage.make(Worker("cpu"))
    return TrainRequest.of("sft", model, stage.folder, stage.indices, SFT)


@pytest.mark.slow
def test_two_processes_train_one_model_and_the_first_one_writes_it(request_, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    reported = []
    tuned = run_train_everywhere(request_, processes=2, progress=lambda *at: reported.append(at))
    assert reported[-1] == (2, 2, "steps") and [row["step"] for row in tuned.log] == [1, 2]
    store = Store(request_.root)
    complete = store.read_json(f"models/{tuned.model_id}/checkpoints/step-2/complete.json")
    assert complete["step"] == 2
    assert store.read_json(f"models/{tuned.model_id}/config.json")["global_batch"] == 2  # batch_size 1 on each
    assert run_train_everywhere(request_, processes=2).existing


@pytest.mark.slow
def test_several_processes_stop_together_with_a_checkpoint(request_, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    long = request_.model_copy(update={"config": SFT.model_copy(update={"max_steps": 100_000}).model_dump(mode="json")})
    reported = []
    with pytest.raises(StoppedError, match="asked to stop after step"):
        run_train_everywhere(long, processes=2, progress=lambda *at: reported.append(at),
                             should_stop=lambda: bool(reported))
    assert find_result(long) is None


@pytest.mark.slow
def test_a_training_whose_process_dies_goes_on_from_its_checkpoint_with_one_process(request_, monkeypatch, caplog):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = SFT.model_copy(update={"max_steps": 12, "checkpoint_every": 2})
    planned = request_.model_copy(update={"config": settings.model_dump(mode="json")})

    killed = []

    def kill_one(done: int, total: int, unit: str) -> None:
        if done >= 6 and not killed:  # the checkpoint of step 2 is written when that of step 4 begins
            workers = [child for child in psutil.Process().children(recursive=True)
                       if "hgdpo_core.training.launch" in child.cmdline() and not child.children()]
            killed.extend(workers[:1])
            killed[0].kill()

    monkeypatch.setattr(launch, "LOOK_SECONDS", 0.05)
    with pytest.raises(RuntimeError, match="accelerate launch ended with status"):
        run_train_everywhere(planned, processes=2, progress=kill_one)
    with caplog.at_level("INFO"):
        tuned = run_train_everywhere(planned, processes=1)
    assert "goes on with 1 process instead of 2. The batch of a step stays 2" in caplog.text
    undisturbed = train_alone(planned, settings.model_copy(update={"batch_size": 2}))
    assert [row["loss"] for row in tuned.log] == pytest.approx([row["loss"] for row in undisturbed], rel=1e-3)


def train_alone(planned, settings):
    """The log of a training of the same images in this process."""
    return run_train(planned.model_copy(update={"config": settings.model_dump(mode="json")})).log


def test_what_the_first_process_logs_is_heard_here(tmp_path, caplog):
    handler = launch._Messages(tmp_path / "messages.jsonl")
    handler.emit(logging.makeLogRecord({"levelno": logging.WARNING, "msg": "memory %s", "args": ("ran out",)}))
    (tmp_path / "messages.jsonl").open("a").write("[30, cut")
    seen = launch._repeat_messages(tmp_path, 0)
    assert caplog.messages == ["memory ran out"] and launch._repeat_messages(tmp_path, seen) == seen
    assert launch._repeat_messages(tmp_path / "nowhere", 0) == 0


def test_the_memory_of_the_gpu_is_given_back_before_several_processes_start(request_, monkeypatch):
    """This process encoded the latents on the GPU that the first of them trains on."""
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: seen.append("empty_cache"))
    monkeypatch.setattr(launch, "use_cpu", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    def start(folder, processes, *_):
        seen.append(f"launch of {processes}")
        raise StoppedError("enough")

    monkeypatch.setattr(launch, "_launch", start)
    with pytest.raises(StoppedError):
        run_train_everywhere(request_)
    assert seen == ["empty_cache", "launch of 2"]


def test_a_users_own_accelerate_config_decides_nothing(tmp_path, monkeypatch):
    own = tmp_path / "default_config.yaml"
    own.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\ngpu_ids: '0'\nmixed_precision: bf16\n"
                   "machine_rank: 0\nmain_process_port: 1234\nnum_machines: 1\nnum_processes: 1\nuse_cpu: false\n")
    for module in (accelerate_launch, config_args):
        monkeypatch.setattr(module, "default_config_file", str(own))
    command = launch_command(4)
    given = command[command.index("accelerate.commands.launch") + 1:]
    arguments = accelerate_launch.launch_command_parser().parse_args([*given, "script.py"])
    arguments, defaults, _ = accelerate_launch._validate_launch_command(arguments)
    assert defaults.gpu_ids == "0"  # it was read
    assert (arguments.gpu_ids, arguments.num_processes, arguments.multi_gpu) == ("all", 4, True)
    assert (arguments.mixed_precision, arguments.main_process_port) == ("no", 0)


def test_a_process_takes_its_own_gpu_before_anything_else(request_, tmp_path, monkeypatch):
    (tmp_path / "request.json").write_text(request_.model_dump_json())
    seen = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: seen.append(number))
    monkeypatch.setattr(launch, "run_train", lambda *_, **__: seen.append("trains"))
    assert main(tmp_path) == 0 and seen == [1, "trains"]
    monkeypatch.setenv("HGDPO_DEVICE", "cpu")
    assert main(tmp_path) == 0 and seen == [1, "trains", "trains"]


def test_the_first_process_alone_writes_the_model(request_, monkeypatch):
    monkeypatch.setattr(tuning, "is_first_process", lambda: False)
    monkeypatch.setattr(Sft, "save", lambda *_: pytest.fail("another process writes gigabytes that are not read"))
    assert run_train(request_).log[-1]["step"] == 2 and find_result(request_) is None


def test_one_process_trains_here(request_, monkeypatch):
    monkeypatch.setattr(launch, "_launch", None)
    assert run_train_everywhere(request_).log[-1]["step"] == 2


def test_what_other_launchers_left_in_the_shell_changes_nothing(request_, monkeypatch, caplog):
    monkeypatch.setattr(launch, "_launch", None)
    plain = run_train_everywhere(request_)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": "1", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
                        "ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_CPU": "true"}.items():
        monkeypatch.setenv(name, value)
    store = Store(request_.root)
    store.delete(f"models/{plain.model_id}/model.json")
    for key, _, _ in list(store.walk(f"models/{plain.model_id}/checkpoints")):
        store.delete(key)
    found = run_train_everywhere(request_)
    assert found.model_id == plain.model_id and find_result(request_) is not None  # published under the same id
    assert not found.existing and found.log == plain.log
    assert "ignored, since this training was not started by them: the variables ACCELERATE_GRAD" in caplog.text


def test_a_process_reports_its_error_through_the_folder(request_, tmp_path):
    folder = tmp_path / "exchange"
    folder.mkdir()
    (folder / "request.json").write_text(request_.model_copy(update={"code_version": "0.0.9"}).model_dump_json())
    assert main(folder) == 1
    error = json.loads((folder / "error.json").read_text())
    assert error["kind"] == "ConfigError" and "0.0.9" in error["message"]
    assert issubclass(getattr(launch.errors, error["kind"]), ConfigError)


@pytest.mark.parametrize("watched", [True, False])
def test_a_process_stops_when_it_is_asked_to_or_nobody_watches(request_, tmp_path, watched):
    folder = tmp_path / "exchange"
    folder.mkdir()
    (folder / "request.json").write_text(request_.model_dump_json())
    gone = subprocess.Popen(["true"])
    gone.wait()
    if watched:
        (folder / "stop").touch()
    assert main(folder, os.getpid() if watched else gone.pid) == 1
    assert json.loads((folder / "error.json").read_text())["kind"] == "StoppedError"
