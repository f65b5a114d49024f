"""Resume points of training in the object store: `<key>/step-N/`, whose `complete.json` is written last.

    weights.safetensors   the trained weights
    state.pt              optimizer, learning rate and log; read with weights_only=True, so it cannot run code
    complete.json         step, config hash, bytes and sha256 of both files; without it there is no checkpoint
"""

import contextlib
import hashlib
import json
import logging
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from accelerate.utils import recursively_apply
from safetensors.torch import load_file, save_file

from hgdpo_core.storage import MissingKeyError, Store, scratch_folder

WEIGHTS, STATE, COMPLETE = "weights.safetensors", "state.pt", "complete.json"
KEEP = 2

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoints:
    """The folder of a training's checkpoints: `key` of `store`, for one model and one data set."""

    store: Store
    key: str


@dataclass(frozen=True)
class Checkpoint:
    """The state of a training after `step` optimizer steps; a stored one has its tensors on the CPU."""

    step: int
    weights: Mapping[str, torch.Tensor]
    state: Mapping[str, Any]

    def on_host(self) -> Self:
        """A copy in the machine's memory, which the steps after it do not change."""
        copies: dict[int, torch.Tensor] = {}  # what several entries share (bitsandbytes' maps) stays shared

        def copy(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in copies:
                copies[id(tensor)] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            return copies[id(tensor)]

        return replace(self, weights=recursively_apply(copy, dict(self.weights)),
                       state=recursively_apply(copy, dict(self.state)))


def save_checkpoint(checkpoints: Checkpoints, checkpoint: Checkpoint, config_hash: str) -> None:
    """Write a checkpoint, `complete.json` last, then remove all but the last two of the same config."""
    folder = f"{checkpoints.key}/step-{checkpoint.step}"
    checkpoints.store.delete(f"{folder}/{COMPLETE}")  # another config's must not vouch for the new files
    with scratch_folder() as local:
        save_file(dict(checkpoint.weights), local / WEIGHTS)
        torch.save(dict(checkpoint.state), local / STATE)
        files = {file: _describe(local / file) for file in (WEIGHTS, STATE)}
        checkpoints.store.put_folder(local, folder)
    checkpoints.store.write_json(f"{folder}/{COMPLETE}", {"step": checkpoint.step, "config_hash": config_hash,
                                                          "files": files})
    for step in _complete_steps(checkpoints, config_hash)[KEEP:]:
        _remove(checkpoints, step)


def load_latest(checkpoints: Checkpoints, config_hash: str, local: Path) -> Checkpoint | None:
    """The latest intact checkpoint of this config, or None; incomplete and foreign ones are skipped.

    Its files are left in the folder `local`, for `read_checkpoint`.
    """
    for step in _complete_steps(checkpoints, config_hash):
        try:
            checkpoints.store.get_folder(f"{checkpoints.key}/step-{step}", local)
            files = json.loads((local / COMPLETE).read_bytes())["files"]
            if files != {file: _describe(local / file) for file in (WEIGHTS, STATE)}:
                raise ValueError("its files are not those complete.json names")
            return read_checkpoint(local)
        except (FileNotFoundError, ValueError, KeyError, MissingKeyError, pickle.UnpicklingError) as error:
            logger.warning("checkpoint %s is damaged (%s): trying an older one",
                           checkpoints.store.url(f"{checkpoints.key}/step-{step}"), error)
    return None


def read_checkpoint(local: Path) -> Checkpoint:
    """The checkpoint whose files are in a folder of this machine, which may be removed afterwards."""
    # load_file maps the file: the tensors are copied out
    weights = {name: tensor.clone() for name, tensor in load_file(local / WEIGHTS).items()}
    state = torch.load(local / STATE, weights_only=True, map_location="cpu")
    return Checkpoint(json.loads((local / COMPLETE).read_bytes())["step"], weights, state)


def _complete_steps(checkpoints: Checkpoints, config_hash: str) -> list[int]:
    """Steps with a `complete.json` of this config, latest first."""
    matches = (re.fullmatch(r"step-(\d+)", folder) for folder in checkpoints.store.list_folders(checkpoints.key))
    return sorted((int(match[1]) for match in matches
                   if match and _completed(checkpoints, match[0]) == (int(match[1]), config_hash)), reverse=True)


def _completed(checkpoints: Checkpoints, folder: str) -> tuple[int, str] | None:
    # Only absence and damage mean "no checkpoint": a store that cannot answer must not restart the training.
    try:
        record = json.loads(checkpoints.store.read_bytes(f"{checkpoints.key}/{folder}/{COMPLETE}"))
        return record["step"], record["config_hash"]
    except (MissingKeyError, ValueError, KeyError, TypeError):
        return None


def _remove(checkpoints: Checkpoints, step: int) -> None:
    folder = f"{checkpoints.key}/step-{step}"
    checkpoints.store.delete(f"{folder}/{COMPLETE}")  # first: what an interrupted removal leaves is not a checkpoint
    for key, _, _ in list(checkpoints.store.walk(folder)):
        checkpoints.store.delete(key)
    if local := checkpoints.store.local_path(folder):
        with contextlib.suppress(OSError):  # not empty: a user's file is in it
            local.rmdir()


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
