"""The scaling benchmark, small: every prompt gets its images, scores and triplet, and is found again."""

from benchmarks import scaling
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder


def test_every_stage_does_its_work(tmp_path):
    row = scaling.run_pipeline(str(tmp_path), 5, 2)
    assert row.prompts == 5 and set(row.milliseconds) == set(scaling.STAGES) and row.total > 0
    store, rows = Store(str(tmp_path)), {}
    for key, _, _ in store.walk():
        folder, _, name = key.rpartition("/")
        if name == "config.json":
            manifests = ShardFolder.open(store, folder).manifests()
            rows[folder.split("/")[0]] = [manifest.rows for manifest in manifests.values()]
    assert rows == {"pools": [4, 4, 2], "scores": [4, 4, 2], "triplets": [2, 2, 1]}


def test_costs_are_compared_with_the_first_row():
    rows = [scaling.Row(count, dict.fromkeys(scaling.STAGES, cost), 10.0) for count, cost in ((100, 1.0), (1000, 1.1))]
    assert "| 1000 | 1.10 | 1.10 | 1.10 | 1.10 | 1.10 | 5.50 | +10 % | 10 |" in scaling.format_table(rows)


def test_one_walk_prints_bare_numbers(capsys):
    scaling.main(["--only", "2", "--prompts-per-shard", "2"])
    numbers = [float(word) for word in capsys.readouterr().out.split()]
    assert len(numbers) == len(scaling.STAGES) + 1 and all(number >= 0 for number in numbers)
