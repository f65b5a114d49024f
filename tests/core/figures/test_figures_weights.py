"""The shipped weights: they open with the plain libraries, stay small, and do what the card says."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

from hgdpo_core.built_in import FOREIGN_SOURCE, SOURCE
from hgdpo_core.config import PoolConfig, PromptSource, SamplerConfig, TargetConfig
from hgdpo_core.errors import InputError
from hgdpo_core.figures import DEFECTS, judge_path, labeller_path, parse_caption, prompts, render, target_path
from hgdpo_core.figures.dataset import render_batch, to_model_range
from hgdpo_core.figures.foreign import defects_of, scene_caption
from hgdpo_core.figures.foreign_pairs import first_two_of, write_foreign_pairs
from hgdpo_core.figures.labeller import load_labeller, prefer_first
from hgdpo_core.figures.make.card import write_card
from hgdpo_core.figures.make.evaluation import Judge
from hgdpo_core.figures.make.labeller_data import render_view, sample_views
from hgdpo_core.figures.make.stages import STAGES
from hgdpo_core.models import find_model
from hgdpo_core.models.image_generator import ImageGenerator
from hgdpo_core.models.locations import find_located_model, model_locations
from hgdpo_core.models.model import load_pipeline
from hgdpo_core.prompts import read_prompts
from hgdpo_core.scorers import load_scorer
from hgdpo_core.scorers.inspector import DEFECT_BELOW
from hgdpo_core.storage import Store

WEIGHTS = target_path().parent


@pytest.fixture(scope="module")
def pipeline():
    return StableDiffusionPipeline.from_pretrained(target_path())


@pytest.fixture(scope="module")
def judge():
    return Judge(judge_path())


def test_the_weights_are_fp16_and_at_most_40_mb():
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) <= 40e6
    assert sum(path.stat().st_size for path in (WEIGHTS / "foreign").rglob("*") if path.is_file()) <= 6e6
    for path in WEIGHTS.rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values() if tensor.is_floating_point()} == {torch.float16}
    assert not [path for path in WEIGHTS.rglob("*") if path.suffix in (".bin", ".pt", ".ckpt")]


@pytest.mark.parametrize("folder", ["target/tokenizer", "judge"])
def test_every_caption_fits(folder):
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / folder)
    lengths = [len(ids) for ids in tokenizer(prompts("test", 2000, seed=0))["input_ids"]]
    assert max(lengths) < 22
    assert tokenizer.model_max_length == (24 if "target" in folder else 77)


def test_an_unknown_word_is_spelled_in_bytes_and_does_not_end_the_text():
    tokenizer = CLIPTokenizer.from_pretrained(target_path() / "tokenizer")
    ids = tokenizer("a zebra, smiling")["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 1


def test_two_captions_have_two_embeddings(pipeline):
    """With CLIP's default end token, which this vocabulary lacks, all texts would pool to the same vector."""
    one, other = prompts("test", 2, seed=0)
    clip = CLIPModel.from_pretrained(judge_path())
    for tokenizer, encoder in ((CLIPTokenizer.from_pretrained(judge_path()), clip.text_model),
                               (pipeline.tokenizer, pipeline.text_encoder)):
        batch = tokenizer([one, other], padding="max_length", return_tensors="pt")
        with torch.no_grad():
            pooled = encoder(input_ids=batch.input_ids).pooler_output
        assert (pooled[0] - pooled[1]).abs().max() > 0.1


def test_the_pipeline_opens_without_a_warning_and_generates(pipeline, caplog):
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    assert {part.dtype for part in parts} == {torch.float32}
    assert pipeline.safety_checker is None and pipeline.feature_extractor is None
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    images = pipeline(prompts("test", 2, seed=0), num_inference_steps=8, generator=generator).images
    assert [image.size for image in images] == [(64, 64)] * 2
    assert np.asarray(images[0]).std() > 20
    assert not caplog.records


def test_the_target_keeps_the_noise_schedule_of_sd15(pipeline):
    config = json.loads((target_path() / "scheduler" / "scheduler_config.json").read_text())
    expected = {"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085,
                "beta_end": 0.012, "skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False,
                "clip_sample": False, "prediction_type": "epsilon"}
    assert {key: config[key] for key in expected} == expected


def test_scaled_latents_have_unit_deviation(pipeline):
    figures = [parse_caption(text) for text in prompts("test", 64, seed=1)]
    images = to_model_range(render_batch(figures, range(64))[0])
    with torch.no_grad():
        latents = pipeline.vae.encode(images).latent_dist.mean * pipeline.vae.config.scaling_factor
    assert 0.9 < float(latents.std()) < 1.1


