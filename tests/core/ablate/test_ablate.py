"""Ablations: equal arms are one arm, every result is where it belongs, finished steps are not repeated."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hgdpo_core.ablate import paper
from hgdpo_core.ablate.arms import arm_config, arm_labels, base_arm, plan_tables, training_of
from hgdpo_core.ablate.claims import Claim
from hgdpo_core.ablate.conclude import run_ablation
from hgdpo_core.ablate.cost import plan_ablation
from hgdpo_core.ablate.measure import ArmRecord, measure_rank_distances, run_arm
from hgdpo_core.ablate.program import open_ablation, prepare_shared
from hgdpo_core.ablate.settings import AblationConfig
from hgdpo_core.config.presets import figures, sd15
from hgdpo_core.errors import ConfigError, StoppedError
from hgdpo_core.execution.runner import InProcess
from hgdpo_core.scorers import pickscore
from hgdpo_core.statistics.intervals import Estimate
from hgdpo_core.storage.shards import ShardFolder

SETTINGS = {"seeds": 1}
OVERRIDES = {"ablation.pool_sizes": [2, 4], "ablation.loser_ranks": [2, 4], "ablation.dataset_shares": [0.5, 1.0],
             "ablation.beta_factors": [20], "ablation.lambdas": [], "ablation.lora_weights": [0.5, 1.0],
             "ablation.diversity_prompts": 2, "ablation.diversity_images": 3, "ablation.distance_pools": 3}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, target_folder, judge_folder):
    location = tmp_path_factory.mktemp("user")
    (location / "prompts.txt").write_text("".join(f"a woman in a red top, number {i}\n" for i in range(4)))
    (location / "held-out.txt").write_text("".join(f"a man in a blue top, number {i}\n" for i in range(5)))
    judge = {"name": "pickscore", "source": str(judge_folder)}
    return {
        "target": str(target_folder), "prompts": str(location / "prompts.txt"), "settings": SETTINGS,
        "overrides": {
            **OVERRIDES, "target.dtype": "float32", "scorer.source": str(judge_folder), "evaluation.scorers": [judge],
            "evaluation.prompts": {"source": str(location / "held-out.txt")}, "sampler.width": 32, "sampler.height": 32,
            "sampler.steps": 1, "sampler.guidance_scale": 1.0, "pool.images_per_prompt": 4, "pool.prompts_per_shard": 2,
            "dpo.max_steps": 2, "dpo.batch_size": 2, "dpo.learning_rate": 5e-2, "dpo.mixed_precision": "no",
            "dpo.optimizer": "adamw"}}


@pytest.fixture(scope="module", autouse=True)
def _defects():
    """The tiny scorer has a limit for defects here: images that score under 0."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pickscore, "DEFECT_BELOW", 0.0, raising=False)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory, inputs):
    """An ablation with all comparisons in both worlds, and what its run returned."""
    ablation = open_ablation(root=str(tmp_path_factory.mktemp("root")), **inputs)
    return ablation, run_ablation(ablation)


def files(ablation, *suffixes):
    root = Path(ablation.run.store.root.removeprefix("file://"))
    return {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.suffix in suffixes}


# -- what is compared


def test_equal_arms_are_one_arm():
    config = figures()
    tables = {(t.number, t.world): [row.label for row in t.rows] for t in plan_tables(config, AblationConfig(), 160)}
    assert tables["3", "plain"] == ["N-2", "N-5", "N-10", "N-20", "N-20-LAN", "N-20-SML (lambda 1e6)",
                                    "N-20-SML (lambda 10000)", "N-20-SML (lambda 100000)"]
    assert tables["5", "plain"] == ["N-20-L-2", "N-20-L-5", "N-20-L-10", "N-20-L-20"]
    assert tables["6", "plain"] == ["N-20-D-20", "N-20-D-80", "N-20-D-160"]
    assert tables["2", "tinted"][:3] == ["N-20", "N-20 (beta x4)", "N-20 (beta x20)"]
    planned = plan_tables(config, AblationConfig(), 160)
    arm = {(t.world, row.label): row.arm for t in planned for row in t.rows}
    whole = base_arm(config, 160, "plain")
    assert arm["plain", "N-20"] == arm["plain", "N-20-L-20"] == arm["plain", "N-20-D-160"] == whole
    assert arm["plain", "weight 1"] == arm["plain", "N-20-SML (lambda 1e6)"] != arm["plain", "weight 0.5"]
    assert training_of(arm["plain", "N-20-LAN"]) == whole
    assert arm["tinted", "N-20"] != whole
    arms = list(arm_labels(planned))
    assert len(arms) == len(set(arms)) == 25 and len({training_of(one) for one in arms}) == 20


