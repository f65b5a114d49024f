"""Pairs of others through latents into DPO, on the figures world's target."""

import numpy as np
import pytest
from pair_files import pair, pair_stage, write_parquet

from hgdpo_core.config import DpoConfig, TargetConfig
from hgdpo_core.config.pair_source import PairSource
from hgdpo_core.errors import InputError
from hgdpo_core.execution.runner import IN_PROCESS
from hgdpo_core.figures import caption, render
from hgdpo_core.figures.dataset import sample_figures
from hgdpo_core.images import decode_image, encode_image
from hgdpo_core.models import find_model
from hgdpo_core.stages.latents import LatentStage
from hgdpo_core.storage import DryStore, Store
from hgdpo_core.training.tune import tune

SIZE = (64, 64)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Drawn figures; losers lack a limb. The third shard holds ties alone."""
    rows = []
    for number, figure in enumerate(sample_figures("train", 6, np.random.default_rng(0))):
        good, bad = (encode_image(np.asarray(render(figure, number, defect=defect)), "png")
                     for defect in (None, "missing_limb"))
        winner = number % 2
        rows.append(pair(number, winner if number < 4 else None, caption=caption(figure),
                         jpg_0=bad if winner else good, jpg_1=good if winner else bad))
    return PairSource(source=str(write_parquet(tmp_path_factory.mktemp("pairs"), rows)), rows_per_shard=2)


def test_two_steps_of_dpo_where_foreign_triplets_are_allowed(source, tmp_path):
    store = Store(str(tmp_path))
    model = find_model(TargetConfig(source="figures", dtype="float32"))
    pairs = pair_stage(store, source, SIZE)
    latents = LatentStage.of(pairs, model, flips=True)
    assert IN_PROCESS.make([pairs, latents]) == [3, 3]
    assert (latents.folder.config["width"], latents.folder.config["height"]) == SIZE
    assert latents.folder.read(2).num_rows == 0 and latents.folder.read(0).num_rows == 2
    config = DpoConfig(max_steps=2, batch_size=2, learning_rate=1e-3, mixed_precision="no", lambda_stat=0.0, flip=True)
    with pytest.raises(InputError, match=r"was made by model foreign:.* set dpo.allow_foreign_triplets"):
        tune("dpo", model, latents.folder, latents.indices, config, pairs.folder.key)
    allowed = config.model_copy(update={"allow_foreign_triplets": True})
    tuned = tune("dpo", model, latents.folder, latents.indices, allowed, pairs.folder.key)
    assert [row["step"] for row in tuned.log] == [1, 2] and np.isfinite(tuned.log[-1]["loss"])


def test_a_winner_is_the_drawing_without_a_defect(source, tmp_path):
    stage = pair_stage(Store(str(tmp_path)), source, SIZE)
    IN_PROCESS.make([stage])
    figures = sample_figures("train", 6, np.random.default_rng(0))
    for index in (0, 1):
        for number, row in enumerate(stage.folder.read(index).to_pylist(), start=2 * index):
            assert np.array_equal(decode_image(row["jpg_0"]), render(figures[number], number))


def test_a_plan_counts_them_and_writes_nothing(source, tmp_path):
    stage = pair_stage(DryStore(str(tmp_path / "root")), source, SIZE)
    assert stage.units(stage.indices, []) == {0: 2, 1: 2, 2: 2}
    assert not (tmp_path / "root").exists() and stage.find_missing() == [0, 1, 2]
