"""The benchmark of reading ahead, at a tiny size: it runs, and every part of its table was measured."""

from benchmarks import read_ahead


def test_it_prints_each_part_alone_and_all_together(capsys):
    read_ahead.main(["--shards", "3", "--prompts-per-shard", "1", "--images-per-prompt", "4", "--width", "64",
                     "--height", "96", "--latency", "0.001", "--score-images", "400", "--latent-images", "200"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("3 shards, 64x96 PNG, 0.001 s a request") and "sleeps as for 400 images/s" in lines[0]
    assert lines[1].startswith("one core: ") and lines[1].count("images/s") == 3
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[5:]]
    assert [row[:2] for row in rows] == [["scoring", "12"], ["latents", "12"]]
    for row, computing in zip(rows, (12 / 400, 12 / 200), strict=True):
        fetching, decoding, computed, _, together = map(float, row[2:7])
        assert computing - 0.01 <= computed and fetching >= 0 and decoding >= 0
        assert together >= computing - 0.01 and row[7].endswith("x")
