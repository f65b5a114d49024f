"""Weighted and long prompts through pool, scores, cached latents and training: one embedding for all of them."""

import numpy as np
import pytest
import tiny
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from tiny import SD15, tiny_unet, trainable
from training_cases import train_dpo

from hgdpo_core.config import (
    DpoConfig,
    EvaluationConfig,
    PoolConfig,
    PromptSource,
    SamplerConfig,
    ScorerConfig,
    TargetConfig,
    TripletConfig,
)
from hgdpo_core.errors import InputError
from hgdpo_core.evaluate import plan_evaluation
from hgdpo_core.images import decode_image
from hgdpo_core.losses import denoising_error
from hgdpo_core.models import find_model
from hgdpo_core.models.ddpm import draw_timesteps
from hgdpo_core.prompts import image_seed, prompt_id
from hgdpo_core.prompts.syntax import strip_syntax
from hgdpo_core.scorers import load_scorer
from hgdpo_core.stages.base import Worker
from hgdpo_core.stages.latents import LatentStage, latent_folder
from hgdpo_core.stages.pool import plan_pool
from hgdpo_core.stages.scores import ScoreStage
from hgdpo_core.stages.triplets import TripletStage, triplet_folder
from hgdpo_core.storage import Store
from hgdpo_core.training.data import LatentPairs, PairBatch, sample_generator
from hgdpo_core.training.parts import draw_noise

SHORT, LONG, LONGER = "a (woman:1.4) in a [red] top", "a red top, " * 7, "a man BREAK in a BREAK (blue:1.3) top"
PROMPTS = [LONGER, SHORT, LONG]
NEGATIVE = "(blurry:1.4)"
SAMPLER = SamplerConfig(width=32, height=32, steps=3, guidance_scale=4.0)
TOLERANCE = 1  # of 255
LENGTH = 24


@pytest.fixture(scope="module")
def model(target_folder):
    return find_model(TargetConfig(source=str(target_folder), dtype="float32", negative_prompt=NEGATIVE,
                                   prompt_syntax="a1111"))


def draw(store, model, **settings):
    """The plan of a pool and {(prompt, index): pixels}."""
    pool = PoolConfig(**({"images_per_prompt": 3, "prompts_per_shard": 3, "batch_size": 2} | settings))
    plan = plan_pool(store, model, SAMPLER, pool, PROMPTS)
    plan.make(Worker("cpu"))
    rows = [row for index in plan.indices for row in plan.folder.read(index).to_pylist()]
    return plan, {(row["prompt"], row["index"]): np.asarray(decode_image(row["image"])) for row in rows}


@pytest.fixture(scope="module")
def made(tmp_path_factory, model, judge_folder):
    """One pool of prompts of 1, 2 and 3 chunks in a shard, its scores, triplets and latents."""
    store = Store(str(tmp_path_factory.mktemp("made")))
    plan, images = draw(store, model)
    scoring = ScoreStage.of(plan, ScorerConfig(source=str(judge_folder)))
    scores, indices = scoring.folder, tuple(plan.indices)
    triplets = triplet_folder(store, plan.folder, scores, "3-abc", TripletConfig())
    ranking = TripletStage(plan.folder, scores, triplets, frozenset(map(prompt_id, PROMPTS)), TripletConfig(), indices)
    latents = latent_folder(store, triplets, model, (32, 32))
    for stage in (scoring, ranking, LatentStage(triplets, latents, model, indices)):
        stage.make(Worker("cpu"))
    return store, plan, images, scores, triplets, latents


def difference(a, b):
    return max(int(np.abs(a[key].astype(int) - b[key].astype(int)).max()) for key in a.keys() & b.keys())


def test_plain_diffusers_draws_the_same_image_from_the_same_embeddings(made, model):
    _, _, images, *_ = made
    encoder = tiny.text_encoder(model)
    pipeline = StableDiffusionPipeline.from_pretrained(model.path)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    for prompt, chunks in ((SHORT, 1), (LONGER, 3)):
        (embeds,) = encoder.encode([prompt])
        assert len(embeds) == chunks * LENGTH
        image = pipeline(prompt_embeds=embeds[None], negative_prompt_embeds=encoder.negative(len(embeds)), width=32,
                         height=32, num_inference_steps=3, guidance_scale=4.0,
                         generator=torch.Generator().manual_seed(image_seed(0, prompt, 1))).images[0]
        assert np.abs(np.asarray(image).astype(int) - images[prompt, 1].astype(int)).max() <= TOLERANCE


def test_neither_batch_nor_shard_nor_neighbours_choose_the_image(made, tmp_path, model):
    _, plan, images, *_ = made
    assert len(images) == 9
    _, other = draw(Store(str(tmp_path)), model, batch_size=4, prompts_per_shard=1)
    assert difference(images, other) <= TOLERANCE
    table = plan.folder.read(0)
    assert table["prompt"].to_pylist() == [SHORT] * 3 + [LONG] * 3 + [LONGER] * 3  # the raw text, short ones first


def test_the_weights_change_the_image_and_the_pool(made, tmp_path, model):
    _, plan, images, *_ = made
    plain_plan, plain = draw(Store(str(tmp_path)), model.reading("plain"))
    assert plain_plan.pool_id != plan.pool_id
    assert difference({(SHORT, 0): plain[SHORT, 0]}, images) > TOLERANCE


