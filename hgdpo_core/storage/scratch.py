"""Folders outside the root on this machine's own disk, which may be another one, and may be full too."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hgdpo_core.errors import HGDPOError, StorageError

NEARLY_NOTHING_BYTES = 2**20


def cache_folder(name: str = "") -> Path:
    """The folder of this user's cache for one purpose; it need not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hgdpo" / name


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder, removed at the end. StorageError, naming the disk, where that has no room left."""
    with tempfile.TemporaryDirectory(prefix="hgdpo-") as name:
        try:
            yield Path(name)
        except HGDPOError:
            raise
        except Exception as error:
            if not _is_full(error, name):
                raise
            raise StorageError(f"the disk with the temporary folder {tempfile.gettempdir()} is full: free some space, "
                               "or set TMPDIR to a folder on a larger disk") from error


def _is_full(error: Exception, folder: str) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # safetensors and torch.save raise families of their own, torch's without the reason
    return "No space left" in str(error) or shutil.disk_usage(folder).free < NEARLY_NOTHING_BYTES
