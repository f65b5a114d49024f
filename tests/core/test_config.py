"""Settings: the presets are complete and the paper's; a mistake is one readable line."""

import hashlib
from typing import Annotated

import pytest

from hgdpo_core.config import DpoConfig, PoolConfig, RunConfig, SftConfig, WorkersConfig
from hgdpo_core.config.base import ADDED, apply_overrides, canonical_json, content_hash
from hgdpo_core.config.presets import PRESETS, build_config, describe_presets, figures, sd15
from hgdpo_core.errors import ConfigError


def test_json_round_trip():
    for config in (figures(), sd15("a/b", "p.txt")):
        assert RunConfig.model_validate_json(config.model_dump_json()) == config


def test_sd15_is_the_papers():
    config = sd15("somebody/model", "prompts.txt")
    assert (config.pool.images_per_prompt, config.dpo.beta, config.dpo.lambda_stat) == (20, 2500.0, 10_000.0)
    assert (config.sampler.width, config.sampler.height, config.sampler.steps) == (704, 1024, 50)
    assert (config.sampler.guidance_scale, config.evaluation.lora_weight) == (5.0, 0.5)
    assert (config.dpo.lora_rank, config.dpo.learning_rate, config.dpo.batch_size) == (8, 1e-5, 4)
    assert (config.dpo.optimizer, config.dpo.adam_betas) == ("adam8bit", (0.9, 0.999))
    assert config.evaluation.prompts.category == "People"
    assert [scorer.name for scorer in config.evaluation.scorers] == [
        "pickscore", "hps_v2.0", "imagereward", "aesthetic", "clip"]


def test_the_training_scorer_is_identified_by_name_and_weights():
    config = figures()
    assert config.training_scorer == "pickscore"
    other = config.scorer.model_copy(update={"source": "somewhere/else"})
    assert config.model_copy(update={"scorer": other}).training_scorer is None
    slower = config.scorer.model_copy(update={"batch_size": 1})
    assert config.model_copy(update={"scorer": slower}).training_scorer == "pickscore"


def test_overrides_reach_their_setting_and_are_checked():
    config = apply_overrides(figures(), {"dpo.beta": 100, "triplets.loser_rank": 5})
    assert (config.dpo.beta, config.triplets.loser_rank) == (100.0, 5)
    assert content_hash(config) != content_hash(figures())
    assert apply_overrides(figures(), {"licence": "cc-by-4.0"}).licence == "cc-by-4.0"
    with pytest.raises(ConfigError, match="licence"):
        apply_overrides(figures(), {"licence": "mine\ntags: [x]"})


def test_scorers_may_be_given_by_name():
    for value in ("pickscore=my/judge, clip", ["pickscore=my/judge", {"name": "clip"}]):
        scorers = apply_overrides(sd15("a/b", "p.txt"), {"evaluation.scorers": value}).evaluation.scorers
        assert [(scorer.name, scorer.source) for scorer in scorers] == [("pickscore", "my/judge"), ("clip", None)]


@pytest.mark.parametrize(("overrides", "message"), [
    ({"evaluation.scorers": "pickscore,beauty"}, r"scorers.1.name: there is no such scorer; .*\(got 'beauty'\)"),
    ({"evaluation.scorers": 3}, "evaluation.scorers"),
    ({"dpo.bata": 1}, "'dpo.bata' is not a setting; choose one of: .*beta"),
    ({"nothing.here": 1}, "is not a setting"),
    ({"dpo.beta": -1}, "dpo.beta: Input should be greater than 0 .got -1"),
    ({"sampler.width": 100}, "sampler.width: Input should be a multiple of 8"),
    ({"triplets.loser_rank": 21}, "only 20 images of a pool are ranked: .* or a larger pool.images_per_prompt"),
    ({"triplets.pool_size": 21}, "a pool holds only 20 images"),
    ({"triplets.pool_size": 5, "triplets.loser_rank": 6}, "only 5 images of a pool are ranked: .* triplets.pool_size"),
    ({"pool.images_per_prompt": 1}, "a winner and a loser need at least 2"),
    ({"dpo.learning_rate": float("nan")}, "dpo.learning_rate"),
    ({"evaluation.scorers": []}, "evaluation.scorers"),
    ({"evaluation.scorers": [{"name": "pickscore"}, {"name": "pickscore"}]}, "name each once"),
])
def test_mistakes_are_one_line(overrides, message):
    with pytest.raises(ConfigError, match=message) as error:
        apply_overrides(figures(), overrides)
    assert "\n" not in str(error.value)