def test_an_evaluation_reads_its_prompts_plainly_unless_told(tmp_path, model):
    store, pool = Store(str(tmp_path)), PoolConfig()
    source, judge = PromptSource(source="p.txt"), (ScorerConfig(),)
    config = EvaluationConfig(prompts=source, scorers=judge)
    plan = plan_evaluation(store, model, SAMPLER, pool, config, PROMPTS)
    assert plan.model.prompt_syntax == "plain" and plan.model.negative_syntax == "a1111"
    weighted = config.model_copy(update={"prompt_syntax": "a1111"})
    assert plan_evaluation(store, model, SAMPLER, pool, weighted, PROMPTS).model == model


def test_scores_are_of_the_words_and_tables_keep_the_text(made, judge_folder):
    _, plan, images, scores, triplets, _ = made
    judge = load_scorer("pickscore", source=str(judge_folder))
    rows = scores.read(0).to_pylist()
    drawn = plan.folder.read(0).to_pylist()
    words = [strip_syntax(row["prompt"], "a1111") for row in drawn]
    expected = judge.score([decode_image(row["image"]) for row in drawn], words)
    assert [row["score"] for row in rows] == pytest.approx(expected.tolist(), abs=1e-4)
    raw = judge.score([decode_image(row["image"]) for row in drawn], [row["prompt"] for row in drawn])
    assert (raw - expected).abs().max() > 1e-3
    assert set(triplets.read(0)["caption"].to_pylist()) == set(PROMPTS)


def test_training_conditions_on_exactly_what_the_sampler_used(made, model):
    _, _, _, _, triplets, latents = made
    encoder = tiny.text_encoder(model)
    pairs = LatentPairs(latents, [0])
    captions = triplets.read(0)["caption"].to_pylist()
    for row, caption in enumerate(captions):
        batch = pairs.batch([row])
        assert batch.prompt_mask is None
        assert torch.equal(batch.prompt_embeds[0], encoder.encode([caption])[0])
    together = pairs.batch(range(3))
    assert together.prompt_embeds.shape == (3, 3 * LENGTH, 32)
    lengths = [len(embed) for embed in encoder.encode(captions)]
    assert sorted(lengths) == [LENGTH, 2 * LENGTH, 3 * LENGTH]
    assert together.prompt_mask is not None and together.prompt_mask.sum(dim=1).tolist() == lengths


def test_a_longer_negative_prompt_makes_other_latents(made, model, target_folder):
    store, _, _, _, triplets, latents = made
    other = find_model(TargetConfig(source=str(target_folder), dtype="float32", negative_prompt="bad BREAK ugly",
                                    prompt_syntax="a1111"))
    assert latent_folder(store, triplets, other, (32, 32)).key != latents.key
    assert latent_folder(store, triplets, model, (32, 32)).key == latents.key


class Mixed:
    """Two pairs in memory whose embeddings are 5 and 9 tokens long, in one batch or one by one."""

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.winners, self.losers = torch.randn(2, 2, 4, 8, 8, generator=generator)
        self.embeds = [torch.randn(length, 32, generator=generator) for length in (5, 9)]

    def __len__(self):
        return 2

    def order(self, seed, epoch):
        return [0, 1]

    def batch(self, indices):
        padded = torch.nn.utils.rnn.pad_sequence([self.embeds[i] for i in indices], batch_first=True)
        mask = torch.arange(padded.shape[1]) < torch.tensor([len(self.embeds[i]) for i in indices])[:, None]
        return PairBatch(self.winners[indices], self.losers[indices], padded, mask)


def test_a_padded_batch_trains_as_its_prompts_do_alone():
    settings = DpoConfig(batch_size=2, learning_rate=1e-2, max_steps=1, lora_rank=4, beta=20.0, lambda_stat=10.0,
                         mixed_precision="no", seed=11)
    result = train_dpo(*trainable(tiny_unet(), SD15), Mixed(), settings)
    unet, scheduler, pairs = tiny_unet(), DDPMScheduler(**SD15, clip_sample=False), Mixed()
    errors = []
    for k in range(2):
        generator = [sample_generator(11, k)]
        t, winner = draw_timesteps(generator, 1000), pairs.winners[k][None]
        noise = draw_noise(generator, winner)
        with torch.no_grad():  # the first step's policy is the reference
            prediction = unet(scheduler.add_noise(winner, noise, t), t, pairs.embeds[k][None]).sample
        errors.append(denoising_error(prediction, noise).item())
    assert result.log[0]["winner_error"] == pytest.approx(np.mean(errors), rel=1e-5)
    assert result.log[0]["reference_winner_error"] == pytest.approx(np.mean(errors), rel=1e-5)


def test_a_mask_of_another_shape_is_refused():
    class Wrong(Mixed):
        def batch(self, indices):
            batch = super().batch(indices)
            return PairBatch(batch.winner_latents, batch.loser_latents, batch.prompt_embeds, torch.ones(2, 3).bool())

    settings = DpoConfig(batch_size=2, learning_rate=1e-2, max_steps=1, mixed_precision="no")
    with pytest.raises(InputError, match="expected a mask"):
        train_dpo(*trainable(tiny_unet(), SD15), Wrong(), settings)
