"""Clean-up of what no manifest names: data files of writers that yielded or died, and their leftovers."""

import json
import re
import time
from collections import defaultdict
from dataclasses import dataclass

from hgdpo_core.errors import ConfigError, StorageError
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import DATA_NAME, MANIFEST_NAME

DAY_SECONDS = 86_400
FOLDERS = frozenset({"ablations", "concepts", "evaluations", "features", "identities", "images", "latent_distances",
                     "latents", "models", "plots", "pools", "prompts", "rescores", "runs", "scores", "triplets"})
"""What a root holds; nothing outside them is ever removed, but probes of the root itself."""
OURS = re.compile(r"(prompts/[^/]+/prompts\.parquet|prompts/sources/[^/]+\.parquet|runs/[^/]+/config\.json"
                  r"|(pools|scores|triplets|latents|latent_distances|features)/(.+/)?(config|shard-\d{5,})\.json"
                  r"|models/[^/]+/model\.json)")
TEMPORARY = re.compile(r"\.tmp-(probe-)?[0-9a-f]{32}")


@dataclass(frozen=True)
class GarbageReport:
    """What was removed, or with `dry_run` what would be.

    `files`: keys; `bytes`: their sum; `uploads`: keys of unfinished multipart uploads; `kept_folders`:
    folders skipped, since a manifest in them cannot be read and the files it names are unknown; `problems`:
    one line each.
    """

    files: tuple[str, ...]
    bytes: int
    uploads: tuple[str, ...]
    kept_folders: tuple[str, ...]
    problems: tuple[str, ...]
    dry_run: bool


def collect_garbage(store: Store, *, older_than_seconds: float = DAY_SECONDS,
                    dry_run: bool = False) -> GarbageReport:
    """Remove unnamed shard data, temporary files and unfinished uploads older than `older_than_seconds`.

    The age spares running writers, whose data file comes before its manifest. Manifests, `quarantine/`,
    `rejected/` and whatever else is not a shard's data file are never touched, and nothing outside the folders of a
    root. StorageError when the root cannot be listed, ConfigError when it is none of ours.
    """
    before = time.time() - older_than_seconds
    found = list(store.walk())
    sizes = {key: size for key, size, _ in found}
    old = {key for key, _, changed in found if changed < before}
    if sizes and not any(OURS.fullmatch(key) or TEMPORARY.fullmatch(key) for key in sizes):
        raise ConfigError(f"{store.root} is not a root of this project: it holds no pools, runs or models of ours, and "
                          "nothing in it was touched; give the --root of a run")
    sizes = {key: size for key, size in sizes.items() if "/" not in key or key.partition("/")[0] in FOLDERS}
    old &= sizes.keys()
    named, kept_folders = _named_files(store, sizes)
    garbage = [key for key in sorted(old) if TEMPORARY.fullmatch(_name(key)) or (
        "/" in key and DATA_NAME.fullmatch(_name(key)) and _folder(key) not in kept_folders and key not in named)]
    if not dry_run:
        garbage = [key for key in garbage if _remove(store, key)]
    uploads, problems = _end_uploads(store, before, dry_run)
    return GarbageReport(tuple(garbage), sum(sizes[key] for key in garbage), tuple(uploads),
                         tuple(sorted(kept_folders)), tuple(problems), dry_run)


def _named_files(store: Store, keys: dict[str, int]) -> tuple[set[str], set[str]]:
    """Data files that a manifest names, and the folders where one cannot be read."""
    manifests: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        if MANIFEST_NAME.fullmatch(_name(key)):
            manifests[_folder(key)].append(key)
    named, unreadable = set[str](), set[str]()
    for folder, found in manifests.items():
        for data in store.read_many(found).values():
            file = _named_in(data)
            if file is None:
                unreadable.add(folder)
            else:
                named.add(f"{folder}/{file}" if folder else file)
    return named, unreadable


def _named_in(manifest: bytes) -> str | None:
    """Any JSON object with a file name counts: a newer version's manifest must protect its data from us."""
    try:
        file = json.loads(manifest)["file"]
    except (ValueError, TypeError, KeyError):
        return None
    return file if isinstance(file, str) else None


def _remove(store: Store, key: str) -> bool:
    match = DATA_NAME.fullmatch(_name(key))
    if match is not None:
        # Check again just before: a writer of the same content may have named this file since we listed.
        manifest_key = f"{_folder(key)}/shard-{match[1]}.json".lstrip("/")
        manifest = store.read_many([manifest_key]).get(manifest_key)
        if manifest is not None and _named_in(manifest) in (None, _name(key)):
            return False
    store.delete(key)
    return True


def _end_uploads(store: Store, before: float, dry_run: bool) -> tuple[list[str], list[str]]:
    ended: list[str] = []
    try:
        for key, upload_id, started in list(store.unfinished_uploads()):
            if started < before:
                if not dry_run:
                    store.abort_upload(key, upload_id)
                ended.append(key)
    except StorageError as error:       # some servers and credentials may not list uploads; the rest is done
        return ended, [f"unfinished uploads were not all ended: {error}"]
    return ended, []


def _folder(key: str) -> str:
    return key.rpartition("/")[0]


def _name(key: str) -> str:
    return key.rpartition("/")[2]
