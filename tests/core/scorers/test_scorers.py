"""PickScore: the published arithmetic, and scores that depend on their own image and prompt alone."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TEXTS
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from hgdpo_core.config import PoolConfig, SamplerConfig, ScorerConfig, TargetConfig
from hgdpo_core.config.base import validate
from hgdpo_core.errors import ConfigError, ModelError
from hgdpo_core.models import find_model
from hgdpo_core.scorers import (
    SCORERS,
    defect_limit,
    find_scorer,
    load_configured_scorer,
    load_embedder,
    load_scorer,
    scorer_title,
)
from hgdpo_core.scorers.tinted import STRENGTH, warmth
from hgdpo_core.stages.base import Worker
from hgdpo_core.stages.pool import plan_pool
from hgdpo_core.stages.scores import ScoreStage, missing_scores, score_folder
from hgdpo_core.storage import Store

TOLERANCE = 1e-4  # of scores of order 1: float32 sums in another order


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40 + 9 * i, 60, 3), dtype=np.uint8)) for i in range(4)]


@pytest.fixture(scope="module")
def scorer(judge_folder):
    return load_scorer("pickscore", source=str(judge_folder))


def test_it_is_the_published_arithmetic(judge_folder, scorer, images):
    """The snippet of PickScore's model card, with transformers 5's names, one image at a time."""
    model = CLIPModel.from_pretrained(judge_folder).eval()
    processor = CLIPImageProcessorPil.from_pretrained(judge_folder)
    tokenizer = CLIPTokenizer.from_pretrained(judge_folder)
    expected = []
    with torch.no_grad():
        for image, text in zip(images, TEXTS, strict=True):
            inputs = tokenizer(text, padding=True, truncation=True, max_length=24, return_tensors="pt")
            image_embeds = model.get_image_features(**processor(image, return_tensors="pt")).pooler_output
            text_embeds = model.get_text_features(**inputs).pooler_output
            image_embeds = image_embeds / torch.norm(image_embeds, dim=-1, keepdim=True)
            text_embeds = text_embeds / torch.norm(text_embeds, dim=-1, keepdim=True)
            expected.append((model.logit_scale.exp() * (text_embeds @ image_embeds.T))[0, 0])
    torch.testing.assert_close(scorer.score(images, TEXTS), torch.stack(expected), rtol=0, atol=TOLERANCE)


def test_captions_differ(scorer):
    """A CLIP config with the default eos id pools the same token of every text: all captions would be one."""
    embeds = scorer.embed_texts(TEXTS)
    assert (embeds @ embeds.T - torch.eye(len(TEXTS))).max() < 0.99


def test_batch_order_and_kind_of_input_do_not_matter(scorer, images):
    square = [image.resize((32, 32)) for image in images]
    scores = scorer.score(square, TEXTS)
    assert scores.dtype == torch.float32 and scores.shape == (4,)
    one_by_one = torch.cat([scorer.score([image], [text]) for image, text in zip(square, TEXTS, strict=True)])
    backwards = scorer.score(square[::-1], TEXTS[::-1]).flip(0)
    arrays = np.stack([np.asarray(image) for image in square])
    for other in (one_by_one, backwards, scorer.score(arrays, TEXTS), scorer.score(torch.from_numpy(arrays), TEXTS)):
        torch.testing.assert_close(other, scores, rtol=0, atol=TOLERANCE)


def test_long_prompts_are_cut_and_counts_must_match(scorer, images):
    assert torch.isfinite(scorer.score(images[:1], ["word " * 500])).all()
    with pytest.raises(ValueError, match="got 1 images and 2 prompts"):
        scorer.score(images[:1], ["a", "b"])


def test_unknown_or_missing_scorers_are_one_line(tmp_path):
    with pytest.raises(ConfigError, match="there is no scorer 'beauty'; there are .*pickscore"):
        load_scorer("beauty")
    with pytest.raises(ModelError, match="does not exist"):
        load_scorer("pickscore", source=str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match="could not be downloaded") as error:
        load_scorer("pickscore")
    assert "\n" not in str(error.value)


def test_a_scorer_that_is_listed_is_a_setting_and_has_a_title(monkeypatch, scorer):
    toy = SimpleNamespace(NAME="toy", TITLE="Toy", locate=lambda source: ("weights",), load=lambda **_: scorer)
    with pytest.raises(ConfigError, match="there is no such scorer; there are .*pickscore"):
        validate(ScorerConfig, {"name": "toy"})
    monkeypatch.setitem(SCORERS, toy.NAME, toy)
    assert load_configured_scorer(validate(ScorerConfig, {"name": "toy"}), "cpu") is scorer
    assert scorer_title("toy") == "Toy"
    assert scorer_title("of an earlier version") == "of an earlier version"


def test_every_scorer_declares_its_name_and_title():
    assert all(name == scorer.NAME and scorer.TITLE for name, scorer in SCORERS.items())
    assert [name for name in SCORERS if defect_limit(name) is not None] == ["inspector"]


def test_scores_are_found_again_and_follow_the_pool(tmp_path, target_folder, judge_folder, scorer):
    from hgdpo_core.images import decode_image

    store, sampler = Store(str(tmp_path)), SamplerConfig(width=32, height=32, steps=2, guidance_scale=1.0)
    pool = PoolConfig(images_per_prompt=2, prompts_per_shard=2)
    model = find_model(TargetConfig(source=str(target_folder), dtype="float32"))
    plan = plan_pool(store, model, sampler, pool, TEXTS[:3])
    plan.make(Worker("cpu"))
    config = ScorerConfig(source=str(judge_folder), batch_size=3)
    scores = score_folder(store, plan.pool_id, config)
    assert ScoreStage.of(plan, config).make(Worker("cpu")) == 6
    assert ScoreStage.of(plan, config).make(Worker("cpu")) == 0
    rows, images = scores.read(0), plan.folder.read(0)
    again = scorer.score([decode_image(data) for data in images["image"].to_pylist()], images["prompt"].to_pylist())
    torch.testing.assert_close(torch.tensor(rows["score"].to_pylist()), again, rtol=0, atol=TOLERANCE)
    half = ScorerConfig(source=str(judge_folder), dtype="bfloat16")
    assert missing_scores(plan.folder, score_folder(store, plan.pool_id, half), plan.indices) == plan.indices


def test_tinted_is_pickscore_and_a_stated_preference(judge_folder, scorer, images, tmp_path):
    import tiny

    tinted = load_scorer("tinted", source=str(judge_folder))
    plain = Image.new("RGB", (32, 32), (100, 100, 100))
    warm = Image.new("RGB", (32, 32), (151, 0, 100))  # red stands 51 levels, a fifth of 255, above blue
    torch.testing.assert_close(warmth([plain, warm, np.asarray(warm)]), torch.tensor([0.0, 0.2, 0.2]))
    added = tinted.score([plain, warm], TEXTS[:2]) - scorer.score([plain, warm], TEXTS[:2])
    torch.testing.assert_close(added, torch.tensor([0.0, 0.2 * STRENGTH]), rtol=0, atol=TOLERANCE)
    assert tinted.name == "tinted" and tinted.fingerprint != scorer.fingerprint
    other = load_scorer("tinted", source=str(tiny.save_judge(tmp_path / "other", seed=1)))
    assert other.fingerprint != tinted.fingerprint == find_scorer("tinted", str(judge_folder))


def test_features_of_images_come_from_pickscore(judge_folder, scorer, images):
    for name in ("pickscore", "tinted"):
        features = load_embedder(ScorerConfig(name=name, source=str(judge_folder)), "cpu").embed_images(images)
        torch.testing.assert_close(features, scorer.embed_images(images))
