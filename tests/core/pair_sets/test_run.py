"""A whole run on pairs that others labelled: marked as foreign in ids, report, summary, model card and plan."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny_run
from pair_files import image, pair, write_parquet

from hgdpo_core.built_in import FOREIGN_SOURCE
from hgdpo_core.errors import ConfigError, InputError
from hgdpo_core.export import export_run
from hgdpo_core.images import decode_image
from hgdpo_core.pair_sets import stand_ins
from hgdpo_core.pipeline import make_pool, run_all, write_report
from hgdpo_core.plan import plan_run
from hgdpo_core.run import open_run


@pytest.fixture(scope="module")
def rows():
    texts = ["a woman in a red top", "a green car", "two men on a bench", "a man", "a girl", "a woman"]
    rows = [pair(i, i % 2 if i < 5 else None, caption=text) for i, text in enumerate(texts)]
    rows[4]["jpg_0"] = image((0, 0, 0), (8, 8))  # too small
    return rows


@pytest.fixture(scope="module")
def parameters(tmp_path_factory, rows, target_folder, judge_folder):
    folder = tmp_path_factory.mktemp("user")
    write_parquet(folder / "their-pairs", rows)
    given = tiny_run.tiny_parameters(folder, target_folder, judge_folder)
    given["overrides"] |= {"pairs": {"source": str(folder / "their-pairs"), "human_only": True, "rows_per_shard": 4}}
    return given


@pytest.fixture(scope="module")
def finished(tmp_path_factory, parameters):
    run = open_run(root=str(tmp_path_factory.mktemp("root")), **parameters)
    result = run_all(run)
    return run, result, write_report(run, result)


def test_no_pool_is_made_and_the_lora_is_trained_on_the_pairs(finished):
    run, result, _ = finished
    assert run.trains_on == "pairs" and result.made.ranked is None
    counts = result.made.pairs.counts()
    assert (counts.read, counts.triplets) == (6, 3) and sum(counts.reasons.values()) == 3
    log = run.store.read_json(f"models/{result.made.lora.model_id}/config.json")
    assert log["config"]["allow_foreign_triplets"] is True
    pools = [key for key, _, _ in run.store.walk("pools") if key.endswith("config.json")]
    assert len(pools) == 2  # the evaluation images of both models


def test_summary_and_page_say_what_the_pairs_are(finished):
    run, result, published = finished
    facts = published.summary["foreign_pairs"]
    assert facts["data_set"] == "their-pairs" and facts["licence"] == "unknown" and facts["human_only"]
    assert facts["read"] == 6 == facts["used"] + sum(facts["dropped"].values()) and facts["image_size"] == [32, 32]
    assert published.summary["pool_images"] == 0 and published.summary["triplets"] == 3
    page = run.store.read_bytes(run.key("report.html")).decode()
    assert "foreign pairs of their-pairs" in page and "Ranked pools" not in page and "Foreign pairs" in page
    assert "used in training" not in page and "chose the training pairs" not in page  # by no scorer here
    assert page.count("<figcaption>winner</figcaption>") == page.count("<figcaption>loser</figcaption>") > 0
    assert "it is a tie: 1" in page


def test_the_model_card_claims_neither_own_images_nor_no_labels(finished, tmp_path):
    run, result, _ = finished
    export_run(run.store, tmp_path / "lora", run.run_id)
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "made from preference pairs that others made and labelled, `their-pairs`, by DPO training" in card
    for claim in ("without human labels", "drawn by the model itself", "No photograph", "- hg-dpo",
                  "best against worst"):
        assert claim not in card, claim
    assert "- foreign-pairs" in card and "3 of 6 used" in card and "no licence of these pairs is known" in card
    assert "Rights to the foreign pairs" in card and "/their-pairs" not in card.replace("`their-pairs`", "")
    assert '"human_only": true' in card and '"images_per_prompt": 4' not in card.split("## Settings")[1]


def test_the_plan_holds_the_pairs_and_no_pool(finished, parameters):
    run, result, _ = finished
    plan = plan_run(run)
    stages = {stage.stage: stage for stage in plan.stages}
    assert "pool" not in stages and "score" not in stages
    assert (stages["pairs"].total, stages["pairs"].missing) == (6, 0) and stages["dpo"].missing == 0
    assert any("trained on 6 pairs of their-pairs" in note for note in plan.notes)
    fresh = plan_run(open_run(root=run.store.root + "-other", dry=True, **parameters))
    assert {stage.stage: stage.missing for stage in fresh.stages}["pairs"] == 6


def test_other_pairs_are_another_run_and_the_same_are_not_read_again(finished, parameters):
    run, result, _ = finished
    again = run_all(open_run(root=run.store.root, **parameters))
    assert again.made.lora.existing and again.made.lora.model_id == result.made.lora.model_id
    others = {**parameters["overrides"], "pairs": parameters["overrides"]["pairs"]["source"]}
    other = open_run(root=run.store.root, **{**parameters, "overrides": others})
    assert other.run_id != run.run_id


def test_winners_of_the_pairs_can_be_trained_on_but_not_a_reward(finished, parameters, tmp_path):
    winners = {**parameters["overrides"], "objective": "sft_winners"}
    run = open_run(root=finished[0].store.root, **{**parameters, "overrides": winners})
    assert run_all(run).made.lora.model_id.startswith("sft_winners-")
    reward = {**parameters["overrides"], "objective": "alignprop"}
    with pytest.raises(ConfigError, match="objective is alignprop, which is trained on prompts, but pairs are given"):
        open_run(root=str(tmp_path), **{**parameters, "overrides": reward})


def test_pairs_of_which_none_can_be_used_end_the_run_before_a_training(parameters, tmp_path):
    write_parquet(tmp_path / "ties", [pair(i, None) for i in range(3)])
    overrides = {**parameters["overrides"], "pairs": str(tmp_path / "ties")}
    run = open_run(root=str(tmp_path / "root"), **{**parameters, "overrides": overrides})
    with pytest.raises(InputError, match=r"none of the 3 pairs of ties can be used \(it is a tie: 3\)"):
        run_all(run)
    with pytest.raises(InputError, match="pairs"):
        open_run(root=str(tmp_path / "root"),
                 **{**parameters, "overrides": {**parameters["overrides"], "pairs": str(tmp_path / "nothing")}})
    assert not [key for key, _, _ in run.store.walk("models") if "/dpo-" in key]


def test_the_built_in_stand_ins_are_pairs_too_and_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(stand_ins, "STAND_IN_PAIRS", 4)
    run = open_run(root=str(tmp_path), overrides={"pairs": FOREIGN_SOURCE})
    assert run.pairs.name == "figures-foreign-stand-in-4" and len(run.pairs) == 4
    changed = {path: path.stat().st_mtime_ns for path in (tmp_path / "images").rglob("*.parquet")}
    assert len(changed) == 1
    open_run(root=str(tmp_path), overrides={"pairs": FOREIGN_SOURCE})
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "images").rglob("*.parquet")} == changed


def test_the_control_labels_the_first_two_images_of_the_own_pools(tmp_path):
    overrides = {"images": None, "prompts.limit": 3, "pool.images_per_prompt": 3, "sampler.steps": 2,
                 "pool.prompts_per_shard": 2, "target.dtype": "float32"}
    run = open_run(root=str(tmp_path), overrides=overrides)
    pool = make_pool(run, run.target)
    drawn = {(row["prompt"], row["index"]): row["image"] for index in pool.indices
             for row in pool.folder.read(index, ["prompt", "index", "image"]).to_pylist()}
    folder = stand_ins.label_own(run.store, run.target, run.config, run.prompts)
    rows = pq.read_table(folder / "data").to_pylist()
    assert [row["caption"] for row in rows] == list(run.prompts.prompts) and "stand-in" in folder.name
    for row in rows:
        for side in (0, 1):
            both = (row[f"jpg_{side}"], drawn[row["caption"], side])
            labelled, own = (np.asarray(decode_image(data)) for data in both)
            assert np.abs(labelled.astype(int) - own).max() <= 1  # other batches, so other low bits
        assert row["model_0"] == row["model_1"] == "figures (stand-in)"
