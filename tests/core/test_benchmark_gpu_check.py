"""The check of a GPU, in its tiny version on the CPU: it runs, writes what it found, and ends for no part."""

import json
import time

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import Part, check, main
from benchmarks.gpu_check_parts import Row, Setting

SKIPPED = {part.name for part in gpu_check.PARTS if part.needs_gpu}


def test_the_tiny_version_runs_every_part_and_writes_its_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HGDPO_DEVICE", "cpu")
    assert main(["--output", str(tmp_path), "--minutes", "60"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("torch sees no GPU: a tiny version runs on the CPU")
    report = json.loads((tmp_path / "cpu.json").read_text())
    assert (report["device"], report["size"]) == ("cpu", "tiny")
    parts = {part["part"]: part for part in report["parts"]}
    assert list(parts) == [part.name for part in gpu_check.PARTS]
    assert {name for name, part in parts.items() if part["status"] == "skipped"} == SKIPPED
    assert all(part["rows"] for name, part in parts.items() if name not in SKIPPED)
    assert parts["DPO bf16, resumed"]["rows"][1]["value"] <= 1e-4  # of the CPU, which adds in one order
    table = (tmp_path / "cpu.md").read_text()
    assert table in printed and table.count("\n| ") > 2 * len(parts)


def parts_of(*runs) -> list[Part]:
    return [Part(str(number), 5, run) for number, run in enumerate(runs)]


def fail(_):
    raise RuntimeError("no kernel\nand a second line")


def test_a_part_that_fails_or_finds_too_much_does_not_end_the_others(tmp_path, monkeypatch):
    good, far, lacking = Row("a", 1.0, "ms"), Row("difference", 0.2, "points", 0.1), Row("b", None, "not available: x")
    chosen = parts_of(fail, lambda _: [good, far], lambda _: [lacking])
    report = check(Setting("cpu", "tiny", tmp_path), 60, chosen)
    assert [(r.status, r.reason) for r in report.results] == [
        ("failed", "RuntimeError: no kernel"), ("failed", "difference: 0.2 is above 0.1"), ("ok", "")]
    assert "| 2 | b | - | not available: x | - |" in report.to_markdown()
    monkeypatch.setattr(gpu_check, "check", lambda *_: report)
    assert main(["--output", str(tmp_path)]) == 1


def test_the_time_is_kept(tmp_path):
    """A part ends when its time is over, whatever it catches; what begins too late is skipped. Both say so."""
    def long(_):
        try:
            time.sleep(9)
        except Exception:
            return []

    start = time.monotonic()
    report = check(Setting("cpu", "tiny", tmp_path), 0.2, [Part("long", 5, long), Part("late", 60, fail)])
    assert time.monotonic() - start < 5
    assert [result.status for result in report.results] == ["skipped", "skipped"]
    assert report.results[0].reason == "was not finished in 0 s"
    assert report.results[1].reason.startswith("takes up to 60 s, and ")


def test_a_gpu_that_is_asked_for_and_not_there_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("HGDPO_DEVICE", "cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main([]) == 1
    assert capsys.readouterr().err.startswith("error: HGDPO_DEVICE asks for cuda")


@pytest.mark.gpu
def test_the_first_parts_hold_on_a_gpu(tmp_path):
    report = check(Setting("cuda", "tiny", tmp_path), 300, gpu_check.PARTS[:9])
    assert [result.status for result in report.results] == ["ok"] * 9, report.to_markdown()
