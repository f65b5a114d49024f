"""Which code and which format of shards this is: a worker refuses requests that other code planned."""

import functools
import hashlib
from pathlib import Path

from hgdpo_core import __version__
from hgdpo_core.config.base import content_hash
from hgdpo_core.errors import ConfigError
from hgdpo_core.storage.shards import FORMAT_VERSION

DECIDES_NO_SHARD = ("ablate/", "config/presets.py", "evaluate.py", "execution/imports.py", "export/", "figures/make/",
                    "personalise.py", "plan/", "rendering/", "report/", "rescore/", "run/")
"""Files of the core that plan, compare and show what workers make: a worker may have others. New files count."""


@functools.cache
def code_version() -> str:
    """The package's version and a hash of the sources that decide shards and models: others exchange no requests."""
    return f"{__version__}+{hash_sources(Path(__file__).parents[1])}"


def hash_sources(package: Path) -> str:
    """8 hex digits of a package's Python files, but for DECIDES_NO_SHARD."""
    names = {path.relative_to(package).as_posix(): path for path in package.rglob("*.py")}
    return content_hash({name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in names.items()
                         if not name.startswith(DECIDES_NO_SHARD)}, 8)


def refuse_other_code(code: str, shard_format: int) -> None:
    """ConfigError, naming both, when a request was planned by other code or for other shards than these."""
    for name, theirs, ours in (("code", code, code_version()), ("format", str(shard_format), str(FORMAT_VERSION))):
        if theirs != ours:
            raise ConfigError(f"this worker has {name} version {ours}, the run that planned this work has {theirs}: "
                              "bring both to the same version, then retry the planning run; it starts new shard runs")