def test_unknown_presets_and_missing_parts():
    with pytest.raises(ConfigError, match="no preset 'flux'; there are figures, sd15, sdxl"):
        build_config("flux")
    with pytest.raises(ConfigError, match="give target and prompts"):
        build_config("sd15")


def test_a_preset_that_is_listed_is_known_by_its_name(monkeypatch):
    def small(target: str | None = None, prompts: str | None = None) -> RunConfig:
        """Quick to try."""
        return figures(target, prompts).model_copy(update={"preset": "small"})

    monkeypatch.setitem(PRESETS, "small", small)
    assert build_config("small", target="mine", images="folder").preset == "small"
    assert describe_presets().startswith("figures: built in, on a CPU in minutes; sd15: the paper's settings")
    assert describe_presets().endswith("; small: quick to try")


def test_the_users_own_target_is_not_tuned_on_the_presets_images():
    assert build_config("figures", target="mine").images is None
    assert build_config("figures", target="mine", images="folder").images == "folder"
    assert build_config("figures").images == "figures"


def test_trained_models_keep_their_ids():
    """Computed by the code before there was a `flip`: a setting added later counts only where it is used."""
    configs = (DpoConfig(batch_size=4, learning_rate=1e-5), SftConfig(batch_size=16, learning_rate=1e-5))
    assert [content_hash(config.identity()) for config in configs] == ["39ccec8cd81a", "093a7346b64f"]
    assert configs[0].model_copy(update={"flip": True}).identity()["flip"] is True
    noted = configs[0].model_copy(update={"log_every": 9, "checkpoint_every": 7})
    assert noted.identity() == configs[0].identity()


WITHOUT_GLOBAL_BATCH = {"dpo.global_batch_size": None, "sft.global_batch_size": None}
"""The preset sd15 before it named the batch of a step, which then depended on the number of GPUs."""


def test_runs_keep_their_ids():
    """Golden values from the code that listed settings by name; workers' settings never enter."""
    tuned_here = figures().model_copy(update={"workers": WorkersConfig(open_runs=9)})
    assert content_hash(figures().identity("run")) == content_hash(tuned_here.identity("run")) == "aa83f51ac5b4"
    before = apply_overrides(sd15("t", "p"), WITHOUT_GLOBAL_BATCH)
    assert content_hash(before.identity("run")) == "b98fcb4354e0"


class _Later(DpoConfig):
    gamma: Annotated[float, ADDED] = 1.0


def test_a_setting_added_with_a_default_leaves_earlier_ids():
    earlier, later = DpoConfig(batch_size=4, learning_rate=1e-5), _Later(batch_size=4, learning_rate=1e-5)
    for of in ("result", "run"):
        assert later.identity(of) == earlier.identity(of)
        assert later.model_copy(update={"gamma": 2.0}).identity(of) == {**earlier.identity(of), "gamma": 2.0}


def test_a_nested_setting_enters_by_its_own_definition():
    run = figures()
    nested = run.model_copy(update={"dpo": _Later(**run.dpo.model_dump())})
    assert nested.identity("run") == run.identity("run")
    assert run.identity()["evaluation"]["scorers"] == [{"name": "pickscore", "dtype": "float32"},
                                                       {"name": "inspector", "dtype": "float32"}]
    assert run.identity("run")["evaluation"]["scorers"] == run.model_dump(mode="json")["evaluation"]["scorers"]


def test_settings_come_back_from_a_record_that_holds_their_identity():
    pool = PoolConfig(images_per_prompt=7, batch_size=3, image_format="webp")
    record = {"stage": "pool", "batch_size": "of no identity", **pool.identity()}
    assert PoolConfig.from_identity(record, batch_size=3) == pool


