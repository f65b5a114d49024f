"""Names of objects: relative paths such as `pools/<id>/shard-00000.json`."""

from hgdpo_core.errors import ConfigError

TEMPORARY_PREFIX = ".tmp-"

Entries = list[tuple[str, bool, int]]
"""What is directly inside a folder: name, whether it is a folder itself, bytes."""
Tree = list[tuple[str, int, float]]
"""Every object below a folder: path inside the folder, bytes, last change in seconds since 1970."""


def is_temporary(key: str) -> bool:
    """Whether `key` is an unfinished write or a probe: never part of a result."""
    return key.rpartition("/")[2].startswith(TEMPORARY_PREFIX)


def checked(key: str) -> str:
    """`key` itself; ConfigError for one that could leave the root. "" is the root."""
    if key and ({"", ".", ".."} & set(key.split("/")) or "\\" in key):
        raise ConfigError(f"object key {key!r}: expected a relative path such as pools/<id>/config.json")
    return key
