"""A study from evaluations, runs and triplets: what is written, what is refused, and that nothing gives models away."""

import io
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from study_cases import PROMPTS, copy_kept_store, encoded, make_evaluation, make_pool, make_study

from flows.cli import main
from hgdpo_core.config.study import StudyConfig
from hgdpo_core.errors import ConfigError, InputError
from hgdpo_core.images import decode_image
from hgdpo_core.prompts import Sample
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder, read_table
from hgdpo_core.study.create import OTHER_SIZE, SAME_IMAGE, UNREADABLE, create_study
from hgdpo_core.study.sources import NO_IMAGE, NO_PROMPT, NOT_WINNER, OTHER_SEED, open_sources
from hgdpo_core.study.study import StudyImages, make_noise, open_study
from hgdpo_core.study.votes import PAIRS


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "root"))


def create(store, *sources, **settings):
    return create_study(store, StudyConfig.model_validate({"sources": sources, **settings}))


def pairs_of(study):
    return read_table(study.store, f"{study.key}/pairs.parquet")


def test_samples_of_several_people_are_told_apart(store):
    samples = [Sample("a woman", person * 16) for person in "abc"]
    key = make_evaluation(store, prompts=samples)
    config = store.read_json(f"{key}/config.json")
    store.write_json(f"{key}/config.json", {**config, "concepts": [sample.concept for sample in samples]})
    source, = open_sources(store, [key])
    pairs = list(source.read(source.keys()))
    assert [pair.prompt for pair in pairs] == ["a woman"] * 3 and len({pair.prompt_id for pair in pairs}) == 3
    assert len({pair.images for pair in pairs}) == 3


def test_an_evaluation_becomes_pairs_of_its_two_models(store):
    make_evaluation(store)
    created = create(store, "12-a")
    table = pairs_of(created.study)
    assert table.schema == PAIRS and table.num_rows == 12 and created.refused == {} and not created.existing
    rows = table.to_pylist()
    assert {row["prompt"] for row in rows} == set(PROMPTS)
    assert {(row["first"], row["second"]) for row in rows} == {("target", "tuned")}
    assert all(row["first_scores"] == [("pickscore", 0.25)] and row["second_scores"] == [("pickscore", 0.75)]
               for row in rows)
    for row in rows:
        shade = 20 * PROMPTS.index(row["prompt"])
        assert [np.asarray(decode_image(row[side]))[0, 0, 0] for side in ("first_image", "second_image")] == [
            shade % 256, (shade + 9) % 256]
    config = store.read_json(f"{created.study.key}/config.json")
    assert config["config"]["sources"] == ["evaluations/12-a"] and config["pairs"] == 12 and config["refused"] == {}


def test_both_sides_are_encoded_alike_and_hold_nothing_but_pixels(store):
    exif = Image.Exif()
    exif[0x010E] = "made by the tuned model"
    pools = [make_pool(store, name, {PROMPTS[0]: image}) for name, image in (
        ("a", encoded(1)), ("b", encoded(2, kind="JPEG", exif=exif.tobytes())))]
    make_evaluation(store, target=pools[0], tuned=pools[1], prompts=PROMPTS[:1])
    row = pairs_of(create(store, "12-a").study).to_pylist()[0]
    for side in ("first_image", "second_image"):
        image = Image.open(io.BytesIO(row[side]))
        assert image.format == "WEBP" and not image.info.get("exif") and b"tuned" not in row[side]
    assert len(row["pair"]) == 32


def test_ids_are_random_and_the_same_settings_are_the_same_study(store):
    make_evaluation(store)
    first, again = create(store, "12-a"), create(store, "evaluations/12-a")
    assert again.existing and again.study == first.study
    other = create(store, "12-a", seed=1)
    assert other.study.id != first.study.id
    assert not {pair.pair for pair in other.study.pairs} & {pair.pair for pair in first.study.pairs}


