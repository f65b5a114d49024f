"""Models in the object store: a folder's files first, `model.json` last; a folder without it does not exist."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hgdpo_core.fingerprints import fingerprint_path
from hgdpo_core.storage import Store


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
    return store.read_json(key) if store.exists(key) else None


def fetch_model(store: Store, model_id: str) -> Path | None:
    """A local folder with the model: the store's own where it is local, else a copy in the cache. None if absent."""
    record = find_record(store, model_id)
    if record is None:
        return None
    key = f"models/{model_id}"
    local = store.local_path(key)
    if local is not None:
        return local
    folder = _cache() / f"{model_id}-{record['fingerprint'][:12]}"
    if not folder.is_dir():
        partial = folder.with_name(f"{folder.name}.{os.getpid()}")
        for name in _files(store, key):
            target = partial / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(store.read_bytes(f"{key}/{name}"))
        try:
            partial.replace(folder)
        except OSError:
            if not folder.is_dir():
                raise
            shutil.rmtree(partial)  # another process was faster
    return folder


def stored_id(store: Store, path: Path) -> str | None:
    """The id of the model whose local folder `fetch_model` gave as `path`; None for a folder from elsewhere."""
    models = store.local_path("models")
    if models is not None:
        found = path.name if path.parent.resolve() == models.resolve() else None
    else:
        found = path.name.rpartition("-")[0] if path.parent.resolve() == _cache().resolve() else None
    return found if found and find_record(store, found) is not None else None


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hgdpo" / "models"


def _files(store: Store, key: str) -> Iterator[str]:
    for path, _, _ in store.walk(key):
        name = path.removeprefix(f"{key}/")
        if not name.startswith("checkpoints/"):
            yield name
