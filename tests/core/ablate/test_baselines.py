"""Table 1 and the length of training: arms, trials on validation prompts, win rates of HG-DPO against each baseline."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pair_files import pair, write_parquet

from hgdpo_core.ablate import measure, paper
from hgdpo_core.ablate.arms import OURS, Arm, arm_config, base_arm, plan_tables
from hgdpo_core.ablate.conclude import run_ablation
from hgdpo_core.ablate.cost import plan_ablation
from hgdpo_core.ablate.measure import run_trials
from hgdpo_core.ablate.program import open_ablation, prepare_shared
from hgdpo_core.ablate.settings import AblationConfig
from hgdpo_core.config.pair_source import PairSource
from hgdpo_core.config.presets import figures, sd15
from hgdpo_core.errors import ConfigError, InputError

TRIALS = [[1.0, 1.0], [3.0, 0.5]]
OTHERS = ("our-pickapic", "our-pickapic (H)", "SFT on winners", "AlignProp", "DPO, beta x4")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, target_folder, judge_folder):
    location = tmp_path_factory.mktemp("user")
    for name, text in (("prompts", "a woman in a red top"), ("held-out", "a man in a blue top"),
                       ("trials", "a boy in a green top")):
        (location / f"{name}.txt").write_text("".join(f"{text}, number {i}\n" for i in range(5)))
    rows = [pair(i, i % 2, caption=text) for i, text in enumerate(["a red car", "a woman", "a dog", "two men"] * 2)]
    write_parquet(location / "our-pickapic", rows)
    judge = {"name": "pickscore", "source": str(judge_folder)}
    return {
        "target": str(target_folder), "prompts": str(location / "prompts.txt"),
        "settings": {"seeds": 2, "comparisons": ("baselines", "length"), "worlds": ("plain",)},
        "overrides": {
            "ablation.trials": TRIALS, "ablation.validation": {"source": str(location / "trials.txt")},
            "ablation.pairs": [{"source": str(location / "our-pickapic")}], "ablation.lora_weights": [0.25],
            "ablation.epochs": [1, 2], "ablation.beta_factors": [4], "ablation.diversity_prompts": 2,
            "ablation.diversity_images": 2, "ablation.distance_pools": 3, "target.dtype": "float32",
            "scorer.source": str(judge_folder), "evaluation.scorers": [judge],
            "evaluation.prompts": {"source": str(location / "held-out.txt")}, "sampler.width": 32, "sampler.height": 32,
            "sampler.steps": 1, "sampler.guidance_scale": 1.0, "pool.images_per_prompt": 4, "pool.prompts_per_shard": 2,
            "dpo.max_steps": 2, "dpo.batch_size": 2, "dpo.learning_rate": 5e-2, "dpo.mixed_precision": "no",
            "dpo.optimizer": "adamw", "alignprop.least_live_steps": 1, "alignprop.max_steps": 2,
            "alignprop.batch_size": 2, "alignprop.global_batch_size": 2, "alignprop.mixed_precision": "no"}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, inputs):
    ablation = open_ablation(root=str(tmp_path_factory.mktemp("root")), **inputs)
    return ablation, run_ablation(ablation)


def test_every_row_of_table_1_names_its_row_of_the_paper():
    tables = {table.number: table for table in plan_tables(figures(), AblationConfig(comparisons=("baselines",)), 320)}
    rows = tables["1"].rows
    assert [row.label for row in rows][0] == OURS and rows[0].arm.lambda_stat == figures().dpo.lambda_stat
    assert {row.paper_row for row in rows[1:]} - {None} <= set(paper.TABLE_1)
    assert all(row.arm.chosen and row.arm.lambda_stat == 0 for row in rows[1:])
    assert [row.label for row in rows if row.paper_row is None] == [OURS, *(row.label for row in rows if "control" in
                                                                             row.label)]
    foreign = [row for row in rows if row.arm.data != "own"]
    assert [row.arm.data for row in foreign] == ["pairs", "pairs", "foreign_pool", "labelled"]
    assert all("stand-in" in row.label for row in foreign)
    assert [row.arm.pair_source.human_only for row in foreign[:2]] == [False, True]
    assert [row.arm for row in tables["1-weights"].rows] == [replace(row.arm, chosen_weight=True) for row in rows]


def test_pairs_of_others_are_arms_of_any_preset():
    settings = AblationConfig(comparisons=("baselines",), trials=(), pairs=(
        PairSource(source="yuvalkirstain/pickapic_v2", limit=100_000), PairSource(source="ymhao/HPDv2/"),
        PairSource(source="/data/ours", human_only=True)))
    (table,) = plan_tables(sd15("a/b", "p.txt"), settings, 100_000)
    labels = {row.label: row for row in table.rows if row.arm.data == "pairs"}
    assert {label: row.paper_row for label, row in labels.items()} == {
        "pickapic_v2": "Pick-a-Pic v2", "pickapic_v2 (H)": "Pick-a-Pic v2 (H)", "HPDv2": "HPD v2",
        "HPDv2 (H)": "HPD v2 (H)", "ours (H)": None}
    config = arm_config(sd15("a/b", "p.txt"), labels["pickapic_v2 (H)"].arm, 0)
    assert config.pairs == PairSource(source="yuvalkirstain/pickapic_v2", limit=100_000, human_only=True)
    assert config.dpo.max_steps == 6250  # as the own pool's one epoch, whatever number of pairs is used
    assert not any(row.arm.data in ("foreign_pool", "labelled") for row in table.rows)


def test_an_arms_id_is_that_of_an_earlier_version_where_nothing_new_is_used():
    assert set(base_arm(figures(), 320, "plain").identity()) == {
        "world", "pool_size", "loser_rank", "prompts", "beta", "lambda_stat", "lora_weight", "latent_normalisation"}
    assert Arm("plain", 2, 2, 1, 1.0, 0.0, 1.0, length_factor=0.5).identity()["length_factor"] == 0.5


def test_length_and_learning_rate_vary_the_objectives_own_settings():
    config, arm = figures(), base_arm(figures(), 320, "plain")
    own = config.dpo

    def varied(**changes):
        return arm_config(config, Arm(**{**arm.__dict__, **changes}), 3).dpo

    assert (varied(epochs=16).max_steps, varied(epochs=16).epochs) == (None, 16)
    assert varied(rate_factor=3.0, length_factor=0.5).learning_rate == pytest.approx(3 * own.learning_rate)
    shorter = varied(length_factor=0.5)
    assert (shorter.max_steps, shorter.seed) == (own.max_steps // 2, 3)
    paper_like = sd15("a/b", "p.txt")
    half = Arm(**{**arm.__dict__, "prompts": 100_000, "length_factor": 0.5})
    assert arm_config(paper_like, half, 0).dpo.max_steps == 3125


def test_each_arm_takes_the_best_of_its_trials(finished):
    ablation, result = finished
    shared = prepare_shared(ablation)
    arms = {row.label: row.arm for table in ablation.tables if table.number == "1" for row in table.rows}
    for label, arm in arms.items():
        trials = run_trials(shared, arm)
        assert [[trial.rate_factor, trial.length_factor] for trial in trials] == TRIALS
        best = max(trials, key=lambda trial: trial.win_rate)
        for seed in range(2):
            record = measure.run_arm(shared, arm, seed)
            assert record.trials == trials and record.seconds > 0
            made = ablation.run.store.read_json(f"models/{record.model_id}/config.json")["config"]
            own = 1e-3 if label == "AlignProp" else 5e-2
            assert made["learning_rate"] == pytest.approx(own * best.rate_factor), label
            assert made["max_steps"] == max(1, round(2 * best.length_factor)) and made["seed"] == seed
    judged = {prompt for shard in shared.validation.target_images.shards for prompt in shard.prompts}
    assert judged == set(ablation.trial_prompts.prompts) and len(judged) == 5


def test_table_1_holds_win_rates_of_ours_against_each(finished):
    ablation, result = finished
    table = next(table for table in result["tables"] if table["title"].startswith("Table 1"))
    labels = [row[0] for row in table["rows"]]
    assert labels == ["HG-DPO", *(f"vs. {name}" for name in OTHERS)]
    shared = prepare_shared(ablation)
    arms = [row.arm for t in ablation.tables if t.number == "1" for row in t.rows]
    ours, other = (np.array([measure.run_arm(shared, arm, seed).gains["pickscore"] for seed in range(2)])
                   for arm in (arms[0], arms[3]))
    wins, losses = (ours > other).sum(), (ours < other).sum()
    assert table["rows"][3][1].startswith(f"{100 * wins / (wins + losses):.1f} (")
    assert table["rows"][1][2] == "83.0 / 80.7 / 75.7 / 62.7 / 68.9"
    assert table["rows"][3][2] == "74.6 / 78.2 / 70.1 / 50.9 / 67.2"
    assert "2 trials of learning rate and steps" in " ".join(table["notes"])
    claims = [claim for claim in result["claims"] if claim["text"].startswith("HG-DPO is better")]
    assert [claim["text"] for claim in claims] == [f"HG-DPO is better than {name}" for name in OTHERS]
    assert claims[2]["estimate"]["value"] == pytest.approx(100 * wins / (wins + losses) - 50)
    assert {"table-1-plain", "table-1-weights-plain", "figure-17", "table-length-plain"} <= set(result["plots"])


def test_arms_of_others_pairs_are_trained_on_what_they_use(finished):
    ablation, result = finished
    table = next(table for table in result["tables"] if table["title"] == "Table 1: HG-DPO against the baselines")
    pairs = dict(zip([row[0] for row in table["rows"]], [row[-2] for row in table["rows"]], strict=True))
    assert pairs["HG-DPO"] == "5" and pairs["vs. our-pickapic"] == "8" and pairs["vs. our-pickapic (H)"] == "4"
    records = [arm for arm in result["arms"] if arm["pairs"] and not arm["chosen_weight"]]
    for record in records:
        model = ablation.run.store.read_json(f"models/{record['seeds'][0]['model_id']}/config.json")
        assert model["config"]["allow_foreign_triplets"] and not model["config"]["lambda_stat"]


def test_an_arm_at_a_weight_of_its_own_takes_the_best_of_those_tried(finished):
    ablation, result = finished
    shared = prepare_shared(ablation)
    rows = {table.number: table.rows for table in ablation.tables}
    for plain, row in zip(rows["1"], rows["1-weights"], strict=True):
        tried = measure.try_weights(shared, row.arm)
        assert [one.weight for one in tried] == [1.0, 0.25]
        weight = max(tried, key=lambda one: one.win_rate).weight
        record = measure.run_arm(shared, row.arm, 1)
        same = measure.run_arm(shared, replace(plain.arm, lora_weight=weight), 1)
        assert record.weights == tried and record.gains == same.gains and record.model_id == same.model_id
        at_one = measure.run_arm(shared.validation, replace(measure.chosen_arm(shared, plain.arm), lora_weight=0.25), 0)
        won = np.mean((1 + np.sign(at_one.gains["pickscore"])) / 2)
        assert tried[1].win_rate == pytest.approx(won)
    table = next(table for table in result["tables"] if table["title"].startswith("Table 1, each arm at a LoRA"))
    assert table["columns"][-1] == "LoRA weight chosen of" and "diversity" not in table["columns"]


def test_the_table_of_lengths_has_colours_diversity_and_checks(finished):
    _, result = finished
    table = next(table for table in result["tables"] if table["title"] == "Length of training")
    assert [row[0] for row in table["rows"]] == ["1 epoch", "2 epochs"]
    assert list(table["columns"][-3:]) == ["colour distance in RGB, levels of 255", "diversity", "checks"]
    assert all(cell for row in table["rows"] for cell in row)


def test_nothing_is_trained_twice_and_the_plan_counts_the_trials(finished, inputs):
    ablation, result = finished
    root = Path(ablation.run.store.root.removeprefix("file://"))
    models = {path.parent.name for path in root.glob("models/*/model.json")}
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.safetensors")}
    again = run_ablation(open_ablation(root=str(root), **inputs))
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*.safetensors")} == before
    assert json.dumps(again["tables"]) == json.dumps(result["tables"])
    plan = plan_ablation(ablation)
    assert plan["arms"] == 14 and plan["trainings"] == 2 * 8 + 6 * 2  # six rows twice, at two weights; two lengths
    assert len(models) <= plan["trainings"]  # a trial may be the training itself


def test_trials_need_prompts_of_their_own(inputs, tmp_path):
    overrides = {name: value for name, value in inputs["overrides"].items() if name != "ablation.validation"}
    with pytest.raises(ConfigError, match="trials need prompts apart from those of the evaluation: name them in "):
        open_ablation(root=str(tmp_path), **{**inputs, "overrides": overrides})
    overrides["ablation.validation"] = {"source": inputs["overrides"]["evaluation.prompts"]["source"]}
    with pytest.raises(InputError, match="5 of 5 prompts for trials occur in the evaluation too, the first is 'a man"):
        open_ablation(root=str(tmp_path), **{**inputs, "overrides": overrides})
