"""Fingerprints of models and files: the sha256 of their content, cached by path, size and change time."""

import hashlib
import json
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from hgdpo_core.config.base import content_hash
from hgdpo_core.errors import ModelError
from hgdpo_core.storage.local import write_atomically
from hgdpo_core.storage.scratch import cache_folder

T = TypeVar("T")

MAX_CONFIG_BYTES = 1 << 16  # larger .json files are vocabularies
SAVERS_NOTES = {"_name_or_path", "_diffusers_version", "transformers_version"}
TRAINING_FOLDERS = ("checkpoints", "validation", "tensorboard")
HASHED_SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".json", ".txt", ".model")


def fingerprint_path(path: Path) -> str:
    """sha256 (64 hex digits) of one file, or of the names and hashes of a folder's weights and configs."""
    refuse_special_files(path)
    if path.is_file():
        return _file_hash(path)
    files = sorted(f for f in path.rglob("*") if f.suffix in HASHED_SUFFIXES and not _is_ours(f.relative_to(path))
                   and f.is_file())  # a link that leads nowhere, a folder or a pipe by such a name is not a part of it
    try:
        return content_hash([[f.relative_to(path).as_posix(), _config_hash(f) or _file_hash(f)] for f in files],
                            length=64)
    except OSError as error:
        raise ModelError(f"{error.filename or path} cannot be read: {error.strerror or error}; make it readable or get "
                         "the model again") from None


def refuse_special_files(path: Path) -> None:
    """ModelError for a pipe, socket or device at or below `path`: whatever opens one may wait for ever."""
    for file in (path, *path.rglob("*")):
        try:
            mode = file.stat().st_mode
        except OSError:  # a link that leads nowhere or in a circle: refused by what needs the file
            continue
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise ModelError(f"{file} is not a file but a pipe, socket or device: remove it, or get the model again")


def _is_ours(name: Path) -> bool:
    """Files that training leaves and our own records are beside a model in the store but no part of it."""
    return name.parts[0] in TRAINING_FOLDERS or str(name) in ("config.json", "model.json", "log.json")


def _config_hash(path: Path) -> str | None:
    """Hash of a config without the notes of the library that saved it; None for what is not a config."""
    if path.suffix != ".json" or path.stat().st_size > MAX_CONFIG_BYTES:
        return None
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    if isinstance(config, dict):
        config = {key: value for key, value in config.items() if key not in SAVERS_NOTES}
        if "local_files_only" in config:  # transformers notes HF_HUB_OFFLINE here: hashed as if it had been unset
            config["local_files_only"] = False
    return content_hash({"config": config}, length=64)


def hash_files(paths: Sequence[Path]) -> list[str]:
    """sha256 (64 hex digits) of each of many files, read again only when one of them was changed, by size or time."""
    files = [_state(path) for path in paths]
    key = hashlib.sha256("\n".join(files).encode()).hexdigest()
    return _cached(key, lambda: [_sha256(path) for path in paths])


def _file_hash(path: Path) -> str:
    if path.stat().st_size < 1 << 20:  # small files are faster to hash than to look up
        return _sha256(path)
    return _cached(_state(path), lambda: _sha256(path))


def _state(path: Path) -> str:
    status = path.stat()
    return f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cached(key: str, compute: Callable[[], T]) -> T:
    """The result of an earlier call with this key, JSON values only, or that of `compute` now."""
    entry = cache_folder("fingerprints") / hashlib.sha256(key.encode()).hexdigest()[:24]
    with suppress(OSError, ValueError, KeyError):  # not cached yet, or a broken entry: hash again
        saved = json.loads(entry.read_text())
        if saved["key"] == key:
            return saved["sha256"]
    result = compute()
    data = json.dumps({"key": key, "sha256": result}).encode()
    with suppress(OSError):  # a home that cannot be written costs time, not correctness
        write_atomically(entry, lambda file: file.write(data))
    return result
