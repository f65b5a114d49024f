"""The rows of the benchmark of orchestration: it may be stopped and started again, and they add up."""

import json

from benchmarks.orchestration_rows import SUMMED, read_rows, say

SETTINGS = {"runs": 300, "workers": 2, "open_runs": 50, "database": "postgres"}


def row(session, seconds, completed, **more):
    return {"session": session, "state": "Running", "parent_mib": 600, "server_mib": 200} | SETTINGS | dict.fromkeys(
        SUMMED, 0) | {"seconds": seconds, "completed": completed} | more


def test_sessions_of_the_same_settings_add_up_by_their_last_rows(tmp_path):
    file = tmp_path / "orchestration.jsonl"
    assert read_rows(file, SETTINGS) == []
    rows = [row("one", 60, 5, late=3, server_cpu=10), row("one", 120, 11, late=4, server_cpu=20, server_mib=310),
            row("other", 60, 9, open_runs=300), row("two", 600, 100, server_cpu=90.5)]
    file.write_text("\n".join(map(json.dumps, rows)) + '\n{"session": "two", "sec')
    before = read_rows(file, SETTINGS)
    assert before == [rows[1], rows[3]]
    said = say([*before, row("three", 1000, 189, state="Completed", server_cpu=200, database_cpu=60, failed=2)])
    assert said.startswith("300 of 300 shard runs on 2 workers, 50 open, postgres: Completed after 1720 s in 3 session")
    assert "11.5 s a shard run and worker; server 1.03 s, Postgres 0.20 s of CPU a run" in said
    assert "server 310 MiB; 2 failed or crashed, automations fired 0, marked Late 4" in said


def test_without_a_completed_run_there_is_a_row_all_the_same():
    said = say([row("one", 30, 0)])
    assert said.startswith("0 of 300 shard runs") and " nan s a shard run" in said
