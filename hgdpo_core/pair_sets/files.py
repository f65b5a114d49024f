"""The files of a data set of pairs, at a path, a URL or on the hub."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from hgdpo_core.config.base import content_hash
from hgdpo_core.config.pair_source import PairSource
from hgdpo_core.errors import ConfigError, InputError, StorageError, first_line
from hgdpo_core.image_sets.sets import WILD, expand_braces
from hgdpo_core.image_sets.trees import local_tree
from hgdpo_core.models.fingerprints import hash_files
from hgdpo_core.prompts.sources import HUB_ID, LOCAL_PROTOCOLS, refuse_secret_address
from hgdpo_core.storage import Store, is_temporary
from hgdpo_core.storage.roots import local_address

KNOWN_SPLITS = ("train", "validation", "test", "validation_unique", "test_unique", "dev", "valid")
DATA_SUFFIXES = (".parquet", ".tar", ".jsonl", ".json", ".tar.gz", ".tgz")
HUB_TIMEOUT_SECONDS = 30.0


class PairFile(NamedTuple):
    """One file: its key in the store that holds the data set, its size, its last change."""

    key: str
    bytes: int
    changed: float


class Located(NamedTuple):
    """A data set that was found: its name for people, root and files; of one on the hub commit and licence."""

    name: str
    base: str
    files: list[PairFile]
    commit: str | None = None
    licence: str | None = None


def locate_pairs(source: PairSource, *, leave_out: Path | None = None) -> Located:
    """The files of a source; InputError when it cannot be used, StorageError when the hub is out of reach.

    `leave_out`: the root of the results, which may be below the pairs.
    """
    address = source.source
    protocol, remote, _ = address.partition("://")
    if remote:
        refuse_secret_address(address, "pairs")
    elif HUB_ID.fullmatch(address) and not Path(address).exists() and not address.lower().endswith(DATA_SUFFIXES):
        return _locate_on_hub(source)
    if source.revision is not None:
        raise InputError(f"pairs: revision {source.revision} names a commit of the hub, but {address} is not on the "
                         "hub: drop revision, files are identified by their bytes")
    if remote and protocol.lower() in ("http", "https"):
        raise InputError(f"pairs: {address} cannot be listed over http: download it, or give a path, the URL of a "
                         "bucket or a hub id")
    return _locate_below(address, not remote or protocol.lower() in LOCAL_PROTOCOLS, leave_out)


def _locate_on_hub(source: PairSource) -> Located:
    name, page = source.source, f"https://huggingface.co/datasets/{source.source}"
    hub = HfApi()
    try:
        info = hub.dataset_info(name, revision=source.revision, timeout=HUB_TIMEOUT_SECONDS)
        if info.gated:
            hub.auth_check(name, repo_type="dataset")
    except GatedRepoError:
        raise InputError(f"pairs: {name} is gated on the hub: accept its conditions at {page} and set HF_TOKEN, or "
                         "give the path of a copy") from None
    except RevisionNotFoundError:
        raise InputError(f"pairs: {name} has no revision {source.revision} on the hub: expected a commit, branch or "
                         "tag") from None
    except RepositoryNotFoundError:
        raise InputError(f"pairs: {name} is not a file or folder here, and there is no such data set on the hub, or "
                         "it is private: correct it, or set HF_TOKEN") from None
    except Exception as error:  # the hub client raises a wide family
        raise StorageError(f"pairs: {name} is not a file or folder here, and the hub is not available: "
                           f"{first_line(error)}; without the network, give the path of a copy") from None
    base = f"hf://datasets/{name}@{info.sha}"
    # of a commit: it never changes, and the hub states no times
    files = [PairFile(key, size, 0.0) for key, size, _ in Store(base).walk()]
    found: Any = (info.card_data or {}).get("license")
    licences = found if isinstance(found, list) else [found]
    return Located(name, base, files, info.sha, licences[0] if licences else None)


def _locate_below(address: str, is_local: bool, leave_out: Path | None) -> Located:
    """All files of a folder; one file and what lies beside it; those that match a pattern."""
    path = address.rstrip("/")
    if is_local:
        try:
            path = str(Path(local_address(address)).expanduser().absolute())
        except ConfigError as error:
            raise InputError(f"pairs: {error}") from None
    base, pattern = path, "*"
    exists = is_local and Path(path).exists()
    if not exists and (wild := WILD.search(path)):
        cut = path.rindex("/", 0, wild.start())
        base, pattern = path[:cut], path[cut + 1:]
    elif exists and not Path(path).is_dir() or not exists and path.lower().endswith(DATA_SUFFIXES):
        base, _, pattern = path.rpartition("/")
        pattern = re.sub(r"([*?\[])", r"[\1]", pattern)
    if is_local and not Path(base).is_dir():
        raise InputError(f"pairs: there is nothing at {address}: expected a folder or files of pairs, or the hub id "
                         "of a data set, as owner/name")
    try:
        store = Store(base or "/")
    except ConfigError as error:
        raise InputError(f"pairs: {address} is not a usable address: {error}") from None
    folder = store.local_path("")
    tree = store.walk() if folder is None else local_tree(folder, leave_out=leave_out)[0]
    files = [PairFile(*found) for found in tree if not is_temporary(found[0])]
    name = PurePosixPath(base).name if pattern == "*" else PurePosixPath(path).name
    return Located(name, store.root, _matching(files, pattern, address))


def _matching(files: list[PairFile], pattern: str, address: str) -> list[PairFile]:
    """The files that the pattern names first; one of JSON also brings along the files that it may name."""
    patterns = expand_braces(pattern)
    named = [file for one in patterns for file in files if fnmatchcase(file.key, one)]
    if not named:
        raise InputError(f"pairs: there is nothing at {address}: expected files of pairs, {', '.join(DATA_SUFFIXES)}")
    if any(file.key.endswith((".json", ".jsonl")) for file in named):
        others = tuple(suffix for suffix in DATA_SUFFIXES if "tar" not in suffix and "tgz" not in suffix)
        named += [file for file in files if not file.key.endswith(others)]
    return list(dict.fromkeys(named))


def choose_split(files: Sequence[PairFile], source: PairSource) -> list[PairFile]:
    """The files of the split, in the order of their names: `train-00000-of-00645.parquet`, `train/0.tar`, `train.json`.

    Files that name no split are all of "train". InputError, naming the splits there are, when there is none such.
    """
    if source.subset is not None:
        files = [file for file in files if source.subset in PurePosixPath(file.key).parts[:-1]]
        if not files:
            raise InputError(f"pairs: {source.source} has no folder {source.subset} with files of pairs: correct or "
                             "drop subset")
    ordered = sorted(files, key=lambda file: file.key.split("/"))
    chosen = [file for file in ordered if source.split in _split_names(file.key)]
    named = sorted({name for file in ordered for name in _split_names(file.key) if name in KNOWN_SPLITS})
    if chosen or (source.split == "train" and not named):
        return chosen or ordered
    raise InputError(f"pairs: {source.source} has no split {source.split}: it has {', '.join(named) or 'no splits'}")


def _split_names(key: str) -> set[str]:
    *folders, name = key.split("/")
    return {*folders, re.split(r"[-.]", name)[0]}


def identify_files(base: str, files: Sequence[PairFile]) -> str:
    """12 hex digits for the content of files: of their bytes, at a remote address of names, sizes and times.

    A file keeps its identity when its folder moves.
    """
    folder = Store(base).local_path("")
    if folder is None:
        return content_hash([[file.key, file.bytes, file.changed] for file in files])
    try:
        hashes = hash_files([folder / file.key for file in files])
    except OSError as error:
        raise InputError(f"pairs: {error.filename} cannot be read: {error.strerror}") from None
    return content_hash([[file.key.rpartition("/")[2], digest] for file, digest in zip(files, hashes, strict=True)])
