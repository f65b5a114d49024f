"""The server of `make up` on SQLite is Prefect's own, and its garbage is collected aside."""

import subprocess
import sys
from pathlib import Path

from deployments.sqlite_server import server_command

ROOT = Path(__file__).parents[2]
CYCLE = """
import gc, threading, time, weakref
from deployments.sqlite_server import collect_aside
collect_aside()
freed_by = []
class Cursor:
    def __init__(self):
        self.itself = self
        weakref.finalize(self, lambda: freed_by.append(threading.current_thread().name))
Cursor()
many = [[] for _ in range(200_000)]  # the collector would have run in this thread a hundred times
assert not freed_by and not gc.isenabled()
time.sleep(3)
print(freed_by)
"""


def test_garbage_is_collected_by_a_thread_of_its_own():
    done = subprocess.run([sys.executable, "-c", CYCLE], cwd=ROOT, text=True, capture_output=True)
    assert done.stdout.strip() == "['garbage collector']", done.stderr


def test_it_is_prefects_command_line():
    done = subprocess.run([*server_command(None, 4200)[:4], "start", "--help"], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 0 and "Start a Prefect server instance" in done.stdout, done.stderr
    assert server_command("postgresql+asyncpg://prefect@db/prefect", 4200)[2] == "prefect"
