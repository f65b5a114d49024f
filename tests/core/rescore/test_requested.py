"""The requested scorers: by name, by preset, by the runs of a root."""

import os

import pytest

from hgdpo_core.config import ScorerConfig, WorkersConfig
from hgdpo_core.config.presets import figures
from hgdpo_core.errors import ConfigError
from hgdpo_core.rescore.requested import RequestedScorer, requested_scorers, requested_workers
from hgdpo_core.storage import Store


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path))


def save_run(store, name, *, source, started):
    config = figures()
    scorer = config.scorer.model_copy(update={"source": source})
    config = config.model_copy(update={"scorer": scorer})
    store.write_json(f"runs/{name}/config.json", {"code_version": "0", **config.model_dump(mode="json")})
    os.utime(store.local_path(f"runs/{name}/config.json"), (started, started))


def test_a_name_means_the_scorer_of_the_run_started_last(store):
    assert requested_scorers(store) == []
    save_run(store, "a", source="/judges/new", started=2000)
    save_run(store, "b", source="/judges/old", started=1000)
    store.write_bytes("runs/c/config.json", b'{"scorer": "of another version"}')
    assert [(item.scorer.name, item.scorer.source, item.pools) for item in requested_scorers(store)] == [
        ("pickscore", "/judges/new", "all"), ("inspector", "figures", "evaluation")]
    assert requested_scorers(store, names=["pickscore"])[0].scorer.source == "/judges/new"
    assert requested_scorers(store, names=["pickscore=/mine"]) == [RequestedScorer(scorer=ScorerConfig(source="/mine"))]
    assert requested_scorers(store, names=["inspector"])[0].pools == "all"     # named: for every pool


def test_where_runs_use_a_scorer_differently_it_is_for_all_pools(store):
    config = figures()
    inspector = next(scorer for scorer in config.evaluation.scorers if scorer.name == "inspector")
    judging = config.evaluation.model_copy(update={"scorers": (config.scorer,)})
    for name, changed in (("a", {"scorer": inspector, "evaluation": judging}), ("b", {})):
        store.write_json(f"runs/{name}/config.json", config.model_copy(update=changed).model_dump(mode="json"))
        os.utime(store.local_path(f"runs/{name}/config.json"), (1000, 1000 + ord(name)))
    assert {item.scorer.name: item.pools for item in requested_scorers(store)} == {
        "inspector": "all", "pickscore": "all"}
    store.delete("runs/b/config.json")
    assert {item.scorer.name: item.pools for item in requested_scorers(store)} == {
        "inspector": "training", "pickscore": "evaluation"}


def test_a_preset_counts_before_the_runs_and_takes_overrides(store):
    save_run(store, "a", source="/judges/new", started=2000)
    assert [item.scorer for item in requested_scorers(store, preset="figures")] == list(figures().evaluation.scorers)
    changed = requested_scorers(store, preset="figures", overrides={"scorer.batch_size": 3})
    assert changed[0].scorer == figures().scorer.model_copy(update={"batch_size": 3})
    assert requested_scorers(store, preset="sd15")[0].scorer.name == "pickscore"   # no model, no prompts needed


def test_work_is_divided_by_the_preset_or_the_latest_run(store):
    assert requested_workers(store, None) == WorkersConfig()
    for name, shards in (("a", 3), ("b", 5)):
        config = figures().model_copy(update={"workers": WorkersConfig(score_images_per_run=shards)})
        store.write_json(f"runs/{name}/config.json", config.model_dump(mode="json"))
        os.utime(store.local_path(f"runs/{name}/config.json"), (1000, 1000 + shards))
    store.write_bytes("runs/c/config.json", b"{}")
    assert requested_workers(store, None).score_images_per_run == 5
    assert requested_workers(store, "figures", {"workers.score_images_per_run": 7}).score_images_per_run == 7


def test_names_without_a_store_mean_the_public_checkpoint():
    assert requested_scorers(None, names=["pickscore"]) == [RequestedScorer(scorer=ScorerConfig(name="pickscore"))]
    assert requested_scorers(None) == []


@pytest.mark.parametrize(("arguments", "message"), [
    ({"names": ["beauty"]}, "scorer 'beauty': name: there is no such scorer; there are aesthetic, clip"),
    ({"names": ["pickscore", "pickscore=/b"]}, "pickscore is named twice"),
    ({"preset": "flux"}, "no preset 'flux'"),
    ({"overrides": {"scorer.batch_size": 3}}, "name the preset"),
    ({"preset": "figures", "overrides": {"scorer.size": 3}}, "is not a setting"),
])
def test_mistakes_are_one_line(store, arguments, message):
    with pytest.raises(ConfigError, match=message) as error:
        requested_scorers(store, **arguments)
    assert "\n" not in str(error.value)
