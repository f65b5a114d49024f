"""What a user can hand in wrong, through the command line: one clear line, exit code 2, no traceback, nothing lost.

Here stands what no module's own test says: that a mistake of each kind reaches the terminal as one line, and that a
disk which fills up half-way leaves nothing that is read later.
"""

import errno
import json
import os
import pickle
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_run import run_tiny, tiny_parameters

from flows.cli import main
from hgdpo_core.errors import ConfigError, CorruptShardError, StorageError
from hgdpo_core.storage import Store, scratch
from hgdpo_core.storage.local import LocalFiles
from hgdpo_core.training import checkpoints


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("a woman\na man\n")
    (tmp_path / "held-out.txt").write_text("a girl\n")
    return tmp_path / "prompts.txt"


@pytest.mark.parametrize("kind", [ConfigError, StorageError, CorruptShardError])
def test_a_message_is_one_line_whatever_it_quotes(kind):
    error = pickle.loads(pickle.dumps(kind("the file a\nb\r\nc is broken")))
    assert type(error) is kind and str(error) == "the file a b c is broken"


def refused(capsys, prompts, judge_folder, *, command="run", **options) -> str:
    """The one line that `hgdpo run` or `plan` of the sd15 preset ends with."""
    settings = {"evaluation.prompts": {"source": str(prompts.with_name("held-out.txt"))},
                "scorer.source": str(judge_folder), "evaluation.scorers": f"pickscore={judge_folder}"}
    given = {"prompts": prompts, "root": prompts.with_name("root"), **options}
    arguments = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    arguments += [f"--set={name}={json.dumps(value)}" for name, value in settings.items()]
    assert main([command, "--preset", "sd15", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("hgdpo: error: ") and captured.err.count("\n") == 1 and not captured.out
    assert not list(prompts.with_name("root").rglob("shard-*"))
    return captured.err


@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_model_of_another_family(tmp_path, prompts, judge_folder, capsys, command):
    file = tmp_path / "photo-xl.safetensors"
    save_file({"conditioner.embedders.0.x": torch.zeros(1), "model.diffusion_model.out.2.weight": torch.zeros(1)}, file)
    assert "photo-xl.safetensors is Stable Diffusion XL" in refused(capsys, prompts, judge_folder, target=file,
                                                                     command=command)


def test_a_model_that_is_cut_off(tmp_path, prompts, judge_folder, target_folder, capsys):
    copy = shutil.copytree(target_folder, tmp_path / "copy")
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "is cut off" in refused(capsys, prompts, judge_folder, target=copy)


def test_prompts_in_latin_1(prompts, judge_folder, target_folder, capsys):
    prompts.write_bytes("a woman in a café\n".encode("latin-1"))
    line = refused(capsys, prompts, judge_folder, target=target_folder)
    assert "is not UTF-8 text: byte 16 (line 1) is 0xe9" in line and "iconv -f LATIN1 -t UTF-8" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU asked for is there")
def test_a_gpu_that_is_not_there(prompts, judge_folder, target_folder, capsys, monkeypatch):
    monkeypatch.setenv("HGDPO_DEVICE", "cuda")
    assert "sees no GPU here" in refused(capsys, prompts, judge_folder, target=target_folder)


def test_images_that_nobody_can_train_on(tmp_path, prompts, judge_folder, target_folder, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"no image")
    line = refused(capsys, prompts, judge_folder, target=target_folder, images=tmp_path / "images")
    assert "1 of 1 images have no caption" in line and "`hgdpo caption --images FOLDER`" in line
    line = refused(capsys, prompts, judge_folder, target=target_folder, images=tmp_path / "set-{0..3}.tar")
    assert "nothing is called set-0.tar" in line


def test_the_plan_of_the_paper_needs_no_network_but_its_prompts(prompts, target_folder, judge_folder, capsys):
    arguments = ["--preset", "sd15", "--target", str(target_folder), "--prompts", str(prompts), "--root",
                 str(prompts.with_name("root"))]
    offline = ["--set", f'evaluation.prompts={json.dumps({"source": str(prompts.with_name("held-out.txt"))})}',
               "--set", f"evaluation.scorers=pickscore={judge_folder}", "--set", f"scorer.source={judge_folder}"]
    assert main(["plan", *arguments, *offline]) == 0
    assert "pool" in capsys.readouterr().out


# -- a disk that is full


@pytest.fixture
def full(monkeypatch):
    """A root whose disk has no room for keys that contain a text: half of such a file is written, then ENOSPC."""
    def fill_up(part: str) -> None:
        def write(self, key: str, data: bytes) -> None:
            if part in key:
                _write_half_of(self.path(key), data)
            real(self, key, data)

        def put_file(self, source: Path, key: str) -> None:
            if part in key:
                _write_half_of(self.path(key), source.read_bytes())
            real_put(self, source, key)

        monkeypatch.setattr(LocalFiles, "write", write)
        monkeypatch.setattr(LocalFiles, "put_file", put_file)

    real, real_put = LocalFiles.write, LocalFiles.put_file
    yield fill_up


def _write_half_of(path: Path, data: bytes) -> None:
    """As `write_atomically` does on a disk without room: into a temporary file, which it then takes away."""
    from hgdpo_core.storage.local import write_atomically

    def fill(file):
        file.write(data[:len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_atomically(path, fill)


def test_a_full_disk_loses_nothing_and_leaves_nothing_half_written(tmp_path, target_folder, judge_folder, full,
                                                                   monkeypatch):
    """While a shard is written, while a checkpoint is; then there is room again."""
    parameters = {**tiny_parameters(tmp_path, target_folder, judge_folder), "images": None}
    root = str(tmp_path / "root")
    for part in ("pools/n3", "checkpoints/step-2/weights"):
        full(part)
        with pytest.raises(StorageError, match="No space left on device; the disk is full: free some space") as error:
            run_tiny(root, parameters)
        assert part in str(error.value) and "\n" not in str(error.value)
        assert not list(Path(root).rglob(".tmp-*"))
        made = {path: path.stat().st_mtime_ns for path in Path(root).rglob("shard-*")}
        monkeypatch.undo()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run_tiny(root, parameters)
    assert made.items() <= {path: path.stat().st_mtime_ns for path in Path(root).rglob("shard-*")}.items()


def test_a_full_disk_under_the_temporary_folder_is_named(tmp_path, monkeypatch):
    """Checkpoints are written there first; safetensors and torch.save raise errors of their own for it."""
    location = checkpoints.Checkpoints(Store(str(tmp_path / "root")), "models/x/checkpoints")
    checkpoint = checkpoints.Checkpoint(1, {"weight": torch.zeros(4)}, {"log": []})
    checkpoints.save_checkpoint(location, checkpoint, "hash")

    def no_room(*_, **__):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    def no_reason(*_, **__):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")

    def no_blocks(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    message = f"the disk with the temporary folder {tempfile.gettempdir()} is full: free some space, or set TMPDIR"
    later = checkpoints.Checkpoint(2, {"weight": torch.ones(4)}, {"log": []})
    for name, error in (("save_file", no_room), ("save_file", no_blocks)):
        with monkeypatch.context() as patched, pytest.raises(StorageError, match=message):
            patched.setattr(checkpoints, name, error)
            checkpoints.save_checkpoint(location, later, "hash")
    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "save_file", no_reason)
        with pytest.raises(RuntimeError, match="unexpected pos"):  # there is room: it was something else
            checkpoints.save_checkpoint(location, later, "hash")
        patched.setattr(scratch, "NEARLY_NOTHING_BYTES", 2**60)
        with pytest.raises(StorageError, match=message):
            checkpoints.save_checkpoint(location, later, "hash")
    latest = checkpoints.load_latest(location, "hash", tmp_path / "local")
    assert latest is not None and latest.step == 1
