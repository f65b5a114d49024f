"""Mistakes that only show while a run works, through `hgdpo run`: one line at the end, no traceback among the logs."""

import errno
import json
import os
import shutil

import pytest
from PIL import Image
from prefect.artifacts import Artifact
from safetensors.torch import load_file, save_file
from tiny_run import tiny_parameters

from flows.cli import main
from hgdpo_core.storage.local import LocalFiles


def run(parameters, root, capsys, caplog, **changes) -> str:
    """The line that a failing `hgdpo run` ends with."""
    given = {**parameters, **changes}
    arguments = [part for name in ("target", "prompts", "images") if given[name]
                 for part in (f"--{name}", str(given[name]))]
    settings = [f"--set={name}={json.dumps(value)}" for name, value in parameters["overrides"].items()]
    assert main(["run", "--root", str(root), *arguments, *settings]) == 2
    assert not [record for record in caplog.records if record.exc_info or "Traceback" in record.getMessage()]
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hgdpo: error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture
def parameters(tmp_path, target_folder, judge_folder):
    return tiny_parameters(tmp_path, target_folder, judge_folder)


def test_a_checkpoint_with_a_value_that_is_no_number(server, parameters, tmp_path, target_folder, capsys, caplog):
    copy = shutil.copytree(target_folder, tmp_path / "copy")
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_out.weight"].view(-1)[0] = float("nan")
    save_file(weights, file, {"format": "pt"})
    text = run(parameters, tmp_path / "root", capsys, caplog, target=copy, images=None)
    assert "holds NaN or infinity in unet's conv_out.weight" in text
    assert not list((tmp_path / "root").rglob("shard-*"))


def test_images_set_aside_are_shown_and_a_full_disk_is_named(server, parameters, tmp_path, capsys, caplog, monkeypatch):
    """A run that trains on what is left of the images, and then finds no room for its first pool."""
    images = tmp_path / "images"
    Image.new("RGB", (1, 1)).save(images / "tiny.png")
    (images / "tiny.txt").write_text("a woman")
    Image.new("L", (40, 40), 90).save(images / "without.png")
    Image.new("CMYK", (40, 40)).save(images / "print.jpg")
    (images / "print.txt").write_text("a woman " * 1250)
    write = LocalFiles.write

    def fail(self, key, data):
        if key.startswith("pools/") and "/shard-" in key:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, key, data)

    monkeypatch.setattr(LocalFiles, "write", fail)
    text = run(parameters, tmp_path / "root", capsys, caplog)
    aside = ("skipped, not trained on: 2 of 7 images (under half of the requested size: 1; it has no caption: 1); "
             "captions cut at the length that the text encoder reads: 5")  # of a tiny one, all
    artifact = Artifact.get("images-set-aside")
    assert artifact is not None and artifact.description == aside
    assert {row["file_name"] for row in json.loads(artifact.data)} == {"tiny.png", "without.png"}
    assert "No space left on device; the disk is full: free some space or choose another root" in text
    assert not list((tmp_path / "root" / "pools").rglob("shard-*"))