def test_pairs_are_drawn_by_the_seed(store):
    make_evaluation(store)
    drawn = [{pair.prompt for pair in create(store, "12-a", pairs=5, seed=seed).study.pairs} for seed in range(4)]
    assert all(len(prompts) == 5 for prompts in drawn) and len(set(map(frozenset, drawn))) > 1


def test_what_cannot_be_compared_is_refused_by_reason_and_replaced(store):
    images = {prompt: encoded(20 * i) for i, prompt in enumerate(PROMPTS)}
    others = {prompt: encoded(20 * i + 5) for i, prompt in enumerate(PROMPTS)}
    others[PROMPTS[0]] = images[PROMPTS[0]]
    others[PROMPTS[1]] = encoded(1, size=(8, 8))
    others[PROMPTS[2]] = b"no image"
    del others[PROMPTS[3]]
    prompts = [*PROMPTS, "  "]
    make_evaluation(store, target=make_pool(store, "a", images), tuned=make_pool(store, "b", others), prompts=prompts)
    created = create(store, "12-a", pairs=8)
    assert len(created.study.pairs) == 8
    everything = create(store, "12-a", pairs=40)
    assert everything.refused == {SAME_IMAGE: 1, OTHER_SIZE: 1, UNREADABLE: 1, NO_IMAGE: 1, NO_PROMPT: 1}
    assert len(everything.study.pairs) == 8
    assert create(store, "12-a", pairs=40).refused == everything.refused, "also when it was there already"


def test_other_seeds_are_no_comparison(store):
    pools = [make_pool(store, name, {PROMPTS[0]: encoded(shade)}, seed=seed)
             for name, shade, seed in (("a", 1, 1), ("b", 2, 2))]
    make_evaluation(store, target=pools[0], tuned=pools[1], prompts=PROMPTS[:1])
    with pytest.raises(InputError, match=f"no pair of evaluations/12-a can be compared.*{OTHER_SEED}"):
        create(store, "12-a")
    assert store.list_folders("studies") == []


def test_several_models_on_the_same_prompts(store):
    """One model against two others, as in the paper's Figure 3."""
    ours = make_pool(store, "ours", {prompt: encoded(20 * i + 3) for i, prompt in enumerate(PROMPTS)})
    make_evaluation(store, "12-a", tuned=ours)
    make_evaluation(store, "12-b", tuned=ours)
    study = create(store, "12-a", "12-b", pairs=10).study
    assert study.models == ["target of 12-a", "target of 12-b", "tuned"]
    assert set(Counter(pair.prompt for pair in study.pairs).values()) == {2}, "the same prompts for all"
    assert Counter(pair.first for pair in study.pairs) == {"target of 12-a": 5, "target of 12-b": 5}


def test_a_run_stands_for_its_evaluation(store):
    make_evaluation(store)
    store.write_json("runs/mine-1/config.json", {})
    with pytest.raises(InputError, match="mine-1 in .* is not finished"):
        create(store, "mine-1")
    store.write_json("runs/mine-1/summary.json", {"evaluation_id": "12-a"})
    assert create(store, "mine-1").study == create(store, "12-a").study
    with pytest.raises(ConfigError, match="name each once"):
        create(store, "mine-1", "12-a")


@pytest.mark.parametrize("name", ["nothing", "pools/target-12-a", "../12-a", "", "evaluations/", "triplets/12-a"])
def test_a_source_that_is_none_is_named_with_those_there_are(store, name):
    make_evaluation(store)
    with pytest.raises((InputError, ConfigError)) as refused:
        create(store, name)
    assert "\n" not in str(refused.value) and ("12-a" in str(refused.value) or "object key" in str(refused.value))


# -- triplets