def test_every_row_of_the_papers_tables_has_its_arm():
    settings = AblationConfig(dataset_shares=(0.02, 0.5, 1.0))
    rows = {(t.number, t.world): [row.paper_row for row in t.rows]
            for t in plan_tables(sd15("a/b", "p.txt"), settings, 100_000)}
    known = {"3": paper.TABLE_3, "5": paper.TABLE_5, "6": paper.TABLE_6, "2": paper.TABLE_2}
    for number, table in known.items():
        assert set(table) <= set(rows[number, "plain"]), number


def test_the_papers_copying_error_is_as_the_note_describes_it():
    for name in ("2", "5", "10", "20"):
        assert paper.TABLE_5[f"N-20-L-{name}"] == paper.TABLE_3[f"N-{name}"]


def test_an_arms_config_changes_what_it_varies_and_keeps_defaults():
    config, whole = figures(), base_arm(figures(), 160, "plain")
    plain = arm_config(config, whole, seed=2)
    assert plain.triplets == config.triplets and plain.sampler == config.sampler and plain.scorer == config.scorer
    assert (plain.dpo.seed, plain.dpo.lambda_stat, plain.dpo.beta) == (2, 0.0, config.dpo.beta)
    other = dataclasses.replace(whole, world="tinted", pool_size=10, loser_rank=5, beta=5000.0, lambda_stat=3.0,
                                lora_weight=0.5, latent_normalisation=True)
    varied = arm_config(config, other, seed=0)
    assert (varied.triplets.pool_size, varied.triplets.loser_rank, varied.dpo.beta) == (10, 5, 5000.0)
    assert (varied.dpo.lambda_stat, varied.evaluation.lora_weight) == (3.0, 0.5)
    assert varied.sampler.latent_normalisation and varied.scorer.name == "tinted"
    assert varied.scorer.source == config.scorer.source
    own = [scorer.name for scorer in config.evaluation.scorers]
    assert [scorer.name for scorer in varied.evaluation.scorers] == [*own, "tinted"]


