"""Which code and which format of shards this is: a worker refuses work that other code planned."""

import functools
import hashlib
from pathlib import Path

from hgdpo_core import __version__
from hgdpo_core.config import content_hash
from hgdpo_core.errors import ConfigError
from hgdpo_core.storage.shards import FORMAT_VERSION


@functools.cache
def code_version() -> str:
    """The package's version and a hash of its sources: two checkouts that differ in the method never share work."""
    package = Path(__file__).parent
    sources = {path.relative_to(package).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
               for path in package.rglob("*.py")}
    return f"{__version__}+{content_hash(sources, 8)}"


def refuse_other_code(code: str, shard_format: int) -> None:
    """ConfigError, naming both, when a request was planned by other code or for other shards than these."""
    for name, theirs, ours in (("code", code, code_version()), ("format", str(shard_format), str(FORMAT_VERSION))):
        if theirs != ours:
            raise ConfigError(f"this worker has {name} version {ours}, the run that planned this work has {theirs}: "
                              "bring both to the same version, then retry the planning run; it starts new shard runs")
