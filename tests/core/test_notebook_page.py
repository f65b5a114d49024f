"""docs/NOTEBOOK.md: its lines run, and give the summary and the report that the flow gives."""

import re
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "NOTEBOOK.md").read_text()
SMALL = {"prompts.limit": 3, "pool.images_per_prompt": 2, "pool.prompts_per_shard": 2, "sampler.steps": 2,
         "images": None, "dpo.max_steps": 1, "dpo.batch_size": 2, "evaluation.prompts.limit": 3,
         "target.dtype": "float32", "evaluation.scorers": [{"name": "pickscore", "source": "figures"}]}


def test_the_lines_of_the_page_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines, progress = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    names = {"SMALL": SMALL}
    exec(lines.replace('"output/notebook")', '"output/notebook", overrides=SMALL)'), names)
    folder = tmp_path / "output" / "notebook" / "runs" / names["run"].run_id
    assert (folder / "report.html").stat().st_size > 10_000 and (folder / "summary.json").exists()
    summary = names["summary"]
    assert summary["lora_id"] == names["result"].made.lora.model_id and summary["pool_images"] == 6
    assert {"pool", "dpo", "evaluation"} <= summary["timings"].keys() and summary["found"] == []
    assert names["lora"].is_dir() and "report.html" in capsys.readouterr().out

    exec(progress, names)
    with names["on"]("pool") as report:
        report(1, 2, "images")
    assert capsys.readouterr().out == "pool: 1 of 2 images\r"