def test_the_judge_opens_as_pickscore_does(judge):
    """The lines of PickScore's model card give the scores that the training code computes."""
    text = prompts("test", 1, seed=2)[0]
    image = render(parse_caption(text), 3)
    model = CLIPModel.from_pretrained(judge_path()).eval()
    processor = CLIPProcessor(CLIPImageProcessorPil.from_pretrained(judge_path()),
                              CLIPTokenizer.from_pretrained(judge_path()))
    inputs = processor(text=[text], images=[image], padding=True, truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        texts = model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output
        images = model.get_image_features(inputs["pixel_values"]).pooler_output
    texts, images = (v / v.norm(dim=-1, keepdim=True) for v in (texts, images))
    score = model.logit_scale.exp() * (texts @ images.T)[0, 0]
    expected = judge.score([text], np.array(image)[None])
    torch.testing.assert_close(score.detach(), expected[0], rtol=1e-3, atol=1e-3)


def test_the_judge_prefers_correct_images(judge):
    texts = prompts("test", 40, seed=5)
    figures = [parse_caption(text) for text in texts]
    seeds = range(2**43, 2**43 + len(texts))
    right = judge.score(texts, render_batch(figures, seeds)[0])
    won = {}
    for defect in DEFECTS:
        broken = judge.score(texts, render_batch(figures, seeds, [defect] * len(texts))[0])
        won[defect] = float((right > broken).float().mean())
    assert np.mean(list(won.values())) >= 0.92, won
    assert min(won.values()) >= 0.8, won


def test_the_inspector_separates_broken_from_correct_images():
    inspector = load_scorer("inspector")
    texts = prompts("test", 40, seed=6)
    figures, seeds = [parse_caption(text) for text in texts], range(2**43, 2**43 + len(texts))
    right = inspector.score(render_batch(figures, seeds)[0], texts)
    assert float((right >= DEFECT_BELOW).float().mean()) >= 0.85
    for defect in DEFECTS:
        broken = inspector.score(render_batch(figures, seeds, [defect] * len(texts))[0], texts)
        assert float((broken < DEFECT_BELOW).float().mean()) >= 0.8, defect
        assert float((right > broken).float().mean()) >= 0.85, defect


def test_the_inspector_knows_figures_captions_only():
    with pytest.raises(InputError, match="captions of the figures setting only"):
        load_scorer("inspector").score(np.zeros((1, 64, 64, 3), np.uint8), ["a portrait photo"])


def test_the_quality_that_the_card_states_is_the_one_asked_for():
    metrics = {stage: record["metrics"] for stage, record in json.loads((WEIGHTS / "metrics.json").read_text()).items()}
    assert metrics["vae"]["psnr_db"] >= 28
    for view in ("clean", "decoded"):
        accuracy = metrics["judge"]["accuracy"][view]
        assert min(accuracy["wrong_colour"], accuracy["wrong_caption"]) >= 0.95
        assert min(accuracy[kind] for kind in DEFECTS) >= 0.9


def test_the_labeller_has_the_error_rate_that_the_card_states():
    """On a few pairs as rendered, with seeds of their own; the card's rate is over many more."""
    made = json.loads((WEIGHTS / "metrics.json").read_text())["labeller"]["metrics"]
    assert f"error rate is {made['errors']['decoded']['all']:.1%}" in (WEIGHTS / "README.md").read_text()
    assert made["errors"]["decoded"]["all"] <= 0.2
    labeller, wrong = load_labeller(labeller_path()), []
    for i, (view, scene) in enumerate(sample_views("test", 80, np.random.default_rng(5))):
        defects = defects_of(scene)
        pair = [render_view(view, scene, 2**49 + i, defect)[None] for defect in (None, defects[i // 5 % len(defects)])]
        wrong.append(float(prefer_first(labeller, [scene_caption(scene)], *pair)) < 0.5)
    assert np.mean(wrong) <= made["errors"]["clean"]["all"] + 0.15  # three standard deviations of so few


def test_the_foreign_generator_is_a_target_with_the_targets_vae():
    model = find_model(TargetConfig(source=FOREIGN_SOURCE, dtype="float32"))  # auto is bfloat16 on some CPUs
    assert not list((model.path / "vae").glob("*.safetensors")) and model.vae == target_path() / "vae"
    assert model.fingerprint != find_model(TargetConfig(source=SOURCE)).fingerprint
    pipeline = load_pipeline(model)
    own = StableDiffusionPipeline.from_pretrained(target_path())
    for one, other in zip(pipeline.vae.parameters(), own.vae.parameters(), strict=True):
        assert torch.equal(one, other)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    generator = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    texts = ["a big red house with a blue roof, in a park", "a big blue house with a red roof, at night"]
    day, night = (np.asarray(image) for image in pipeline(texts, num_inference_steps=8, generator=generator).images)
    assert day.std() > 20 and day[:16].mean() > night[:16].mean() + 50


def test_a_worker_finds_the_foreign_generator_under_its_name(tmp_path):
    store, model = Store(str(tmp_path)), find_model(TargetConfig(source=FOREIGN_SOURCE))
    recipe = model_locations(store, model, copy_to_store=True)
    assert recipe["model"]["source"] == FOREIGN_SOURCE and recipe["vae"]["source"] == SOURCE
    assert find_located_model(store, model.identity(), recipe) == model


def test_stand_in_pairs_by_the_shipped_networks(tmp_path):
    """As a run would make them: two images of a pool for each foreign prompt, labelled, with people and without."""
    sampler = SamplerConfig(width=64, height=64, steps=6, guidance_scale=3.0)
    model = find_model(TargetConfig(source=FOREIGN_SOURCE))
    generator = ImageGenerator(model, sampler, PoolConfig(images_per_prompt=2, batch_size=10), "cpu")
    texts = read_prompts(PromptSource(source=FOREIGN_SOURCE, limit=10)).prompts
    counts = write_foreign_pairs(tmp_path / "pairs", texts, first_two_of(generator), labeller=labeller_path(),
                                 model=FOREIGN_SOURCE, fingerprint=model.fingerprint)
    assert counts.pairs == 10 == counts.first_preferred + counts.second_preferred + counts.ties
    table = pq.read_table(tmp_path / "pairs" / "data")
    assert table["caption"].to_pylist() == list(texts)
    assert set(table["model_0"].to_pylist()) == {"figures-foreign (stand-in)"}


def test_the_card_is_what_the_metrics_say(tmp_path):
    metrics = json.loads((WEIGHTS / "metrics.json").read_text())
    assert set(metrics) == set(STAGES)
    write_card(tmp_path / "README.md", metrics)
    assert (tmp_path / "README.md").read_text() == (WEIGHTS / "README.md").read_text()