@pytest.mark.parametrize(("changes", "message"), [
    ({"ablation.pool_sizes": [5]}, "ablation.pool_sizes holds 5, but a pool holds 4 images"),
    ({"ablation.loser_ranks": [1]}, "ablation.loser_ranks holds 1"),
    ({"ablation.dataset_shares": [1.5]}, "ablation: dataset_shares.0: .* less than or equal to 1 .got 1.5"),
    ({"ablation.beta_factors": [0]}, "ablation: beta_factors.0: .* greater than 0 .got 0"),
    ({"ablation.lambdas": [0]}, "ablation: lambdas.0: .* greater than 0 .got 0"),
    ({"dpo.lambda_stat": 0}, "dpo.lambda_stat is 0: the comparisons statistics and lora_weight need"),
    ({"ablation.worlds": ["tinted"], "ablation.comparisons": ["pool_size"]}, "tinted world is for the comparisons"),
    ({"scorer.name": "tinted"}, "the tinted world tints PickScore, but scorer.name is tinted"),
    ({"ablation.split": "validation"}, "only the figures setting's prompts have a validation split"),
    ({"ablation.colour": 1}, "ablation.colour is not a setting; there are beta_factors"),
    ({"evaluation.scorers": [{"name": "inspector", "source": "figures"}], "scorer.name": "inspector",
      "scorer.source": "figures", "ablation.worlds": ["plain"]}, "is measured with PickScore's image tower"),
    ({"ablation.seeds": 0}, "ablation: seeds: Input should be greater"),
    ({"ablation.comparisons": ["beauty"]}, "ablation: comparisons"),
])
def test_mistakes_are_one_line_and_found_before_work(tmp_path, inputs, changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        open_ablation(root=str(tmp_path), **{**inputs, "overrides": {**inputs["overrides"], **changes}})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ablations").exists()


def test_the_validation_split_is_other_prompts(tmp_path):
    overrides = {"images": None, "evaluation.prompts.limit": 5, "prompts.limit": 4}
    test, validation = (open_ablation(root=str(tmp_path), overrides=overrides, settings={"split": split})
                        for split in ("test", "validation"))
    assert test.ablation_id != validation.ablation_id
    assert not set(test.run.evaluation_prompts.prompts) & set(validation.run.evaluation_prompts.prompts)
    assert not (tmp_path / "runs").exists()  # an ablation is not a run


def test_the_plan_counts_what_the_defaults_cost(tmp_path):
    ablation = open_ablation(root=str(tmp_path), overrides={"images": None})
    plan, config = plan_ablation(ablation), ablation.run.config
    assert (plan["arms"], plan["trainings"]) == (25, 60)
    pool = len(ablation.run.prompts.prompts) * config.pool.images_per_prompt
    assert plan["pool_images"] == pool and plan["diversity_images"] == 32 * 8 * (1 + 3 * 4)
    prompts = len(ablation.run.evaluation_prompts.prompts)
    assert plan["evaluation_images"] == prompts * (1 + 3 * 27)  # 2 of 25 arms are generated with LAN, twice the cost
    own = len(config.evaluation.scorers)  # and the tinted one for 7 arms of its world and for the target
    assert plan["scores"] == 2 * pool + prompts * (own + 1 + 3 * (25 * own + 7))
    assert 60 <= plan["minutes"] <= 120  # two idle cores


# -- a whole ablation on tiny models


def test_every_arm_is_measured_with_every_seed(finished):
    ablation, result = finished
    assert len(result["arms"]) == len(ablation.arms) == 12
    for arm in result["arms"]:
        names = ["pickscore"] if arm["world"] == "plain" else ["pickscore", "tinted"]
        assert [seed["seed"] for seed in arm["seeds"]] == [0]
        for seed in arm["seeds"]:
            assert list(seed["win_rate"]) == names
            rate = seed["win_rate"]["pickscore"]
            assert rate["wins"] + rate["losses"] + rate["ties"] == rate["n"] == 5
        assert set(arm["colour"]) == {"hue", "saturation", "value", "hue_degrees", "warmth", "distance"}


def test_equal_arms_have_one_pool_and_one_training(finished):
    ablation, result = finished
    store = ablation.run.store
    trained = [name for name in store.list_folders("models") if name.startswith("dpo-")]
    assert len(trained) == plan_ablation(ablation)["trainings"] == 9
    assert len([name for name in store.list_folders("pools") if name.startswith("n4-")]) == 1
    by_label = {(arm["world"], arm["label"]): arm["seeds"][0] for arm in result["arms"]}
    assert by_label["plain", "N-4"]["model_id"] == by_label["plain", "N-4-LAN"]["model_id"]
    assert by_label["plain", "N-4"]["evaluation_id"] != by_label["plain", "N-4-LAN"]["evaluation_id"]
    pools = {name: ShardFolder.open(store, f"pools/{name}").config for name in store.list_folders("pools")}
    assert sum("latent_normalisation" in config["sampler"] for config in pools.values()) == 2  # 2 worlds
    targets = [config for config in pools.values() if config["model"]["lora"] is None]
    assert len(targets) == 3  # the pool, the evaluation, the diversity of the target: shared by all arms


def test_numbers_of_a_row_follow_from_its_records(finished):
    ablation, result = finished
    shared = prepare_shared(ablation)
    arm, row = ablation.arms[0], result["arms"][0]
    record = run_arm(shared, arm, 0)
    gains = np.array(record.gains["pickscore"])
    rate = row["seeds"][0]["win_rate"]["pickscore"]
    assert (rate["wins"], rate["losses"]) == (int((gains > 0).sum()), int((gains < 0).sum()))
    assert row["win_rate"]["pickscore"]["value"] == pytest.approx(rate["rate"])
    assert row["score_change"]["pickscore"]["value"] == pytest.approx(gains.mean())
    saved = shared.ablation.run.store.read_json(f"evaluations/{record.evaluation_id}/result.json")
    defective = [np.mean(np.array(saved[f"{who}_scores"]["pickscore"]) < 0) for who in ("tuned", "target")]
    assert row["defects"]["pickscore"]["value"] == pytest.approx(defective[0] - defective[1])
    for name in ("hue", "saturation", "value"):  # the record's colours are rounded to six digits
        assert abs(row["colour"][name]["value"]) == pytest.approx(record.colour_shift[name], abs=1e-3)
    assert row["colour"]["hue_degrees"]["value"] == pytest.approx(record.colour_shift["hue_degrees"], abs=0.1)


def test_two_worlds_rank_one_pool_differently_and_are_named(finished):
    ablation, result = finished
    by_label = {(arm["world"], arm["label"]): arm for arm in result["arms"]}
    plain, tinted = by_label["plain", "N-4"], by_label["tinted", "N-4"]
    assert plain["seeds"][0]["model_id"] != tinted["seeds"][0]["model_id"]
    page = ablation.run.store.read_bytes(ablation.key("index.html")).decode()
    tables = ablation.run.store.read_bytes(ablation.key("tables.md")).decode()
    for text in (page, tables):
        assert "TINTED WORLD" in text and "88.7 / 89.8 / 76.8 / 75.1 / 74.0" in text and "copying error" in text
    assert all("TINTED WORLD" in table["title"] for table in result["tables"]
               if "tinted" in json.dumps(table["rows"]) and "Table" in table["title"])
    assert "<script" not in page and page.count("data:image/png;base64,") == len(result["plots"])


def test_plots_are_images_and_the_config_is_saved(finished):
    ablation, result = finished
    assert {"table-2-plain", "table-2-tinted", "table-3-plain", "table-5-plain", "table-6-plain", "figure-8-plain",
            "figure-8-images", "figure-5b-plain", "figure-6-tinted"} <= set(result["plots"])
    for name in result["plots"]:
        image = Image.open(io.BytesIO(ablation.run.store.read_bytes(ablation.key(f"plots/{name}.png"))))
        assert min(image.size) > 200, name
    config = ablation.run.store.read_json(ablation.key("config.json"))
    assert config["ablation"]["beta_factors"] == [20] and config["run"]["dpo"]["max_steps"] == 2


def test_the_second_run_makes_nothing_and_returns_the_same(finished, inputs):
    ablation, result = finished
    before = files(ablation, ".parquet", ".safetensors")
    records = files(ablation, ".json")
    again = open_ablation(root=ablation.run.store.root, **inputs)
    assert run_ablation(again) == result
    assert files(ablation, ".parquet", ".safetensors") == before
    unchanged = {p for p, changed in files(ablation, ".json").items() if records.get(p) == changed}
    assert {p for p in records if "arms" in p.parts} <= unchanged


def test_another_seed_adds_to_what_is_there(finished, inputs):
    ablation, result = finished
    asked = {"seeds": 2, "worlds": ["plain"], "comparisons": ["loser_rank"]}
    more = open_ablation(root=ablation.run.store.root, **{**inputs, "settings": asked})
    models = set(ablation.run.store.list_folders("models"))
    arms = {arm["label"]: arm for arm in run_ablation(more)["arms"]}
    added = set(ablation.run.store.list_folders("models")) - models
    assert added == {arm["seeds"][1]["model_id"] for arm in arms.values()} and len(added) == 2
    first = {arm["label"]: arm["seeds"] for arm in result["arms"] if arm["world"] == "plain"}
    assert arms["N-4-L-2"]["seeds"][0] == first["N-4-L-2"][0]
    rates = [seed["win_rate"]["pickscore"]["rate"] for seed in arms["N-4-L-2"]["seeds"]]
    if None not in rates:
        assert min(rates) <= arms["N-4-L-2"]["win_rate"]["pickscore"]["value"] <= max(rates)


def test_stopped_anywhere_it_continues_where_it_stopped(tmp_path, inputs):
    few = {"seeds": 1, "worlds": ["plain"], "comparisons": ["loser_rank"], "loser_ranks": [4]}
    less = {**inputs, "settings": few,
            "overrides": {name: value for name, value in inputs["overrides"].items() if name != "ablation.loser_ranks"}}
    undisturbed = run_ablation(open_ablation(root=str(tmp_path / "a"), **less))
    ablation = open_ablation(root=str(tmp_path / "b"), **less)
    stops = 0
    for allowed in (1, 3, 6, 200):
        answers = iter([False] * allowed + [True] * 1000)
        try:
            result = run_ablation(ablation, runner=InProcess(lambda answers=answers: next(answers)))
            break
        except StoppedError:
            stops += 1
    assert stops >= 3
    differ = ("root", "command", "artifacts")
    for training in (seed for one in (result, undisturbed) for arm in one["arms"] for seed in arm["seeds"]):
        assert training.pop("seconds") > 0
    assert {k: v for k, v in result.items() if k not in differ} == {
        k: v for k, v in undisturbed.items() if k not in differ}


def test_a_broken_record_is_one_line(finished):
    ablation, _ = finished
    shared, store = prepare_shared(ablation), ablation.run.store
    kept = {name: store.read_json(f"ablations/arms/{name}") for name in store.list("ablations/arms")}
    for name in kept:  # other tests' ablations lie here too
        store.write_json(f"ablations/arms/{name}", {"seed": 0})
    try:
        with pytest.raises(ConfigError, match="is not a record of this version: delete it"):
            run_arm(shared, ablation.arms[0], 0)
    finally:
        for name, record in kept.items():
            store.write_json(f"ablations/arms/{name}", record)
    assert all(ArmRecord.model_validate(record) for record in kept.values())


def test_latent_distances_are_of_best_and_nth_best(finished):
    """Recomputed by hand from the pool's images for one prompt."""
    from hgdpo_core.images import decode_image
    from hgdpo_core.models import load_pipeline
    from hgdpo_core.stages.triplets import read_ranked_pools

    ablation, result = finished
    shared = prepare_shared(ablation)
    distances = measure_rank_distances(shared, "plain")
    assert distances.shape == (4, 3, 2)  # 3 pools were asked for: whole shards of 2
    pool = next(iter(read_ranked_pools(shared.pool.folder, shared.scores["plain"], 0)))
    order = sorted(range(4), key=lambda i: -pool.scores[i])
    vae = load_pipeline(shared.model).vae

    def channels(i):
        image = torch.from_numpy(np.asarray(decode_image(pool.images[i])).copy()).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            latents = vae.encode(image).latent_dist.mean * vae.config.scaling_factor
        return latents.mean(dim=(2, 3))[0], latents.std(dim=(2, 3))[0]

    for n in (2, 4):
        expected = [1 - torch.cosine_similarity(a, b, dim=0).item()
                    for a, b in zip(channels(order[0]), channels(order[n - 1]), strict=True)]
        np.testing.assert_allclose(distances[0, n - 2], expected, atol=1e-4)
    np.testing.assert_allclose(result["latent_distance"]["plain"]["means"], distances[..., 0].mean(axis=0))


# -- verdicts


@pytest.mark.parametrize(("interval", "above", "verdict"), [
    ((1.0, 0.5, 1.5), True, "holds"), ((-1.0, -1.5, -0.5), True, "opposite"), ((1.0, -0.5, 1.5), True, "not shown"),
    ((-1.0, -1.5, -0.5), False, "holds"), ((1.0, 0.5, 1.5), False, "opposite"), ((-1.0, -1.5, -0.5), None, "holds"),
    ((None, None, None), True, "not shown"), ((0.0, 0.0, 0.0), True, "not shown")])
def test_a_verdict_follows_from_the_interval(interval, above, verdict):
    assert Claim("plain", "", "", "", Estimate(*interval), above).verdict == verdict


def test_the_trends_are_computed_from_the_right_arms(finished):
    ablation, result = finished
    claims = {(claim["world"], claim["text"]): claim for claim in result["claims"]
              if "win rate" not in claim["measured"] or claim["measured"].endswith("by pickscore")}
    rate = {arm["label"]: arm["win_rate"]["pickscore"]["value"] for arm in result["arms"] if arm["world"] == "plain"}
    larger = claims["plain", "a larger pool helps"]
    assert larger["measured"] == "win rate at N 4 minus at 2, by pickscore"
    assert larger["estimate"]["value"] == pytest.approx(100 * (rate["N-4"] - rate["N-2"]))
    worse = claims["plain", "a worse loser helps"]["estimate"]["value"]
    assert worse == pytest.approx(100 * (rate["N-4"] - rate["N-4-L-2"]))
    more = claims["plain", "more triplets help"]["estimate"]["value"]
    assert more == pytest.approx(100 * (rate["N-4"] - rate["N-4-D-2"]))
    assert ("tinted", "a larger pool helps") not in claims
    for world in ("plain", "tinted"):
        assert {(world, "LAN removes colour shift"), (world, "SML removes colour shift"),
                (world, "a larger beta shifts colours less")} <= set(claims)
