"""The scoring benchmark, at its tiny size: it runs, prints its table, and both sides give the same scores."""

import re

import pytest

from benchmarks import score


@pytest.mark.parametrize("clock", ["wall", "cpu"])
def test_it_prints_a_table_with_equal_scores(capsys, clock):
    score.main(["--size", "tiny", "--images", "3", "--batch", "2", "--images-per-prompt", "2", "--width", "90",
                "--height", "130", "--clock", clock])
    lines = capsys.readouterr().out.splitlines()
    assert "3 images of 90x130, 2 per prompt, cpu" in lines[0] and f"{clock} clock" in lines[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[4:]]
    assert [(row[0], row[1], row[2]) for row in rows] == [
        ("model card, one by one", "float32", "1"), ("ours", "float32", "2"),
        ("model card, one by one", "bfloat16", "1"), ("ours", "bfloat16", "2")]
    assert all(float(row[3]) > 0 and re.fullmatch(r"\d+\.\d\dx", row[4]) for row in rows)
    assert rows[0][4] == "1.00x" and float(rows[1][5]) < 1e-4 < float(rows[3][5]) < 1


def test_it_takes_real_weights_and_its_settings(judge_folder, capsys):
    score.main(["--source", str(judge_folder), "--images", "2", "--batch", "2", "--dtypes", "float32",
                "--threads", "1"])
    output = capsys.readouterr().out
    assert output.startswith(str(judge_folder)) and ", 1 threads, wall clock" in output
    assert output.count("bfloat16") == 0
