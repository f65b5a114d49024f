"""The whole method on a tiny Stable Diffusion XL: what is stored, what is trained on, the loss of other scripts."""

import re
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionXLPipeline
from tiny_run import tiny_parameters

from hgdpo_core.config import DpoConfig, TargetConfig
from hgdpo_core.config.presets import build_config
from hgdpo_core.export import export_run
from hgdpo_core.models import find_model, load_backbone
from hgdpo_core.pipeline import StageTimes, run_all, write_report
from hgdpo_core.plan import plan_run
from hgdpo_core.report import model_card
from hgdpo_core.run import open_run
from hgdpo_core.stages.image_latents import sizes_of
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder
from hgdpo_core.training.data import LatentImages, LatentPairs, PairBatch
from hgdpo_core.training.dpo import prepare_dpo

PROMPT = "a (red:1.3) woman in a top BREAK a beach"


@pytest.fixture(scope="module")
def made(tmp_path_factory, sdxl_folder):
    folder = tmp_path_factory.mktemp("run")
    judge = tiny.save_judge(folder / "judge")
    parameters = tiny_parameters(folder, sdxl_folder, judge)
    parameters["overrides"] |= {"pool.batch_size": 4, "dpo.mixed_precision": "no", "sft.mixed_precision": "no",
                                "target.prompt_syntax": "a1111", "target.family": "sdxl"}
    run = open_run(root=str(folder / "root"), preset="figures", **parameters)
    return run, run_all(run)


def test_the_whole_method_runs(made):
    run, result = made
    assert result.comparison.win_rates["pickscore"].n == 8
    tuned = result.made.lora
    assert (run.store.local_path(f"models/{tuned.model_id}") / f"{tuned.model_id}-kohya.safetensors").exists()


def test_an_exports_card_runs_and_its_pipeline_is_target_and_lora(made, tmp_path, monkeypatch):
    run, result = made
    write_report(run, result, StageTimes())
    export_run(run.store, tmp_path, fused=True)
    card = (tmp_path / "README.md").read_text()
    assert "- stable-diffusion-xl\n" in card and "TO FILL IN" in card
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1].replace('"cuda"', '"cpu"'), names)
    fused = StableDiffusionXLPipeline.from_pretrained("pipeline", add_watermarker=False)
    images = []
    for pipeline in (names["pipeline"], fused):
        assert isinstance(pipeline, StableDiffusionXLPipeline)
        images.append(np.asarray(pipeline("a man", num_inference_steps=2,
                                          generator=torch.Generator().manual_seed(3)).images[0]).astype(int))
    assert images[0].shape == np.asarray(names["image"]).shape == (32, 32, 3)
    assert np.abs(images[0] - images[1]).max() <= 1


def test_a_card_opens_a_single_file_as_such():
    config = build_config("sdxl", target="models/photo.safetensors", prompts="p")
    code = model_card._code(config, 0.5, {}, fine_tuned=False)
    assert 'StableDiffusionXLPipeline.from_single_file("path/to/the/target")' in code


def test_a_probe_times_every_stage(made, tmp_path):
    """On an empty root: the models are loaded, a batch of each stage is timed."""
    run, _ = made
    planned = plan_run(replace(run, store=Store(str(tmp_path))), with_probe=True)
    assert planned.hours is not None and planned.hours > 0
    timed = {stage.stage for stage in planned.stages if "timed" in stage.basis}
    assert timed >= {"sft latents", "sft", "pool", "score", "latents", "dpo"}


def test_training_reads_what_the_sampler_was_given(made):
    run, result = made
    latents = ShardFolder.open(run.store, next(key for key in folders(run) if "images-" not in key))
    pairs, text = LatentPairs(latents, sorted(latents.manifests())), load_backbone(result.made.target).text
    first = next(iter(latents.manifests()))
    rows = latents.read(first).to_pylist()
    prompts = {row["prompt_id"]: row["prompt"] for row in result.made.ranked.pool.folder.read(first).to_pylist()}
    batch = pairs.batch(range(len(rows)))
    for number, row in enumerate(rows):
        (expected,) = text.encode([prompts[row["prompt_id"]]])
        assert torch.equal(batch.conditioning[number:number + 1].embeds, expected.embeds.float())
        assert torch.equal(batch.pooled[number:number + 1], expected.pooled.float())


