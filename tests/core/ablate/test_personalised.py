"""Table 4: personalised models over several trainings, and what their intervals are made of."""

import numpy as np
import pytest
import tiny_adapters
from diffusers import UNet2DConditionModel

from hgdpo_core.ablate.conclude import run_ablation
from hgdpo_core.ablate.cost import plan_ablation
from hgdpo_core.ablate.personal import Personal
from hgdpo_core.ablate.program import open_ablation
from hgdpo_core.errors import ConfigError, InputError, ModelError
from hgdpo_core.statistics.clusters import Clusters
from hgdpo_core.storage.shards import ShardFolder


@pytest.fixture
def inputs(tmp_path, target_folder, judge_folder, monkeypatch):
    (tmp_path / "prompts.txt").write_text("".join(f"a woman in a red top, number {i}\n" for i in range(4)))
    (tmp_path / "held-out.txt").write_text("a man in a blue top\na girl waves\n")
    (tmp_path / "concept-prompts.txt").write_text("{person} waves\n{person} in a park\n{person} at night\n")
    tiny_adapters.save_encoder(tmp_path / "image_encoder")
    unet = UNet2DConditionModel.from_pretrained(target_folder / "unet")
    adapter = tiny_adapters.save_ip_adapter(tmp_path / "plain.safetensors", unet, "plain")
    concepts = {"source": str(tiny_adapters.save_people(tmp_path / "people", 3)), "margin": 0.2,
                "personaliser": {"source": str(adapter), "crop": None},
                "judges": tiny_adapters.colour_judge(monkeypatch, tmp_path)}
    return {
        "root": str(tmp_path / "root"), "target": str(target_folder), "prompts": str(tmp_path / "prompts.txt"),
        "settings": {"seeds": 2, "worlds": ["plain"], "comparisons": ["personalised"]},
        "overrides": {
            "ablation.concepts": concepts,
            "ablation.concept_prompts": {"source": str(tmp_path / "concept-prompts.txt")},
            "target.dtype": "float32", "scorer.source": str(judge_folder), "ablation.distance_pools": 2,
            "evaluation.scorers": [{"name": "pickscore", "source": str(judge_folder)}],
            "evaluation.prompts": {"source": str(tmp_path / "held-out.txt")}, "sampler.width": 32, "sampler.height": 32,
            "sampler.steps": 1, "sampler.guidance_scale": 1.0, "pool.images_per_prompt": 2, "dpo.max_steps": 2,
            "dpo.batch_size": 2, "dpo.learning_rate": 5e-2, "dpo.mixed_precision": "no", "dpo.optimizer": "adamw"}}


def test_table_4(inputs):
    ablation = open_ablation(**inputs)
    assert [table.number for table in ablation.tables] == ["4"] and len(ablation.people.concepts) == 3
    assert plan_ablation(ablation)["evaluation_images"] == 2 * 3 + 9 * 4
    result = run_ablation(ablation)
    found = result["personalised"]
    assert (found["people"], found["prompts"], found["samples"], found["margin"]) == (3, 3, 9, 0.2)
    assert 0 <= found["win_rate"]["pickscore"]["value"] <= 1 and set(found["identity"]) == {"figures"}
    table = next(table for table in result["tables"] if table["title"].startswith("Table 4"))
    rows = {row[0]: row[1:] for row in table["rows"]}
    assert set(rows) == {"PickScore", "Colours"} and rows["PickScore"][-1] == "89.25"
    assert len(rows["Colours"][1].split(", ")) == 2  # one rate per training
    pools = {tuple(sorted(row["concept"] for row in rows)) for rows in _pools(ablation.run.store)}
    assert pools == {tuple(sorted([person.id for person in ablation.people.concepts] * 3))}
    assert len(list(_pools(ablation.run.store))) == 4  # target on and off, and two trainings
    assert run_ablation(open_ablation(**inputs))["personalised"] == found


def _pools(store):
    for name in store.list_folders("pools"):
        folder = ShardFolder.open(store, f"pools/{name}")
        rows = [row for index in folder.manifests() for row in folder.read(index).to_pylist() if row.get("concept")]
        if rows:  # the target's pool without the adapter holds images of plain prompts too
            yield rows


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"ablation.concepts": None}, ConfigError, "needs people and an adapter: set ablation.concepts"),
    ({"ablation.concepts": {"source": "x", "judges": "sface"}}, ConfigError, "concepts.personaliser"),
    ({"ablation.concepts": {"source": "x", "judges": "sface", "personaliser": {"source": "none"}}}, ModelError,
     "does not exist: expected an IP-Adapter"),
    ({"ablation.concept_prompts": {"source": "PROMPTS"}}, InputError, "occur in training"),
])
def test_what_is_refused(changes, error, message, inputs):
    changes = {name: {"source": inputs["prompts"]} if value == {"source": "PROMPTS"} else value
               for name, value in changes.items()}
    with pytest.raises(error, match=message) as caught:
        open_ablation(**{**inputs, "overrides": {**inputs["overrides"], **changes}})
    assert "\n" not in str(caught.value)


def personal(nearer, control, people, prompts, margin=0.075):
    nearer = np.asarray(nearer, dtype=float)
    return Personal({"clip": nearer}, {"sface": nearer}, {"sface": np.asarray(control, dtype=float)[None]},
                    {"sface": 0}, Clusters.of(people), Clusters.of(prompts), margin)


def test_intervals_resample_people_prompts_and_trainings():
    rng = np.random.default_rng(0)
    grid = np.indices((20, 20)).reshape(2, -1)
    noise = rng.normal(size=(3, 400))
    alone = personal(noise, np.ones(400), *grid).rate(noise)
    assert alone.ci_low < 0.5 < alone.ci_high and alone.value == pytest.approx((noise > 0).mean())
    for effect in (rng.normal(size=20)[grid[0]], rng.normal(size=20)[grid[1]], rng.normal(size=(3, 1))):
        shifted = noise + 2 * effect
        wide = personal(shifted, np.ones(400), *grid).rate(shifted)
        assert wide.ci_high - wide.ci_low > 1.5 * (alone.ci_high - alone.ci_low)
    missing = noise.copy()
    missing[:, ::2] = np.nan
    assert personal(missing, np.ones(400), *grid).rate(missing).value == pytest.approx((noise[:, 1::2] > 0).mean())
    assert personal(0 * noise, np.ones(400), *grid).rate(0 * noise).value is None


def test_a_verdict_needs_a_control():
    grid = np.indices((30, 30)).reshape(2, -1)
    even = np.where((grid[0] + grid[1]) % 2, 1.0, -1.0)
    nearer = np.stack([even, -even])
    works = personal(nearer, np.ones(900), *grid, margin=0.1)
    assert works.verdict("sface") == "kept"
    assert personal(np.ones((2, 900)), np.ones(900), *grid).verdict("sface") == "changed"
    fails = personal(nearer, np.where(np.arange(900) % 4, 1.0, -1.0), *grid, margin=0.1)  # 75 %
    assert fails.verdict("sface") is None
