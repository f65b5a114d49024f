"""Prefect's command line, for a server on SQLite: with the garbage collector in a thread of its own.

    python -m deployments.sqlite_server server start --host 127.0.0.1 --port 4200

Seen with Prefect 3.8.8 and six workers on one machine (stacks by py-spy): the collector runs in whichever thread makes
the next object, mostly that of the event loop. There it frees the cursor of a statement that failed, and for that waits
for the cursor's connection, whose thread waits up to 60 s (a constant of Prefect's) for another connection's lock. That
lock is only released by the event loop, which now waits itself: the server stands still for a minute, and then refuses
the write, whose failure leaves the next such cursor. In a thread of its own the collector may wait.
"""

import gc
import runpy
import sys
import threading
import time

YOUNG_SECONDS, ALL_SECONDS = 1.0, 60.0


def server_command(database: str | None, port: int) -> list[str]:
    """What starts a server on loopback: on a database of its own address Prefect's, on SQLite (None) this one."""
    program = "prefect" if database else "deployments.sqlite_server"
    return [sys.executable, "-m", program, "server", "start", "--host", "127.0.0.1", "--port", str(port)]


def collect_aside() -> None:
    """From here on garbage is collected by a thread, and by no other one."""
    gc.disable()
    threading.Thread(target=_collect, name="garbage collector", daemon=True).start()


def _collect() -> None:
    whole = time.monotonic()
    while True:
        time.sleep(YOUNG_SECONDS)
        old = time.monotonic() - whole > ALL_SECONDS
        gc.collect(2 if old else 1)
        whole = time.monotonic() if old else whole


if __name__ == "__main__":
    collect_aside()
    runpy.run_module("prefect", run_name="__main__", alter_sys=True)
