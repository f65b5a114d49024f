"""A Postgres on loopback for as long as it is needed, from the binaries of the system (Debian: postgresql).

    python -m benchmarks.postgres    # with a Prefect server on it, migrated, until Ctrl-C

Data are in a temporary folder. Postgres refuses to run as root: then it is the user `postgres`, else `nobody`.
"""

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deployments.local import _free_ports

FIRST_PORT = 15432
START_SECONDS = 60


def binaries() -> Path | None:
    """The folder of the newest Postgres here, None without one."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).resolve().parent if on_path else None


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """The address of a new, empty database, as Prefect takes it; RuntimeError without Postgres."""
    bin_folder = binaries()
    if bin_folder is None:
        raise RuntimeError("no Postgres is installed here: apt-get install postgresql")
    user, folder = _user(), tempfile.mkdtemp(prefix="hgdpo-postgres-")
    if user:
        shutil.chown(folder, user["user"], user["group"])
    port, data, log = next(_free_ports(FIRST_PORT)), f"{folder}/data", Path(folder, "log")
    address = ["-h", "127.0.0.1", "-p", str(port), "-U", "prefect"]
    server = None
    try:
        subprocess.run([bin_folder / "initdb", "-D", data, "-U", "prefect", "-A", "trust", "-E", "UTF8"], check=True,
                       capture_output=True, cwd=folder, **user)
        with log.open("wb") as output:
            command = [bin_folder / "postgres", "-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", ""]
            # A session of its own: Ctrl-C ends it last, after what still writes to it.
            server = subprocess.Popen(command, stdout=output, stderr=output, cwd=folder, start_new_session=True, **user)
        ends = time.monotonic() + START_SECONDS
        while subprocess.run([bin_folder / "createdb", *address, "prefect"], capture_output=True).returncode:
            if server.poll() is not None or time.monotonic() > ends:
                raise RuntimeError(f"Postgres did not start: {log.read_text(errors='replace')[-500:]}")
            time.sleep(0.2)
        yield f"postgresql+asyncpg://prefect@127.0.0.1:{port}/prefect"
    finally:
        if server is not None:
            server.send_signal(signal.SIGINT)  # ends its connections too
            server.wait(timeout=START_SECONDS)
        shutil.rmtree(folder, ignore_errors=True)


def _user() -> dict[str, Any]:
    if os.geteuid() != 0:
        return {}
    names = {entry.pw_name: entry for entry in pwd.getpwall()}
    entry = names.get("postgres") or names["nobody"]
    return {"user": entry.pw_name, "group": entry.pw_gid, "extra_groups": []}


def main() -> None:
    """A Prefect server on a Postgres of its own."""
    with postgres() as url, tempfile.TemporaryDirectory() as home:
        environment = os.environ | {"PREFECT_API_DATABASE_CONNECTION_URL": url, "PREFECT_HOME": home}
        prefect = [sys.executable, "-m", "prefect", "server"]
        subprocess.run([*prefect, "database", "upgrade", "-y"], env=environment, check=True)
        print(f"database {url}")
        with contextlib.suppress(KeyboardInterrupt):
            subprocess.run([*prefect, "start"], env=environment)


if __name__ == "__main__":
    main()