def test_images_of_sft_have_their_real_sizes(made):
    run, _ = made
    latents = ShardFolder.open(run.store, next(key for key in folders(run) if "images-" in key))
    batch = LatentImages(latents, sorted(latents.manifests())).batch([0, 1])
    assert batch.conditioning.extra["sizes"].tolist() == [[64, 64, 0, 0, 32, 32]] * 2  # 64x64, scaled to 32x32
    assert batch.conditioning.pooled.shape == (2, 40)
    assert sizes_of((1000, 3000), (832, 1216)) == (3000, 1000, 640, 0, 1216, 832)  # scaled to 832x2496, 640 off the top
    dropped = batch.conditioning.replaced(torch.tensor([True, False]), load_backbone(run.target).text.dropped_caption())
    assert not dropped.embeds[0].any() and not dropped.pooled[0].any() and dropped.pooled[1].any()
    assert torch.equal(dropped.extra["sizes"], batch.conditioning.extra["sizes"])


def folders(run):
    return [key.rpartition("/")[0] for key, _, _ in run.store.walk()
            if key.startswith("latents/") and key.endswith("/config.json")]


def test_long_weighted_prompts_go_through_both_encoders(sdxl_folder):
    model = find_model(TargetConfig(source=str(sdxl_folder), dtype="float32", prompt_syntax="a1111"))
    text = load_backbone(model).text
    (found,) = text.encode([PROMPT])
    assert found.embeds.shape == (1, 48, 80) and found.pooled.shape == (1, 40)
    for reader, columns in zip(text.readers, (slice(0, 32), slice(32, 80)), strict=True):
        (own,) = reader.encode([PROMPT])
        assert torch.equal(found.embeds[0][:, columns], own)
    plain = text.encode_captions(["a red woman in a top"])
    assert torch.equal(found.pooled, plain.pooled)  # of the first chunk, without its weights
    assert not torch.equal(found.embeds[:, :24], plain.embeds)
    (unweighted,) = text.encode(["a red woman in a top"])
    torch.testing.assert_close(unweighted.embeds, plain.embeds)


def test_loss_and_gradients_are_those_of_a_plain_script(sdxl_folder):
    """diffusers' train_diffusion_dpo_sdxl.py: its beta_dpo, at half of it, with `added_cond_kwargs`."""
    model = find_model(TargetConfig(source=str(sdxl_folder), dtype="float32"))
    draw = torch.Generator().manual_seed(0)
    winner, loser = (torch.randn(2, 4, 4, 4, generator=draw) for _ in range(2))
    embeds, pooled = torch.randn(2, 24, 80, generator=draw), torch.randn(2, 40, generator=draw)
    backbone = load_backbone(model)
    config = DpoConfig(batch_size=2, beta=2500.0, lambda_stat=0.0, mixed_precision="no", lora_rank=4,
                       learning_rate=1e-5)
    objective = prepare_dpo(backbone.denoiser, backbone.schedule, config)
    for name, weight in backbone.denoiser.network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05, generator=draw)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    losses = objective.batch_loss(backbone.denoiser, PairBatch(winner, loser, embeds, pooled=pooled), generators)
    losses["loss"].mean().backward()

    network, chain = backbone.denoiser.network, backbone.schedule.chain
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    timesteps = torch.cat([torch.randint(1000, (1,), generator=one) for one in generators])
    noise = torch.stack([torch.randn(4, 4, 4, generator=one) for one in generators])
    latents, both = torch.cat([winner, loser]), timesteps.repeat(2)
    noisy = chain.add_noise(latents, noise.repeat(2, 1, 1, 1), both)
    added = {"text_embeds": pooled.repeat(2, 1), "time_ids": torch.tensor([[32, 32, 0, 0, 32, 32]]).repeat(4, 1)}

    def errors():
        predicted = network(noisy, both, embeds.repeat(2, 1, 1), added_cond_kwargs=added).sample
        return F.mse_loss(predicted, noise.repeat(2, 1, 1, 1), reduction="none").mean(dim=(1, 2, 3)).chunk(2)

    ours = {name: weight.grad.clone() for name, weight in network.named_parameters() if weight.grad is not None}
    network.zero_grad()
    model_w, model_l = errors()
    with torch.no_grad():
        network.disable_adapters()
        reference_w, reference_l = errors()
        network.enable_adapters()
    inside = -0.5 * (2 * config.beta) * ((model_w - model_l) - (reference_w - reference_l))
    loss = -F.logsigmoid(inside)
    torch.testing.assert_close(losses["loss"].detach(), loss.detach(), rtol=1e-5, atol=1e-6)
    loss.mean().backward()
    theirs = {name: weight.grad for name, weight in network.named_parameters() if weight.grad is not None}
    assert ours.keys() == theirs.keys() and len(ours) > 50
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6)
    assert np.isfinite(float(loss.mean().detach()))