@pytest.mark.parametrize("value", [[], ["a"], ["a", 'ü"\n'], [(1, "b"), (2, "c")], [{"b": 1, "a": [1, 2]}], {"a": 1}])
def test_a_list_is_hashed_as_its_one_text(value):
    assert content_hash(value, 64) == hashlib.sha256(canonical_json(value).encode()).hexdigest()


@pytest.mark.parametrize(("overrides", "message"), [
    ({"dpo.adam_betas": [2, 3]}, "dpo.adam_betas"), ({"dpo.adam_betas": [0.9, 1]}, "dpo.adam_betas"),
    ({"dpo.seed": 2**65}, "dpo.seed"), ({"pool.seed": 2**63}, "pool.seed"), ({"evaluation.seed": 2**63}, "seed"),
    ({"dpo.learning_rate": 1e308}, "dpo.learning_rate"), ({"sft.weight_decay": 1e308}, "sft.weight_decay"),
    ({"dpo.beta": True}, "expected float, not true or false"), ({"pool.images_per_prompt": True}, "expected int"),
    ({"dpo.beta": 1e308}, "dpo.beta"), ({"evaluation.lora_weight": 1e300}, "evaluation.lora_weight"),
    ({"dpo.lora_rank": 2**31}, "dpo.lora_rank"),
    ({"preset": "x"}, "would only rename what runs: name it with --preset"),
])
def test_settings_have_bounds(overrides, message):
    with pytest.raises(ConfigError, match=message) as error:
        apply_overrides(build_config("figures"), overrides)
    assert "\n" not in str(error.value)


def test_a_global_batch_determines_the_accumulation():
    sd15 = build_config("sd15", target="a/b", prompts="p.txt")
    assert (sd15.dpo.global_batch_size, sd15.sft.global_batch_size) == (16, 16)
    with pytest.raises(ConfigError, match="gradient_accumulation_steps is 4, but it follows from global_batch_size"):
        apply_overrides(sd15, {"dpo.gradient_accumulation_steps": 4})
    free = apply_overrides(sd15, {"dpo.gradient_accumulation_steps": 4, "dpo.global_batch_size": None})
    assert "global_batch_size" not in free.dpo.identity()  # ids of models trained before it existed


def test_a_part_of_a_stages_settings_leaves_the_others():
    figures = build_config("figures")
    config = apply_overrides(figures, {"dpo": {"beta": 5}, "pool": {"seed": 3}, "evaluation": {"seed": 4}})
    assert config.dpo == figures.dpo.model_copy(update={"beta": 5.0})
    assert config.pool == figures.pool.model_copy(update={"seed": 3}) and config.evaluation.seed == 4
    replaced = apply_overrides(build_config("sd15", target="a/b", prompts="p.txt"),
                               {"evaluation.prompts": {"source": "e.txt"}}).evaluation.prompts
    assert replaced.source == "e.txt" and replaced.category is None


def test_a_scorer_is_named_as_in_an_evaluation():
    scorer = apply_overrides(build_config("figures"), {"scorer": "clip=my/folder"}).scorer
    assert (scorer.name, scorer.source) == ("clip", "my/folder")


def test_what_was_given_as_a_text_can_be_varied_further():
    config = apply_overrides(figures(), {"pairs": "owner/pairs", "pairs.human_only": True, "pairs.limit": 5})
    assert (config.pairs.source, config.pairs.human_only, config.pairs.limit) == ("owner/pairs", True, 5)
    scorer = apply_overrides(figures(), {"scorer": "clip=my/folder", "scorer.batch_size": 4}).scorer
    assert (scorer.name, scorer.source, scorer.batch_size) == ("clip", "my/folder", 4)
    with pytest.raises(ConfigError, match=r"override 'pairs.limit' needs pairs, which is not set: set pairs first"):
        apply_overrides(figures(), {"pairs.limit": 5})
    with pytest.raises(ConfigError, match="override 'pairs.size.x' is not a setting"):
        apply_overrides(figures(), {"pairs": "owner/pairs", "pairs.size.x": 5})
