"""Models in the object store: a folder's files first, `model.json` last; a folder without it does not exist."""

import os
import shutil
from pathlib import Path
from typing import Any

from hgdpo_core.errors import StorageError
from hgdpo_core.models.fingerprints import fingerprint_path
from hgdpo_core.storage import Store
from hgdpo_core.storage.scratch import cache_folder

DOWNLOAD_TRIES = 3


def publish_model(store: Store, model_id: str, folder: Path, record: dict[str, Any]) -> Path:
    """Put a local folder into `models/<model_id>/` and commit it; returns a local path to read it from."""
    key = f"models/{model_id}"
    store.put_folder(folder, key)
    store.write_json(f"{key}/model.json", {**record, "fingerprint": fingerprint_path(folder)})
    path = fetch_model(store, model_id)
    assert path is not None  # just committed
    return path


def find_record(store: Store, model_id: str) -> dict[str, Any] | None:
    """`model.json` of a committed model, None when it is not there."""
    key = f"models/{model_id}/model.json"
    return store.read_object(key, fingerprint=str, kind=str) if store.exists(key) else None


def fetch_model(store: Store, model_id: str) -> Path | None:
    """A local folder with the model: the store's own where it is local, else a copy in the cache. None if absent.

    StorageError where the files are not those that `model.json` was written for. Large files are hashed again only
    when their size or time changed.
    """
    record = find_record(store, model_id)
    if record is None:
        return None
    key, fingerprint = f"models/{model_id}", record["fingerprint"]
    local = store.local_path(key)
    if local is not None:
        if fingerprint_path(local) != fingerprint:
            raise _changed(store, key)
        return local
    folder = cache_folder("models") / f"{model_id}-{fingerprint[:12]}"
    if folder.is_dir() and fingerprint_path(folder) != fingerprint:
        shutil.rmtree(folder)
    if not folder.is_dir():
        partial = folder.with_name(f"{folder.name}.{os.getpid()}")
        _download(store, key, partial, fingerprint)
        try:
            partial.replace(folder)
        except OSError:
            if not folder.is_dir():
                raise
            shutil.rmtree(partial)  # another process was faster
    return folder


def stored_id(store: Store, path: Path) -> str | None:
    """The id of the model whose local folder `fetch_model` returned as `path`; None for a folder from elsewhere."""
    models = store.local_path("models")
    name = path.name if models is not None else path.name.rpartition("-")[0]
    if path.parent.resolve() != (models or cache_folder("models")).resolve():
        return None
    return name if name and find_record(store, name) is not None else None


def _download(store: Store, key: str, folder: Path, fingerprint: str) -> None:
    """Copy a model's files, without its checkpoints, until they are what its record says."""
    for _ in range(DOWNLOAD_TRIES):
        shutil.rmtree(folder, ignore_errors=True)  # a killed download left it, or the network corrupted it
        store.get_folder(key, folder, leave_out=f"{key}/checkpoints/")
        if fingerprint_path(folder) == fingerprint:
            return
    shutil.rmtree(folder)
    raise _changed(store, key)


def _changed(store: Store, key: str) -> StorageError:
    return StorageError(f"the files of {store.url(key)} are not those its model.json was written for: delete the "
                        "folder and run the stage that makes it again")