def make_triplets(store, rows):
    schema = pa.schema([
        ("jpg_0", pa.binary()), ("jpg_1", pa.binary()), ("label_0", pa.float64()), ("caption", pa.string()),
        ("prompt_id", pa.string()), ("winner_score", pa.float32()), ("loser_score", pa.float32())])
    ShardFolder.create(store, "scores/p/imagereward-1", {"scorer": "imagereward"})
    folder = ShardFolder.create(store, "triplets/3-a", {"stage": "triplets", "scores": "scores/p/imagereward-1"})
    defaults = {"jpg_0": encoded(10), "jpg_1": encoded(20), "label_0": 1.0, "caption": "a nun", "prompt_id": "1",
                "winner_score": 2.0, "loser_score": 1.0}
    for index in range(2):
        folder.commit(index, pa.Table.from_pylist([{**defaults, **row} for row in rows[index::2]], schema=schema))


def test_winners_and_losers_of_triplets(store):
    make_triplets(store, [{"prompt_id": str(i)} for i in range(5)] + [{"label_0": 0.5}, {"caption": " "},
                                                                       {"winner_score": None, "prompt_id": "x"}])
    with pytest.raises(InputError, match="triplets/3-a in .* is not finished"):
        create(store, "3-a")
    store.write_bytes("triplets/3-a/README.md", b"card")
    created = create(store, "3-a")
    assert created.study.models == ["loser", "winner"] and created.refused == {NOT_WINNER: 1, NO_PROMPT: 1}
    rows = {row["prompt_id"]: row for row in pairs_of(created.study).to_pylist()}
    assert rows["0"]["first_scores"] == [("imagereward", 2.0)] and rows["0"]["second_scores"] == [("imagereward", 1.0)]
    assert rows["x"]["first_scores"] == []


def test_a_real_root_of_an_earlier_version(tmp_path):
    """Columns and names as this project's own stages write them."""
    store = copy_kept_store(tmp_path / "store")
    for name, models in ((store.list_folders("evaluations")[0], ["target", "tuned"]),
                         (store.list_folders("triplets")[0], ["loser", "winner"])):
        created = create(store, name)
        assert created.study.models == models and created.study.pairs
        assert all(row["first_scores"][0][0] == "pickscore" for row in pairs_of(created.study).to_pylist())


# -- the study of a root


def test_the_only_study_need_not_be_named(tmp_path):
    with pytest.raises(InputError, match="holds 0 studies.*hgdpo study create"):
        open_study(Store(str(tmp_path / "root")))
    study = make_study(str(tmp_path / "root"))
    assert open_study(study.store) == open_study(study.store, study.id) == open_study(study.store, study.key) == study
    other = make_study(str(tmp_path / "root"), seed=3)
    with pytest.raises(InputError, match=f"holds 2 studies.*{other.id}"):
        open_study(study.store)
    with pytest.raises(InputError, match="nothing is not a study"):
        open_study(study.store, "nothing")


def test_noise_has_the_colours_of_its_picture_and_nothing_else(tmp_path):
    study = make_study(str(tmp_path / "root"))
    images = StudyImages.unpack(study, tmp_path)
    picture = images.path(study.pairs[0].pair, "first").read_bytes()
    noise = np.asarray(decode_image(make_noise(picture)))
    original = np.asarray(decode_image(picture))
    assert noise.shape == original.shape and not np.array_equal(noise, original)
    assert sorted(map(tuple, noise.reshape(-1, 3))) == sorted(map(tuple, original.reshape(-1, 3)))


def test_the_command_says_what_it_made_and_whom_to_ask(tmp_path, capsys):
    make_evaluation(Store(str(tmp_path / "root")))
    assert main(["study", "create", "12-a", "--root", str(tmp_path / "root"), "--people", "4", "--forced-choice"]) == 0
    output = capsys.readouterr().out
    study = open_study(Store(str(tmp_path / "root")))
    assert f"Study {study.id}: 12 pairs of target and tuned" in output and study.config.forced_choice
    assert "for 4 people, 14 questions and about 1 min each" in output and f"hgdpo study serve {study.id}" in output
    assert main(["study", "create", "12-a", "--root", str(tmp_path / "root"), "--checks", "2"]) == 2
    assert "checks: Input should be less than or equal to 0.5 (got 2.0)" in capsys.readouterr().err
