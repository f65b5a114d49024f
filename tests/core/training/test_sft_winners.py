"""Supervised fine-tuning of a LoRA on winners: its loss, its samples, and the LoRA in plain diffusers."""

import numpy as np
import pyarrow as pa
import pytest
import tiny_run
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from tiny import SD15, tiny_unet, trainable
from training_cases import EMPTY, Pairs, sft_config

from hgdpo_core.config import DpoConfig, WinnersConfig
from hgdpo_core.config.presets import build_config
from hgdpo_core.errors import ConfigError, InputError
from hgdpo_core.models import Conditioning
from hgdpo_core.models.ddpm import draw_timesteps
from hgdpo_core.models.lora import add_lora, lora_state
from hgdpo_core.pipeline import run_all, write_report
from hgdpo_core.report.model_card import render_card
from hgdpo_core.run import open_run
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder
from hgdpo_core.training import sft, sft_winners
from hgdpo_core.training.base import Hooks
from hgdpo_core.training.data import ImageBatch, LatentPairs, PairBatch, Winners, sample_generator
from hgdpo_core.training.loop import run_training
from hgdpo_core.training.objective import find_objective
from hgdpo_core.training.parts import draw_noise
from hgdpo_core.training.sft_winners import prepare_winners


def settings(**changes) -> WinnersConfig:
    return WinnersConfig(**{"batch_size": 2, "learning_rate": 1e-2, "max_steps": 3, "lora_rank": 4,
                            "mixed_precision": "no", "seed": 11, **changes})


class TwoWinners(Pairs):
    """A pair's own winner and the next one's."""

    def batch(self, indices):
        return super().batch([row for index in indices for row in (index, (index + 1) % len(self))])


@pytest.mark.parametrize("flip", [False, True])
def test_its_loss_and_lora_equal_a_plain_implementation(flip):
    chosen, pairs = settings(flip=flip), TwoWinners()
    unet = tiny_unet()
    result = run_training(prepare_winners(*trainable(unet, SD15), chosen), pairs, chosen, None, Hooks())

    plain, scheduler = tiny_unet(), DDPMScheduler(**SD15)
    add_lora(plain, chosen.lora_rank, chosen.seed)
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    losses, order = [], pairs.order(chosen.seed, 0)
    for step in range(chosen.max_steps):
        total = torch.zeros(())
        for k in (2 * step, 2 * step + 1):
            generator, rows = sample_generator(chosen.seed, k), (order[k], (order[k] + 1) % len(pairs))
            times = [draw_timesteps([generator], 1000) for _ in rows]
            noises = [draw_noise([generator], pairs.winners[row][None]) for row in rows]
            for row, t, noise in zip(rows, times, noises, strict=True):
                mirrored = flip and torch.rand(1, generator=generator) < 0.5
                latents = (pairs.mirrored[0] if mirrored else pairs.winners)[row][None]
                predicted = plain(scheduler.add_noise(latents, noise, t), t, pairs.embeds[row][None]).sample
                total = total + (predicted - noise).pow(2).mean() / 4
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        losses.append(total.item())

    assert [row["loss"] for row in result.log] == pytest.approx(losses, rel=1e-4)
    assert list(result.log[0]) == ["step", "loss", "grad_norm", "learning_rate"]
    for name, tensor in lora_state(unet.cpu()).items():
        # Steps of Adam: where a gradient is nearly zero, its sign is rounding, and a weight moves by 1e-2.
        assert (tensor - lora_state(plain)[name]).abs().mean() < 1e-4


def test_its_loss_is_that_of_the_sft_trainer_on_the_same_latents(monkeypatch):
    latents, embeds, noise = torch.randn(4, 4, 8, 8), torch.randn(4, 5, 32), torch.randn(4, 4, 8, 8)
    timesteps = torch.tensor([3, 500, 40, 999])
    for module in (sft, sft_winners):
        monkeypatch.setattr(module, "draw_noise", lambda generators, like: noise)

    def losses(prepared, batch, samples):
        return prepared.batch_loss(prepared.denoiser, batch, [sample_generator(0, k) for k in range(samples)])["loss"]

    denoiser, schedule = trainable(tiny_unet(), SD15)
    monkeypatch.setattr(type(schedule), "draw_timesteps", lambda self, generators: timesteps)
    chosen = sft_config(caption_dropout=0.0)
    expected = losses(sft.prepare_sft(denoiser, schedule, chosen, Conditioning(EMPTY)), ImageBatch(latents, embeds), 4)
    ours = losses(prepare_winners(*trainable(tiny_unet(), SD15), settings()), PairBatch(latents, latents, embeds), 2)
    assert torch.allclose(ours, expected.reshape(2, 2).mean(1), rtol=1e-5)


def test_an_epoch_has_each_winner_twice_and_reads_a_shard_at_a_time(tmp_path):
    store, shape = Store(str(tmp_path)), (1, 2, 2)
    folder = ShardFolder.create(store, "latents/a/b", {"stage": "latents"})
    sizes, number = {0: 3, 1: 1, 2: 4}, 0
    for index, rows in sizes.items():
        values = [np.full(shape, number + i, np.float32).tobytes() for i in range(rows)]
        embeds = [np.full((2, 3), number + i, np.float32).tobytes() for i in range(rows)]
        folder.commit(index, pa.table({"prompt_id": [str(i) for i in range(rows)], "winner": values, "loser": values,
                                       "prompt_embeds": embeds}),
                      details={"latent_shape": shape, "embeds_shape": (2, 3)})
        number += rows
    samples = Winners(folder, list(sizes))
    assert len(samples) == len(LatentPairs(folder, list(sizes))) == 8
    batch = samples.batch(samples.order(0, 0))
    seen = batch.winner_latents[:, 0, 0, 0].tolist()
    assert sorted(seen) == sorted(2 * list(range(8)))
    assert batch.prompt_embeds[:, 0, 0].tolist() == seen
    shard_of = {row: index for index, rows in enumerate(([0, 1, 2], [3], [4, 5, 6, 7])) for row in rows}
    assert all(shard_of[a] == shard_of[b] for a, b in zip(seen[::2], seen[1::2], strict=True))


def test_its_settings_are_those_of_dpo_without_its_loss():
    config_ = build_config("figures")
    own = find_objective("sft_winners").settings(config_)
    assert own.model_dump() == {name: getattr(config_.dpo, name) for name in WinnersConfig.model_fields}
    assert set(DpoConfig.model_fields) - set(WinnersConfig.model_fields) == {"beta", "lambda_stat", "share_noise"}


def test_winners_without_mirrored_latents_and_single_ones_are_refused():
    chosen = settings(flip=True)
    objective = prepare_winners(*trainable(tiny_unet(), SD15), chosen)
    pairs = TwoWinners().batch([0])
    plain = PairBatch(pairs.winner_latents, pairs.loser_latents, pairs.prompt_embeds)
    with pytest.raises(InputError, match="lack the latents of mirrored images: cache them with flips"):
        objective.batch_loss(objective.denoiser, plain, [sample_generator(0, 0)])
    with pytest.raises(InputError, match="expected two winners for each of 2 samples, got 2"):
        objective.batch_loss(objective.denoiser, plain, [sample_generator(0, k) for k in range(2)])


def test_a_run_by_that_objective_gives_a_lora_that_plain_diffusers_loads(target_folder, judge_folder, tmp_path):
    parameters = tiny_run.tiny_parameters(tmp_path, target_folder, judge_folder)
    parameters["overrides"] |= {"objective": "sft_winners"}
    run = open_run(root=str(tmp_path / "root"), **parameters)
    result = run_all(run)
    lora = result.made.lora
    assert lora.model_id.startswith("sft_winners-") and list(lora.log[0]) == ["step", "loss", "grad_norm",
                                                                             "learning_rate"]
    pipeline = StableDiffusionPipeline.from_pretrained(result.made.target.path, safety_checker=None)
    pipeline.load_lora_weights(lora.path)
    assert len(pipeline.get_list_adapters()["unet"]) == 1
    trained = [tensor for name, tensor in pipeline.unet.state_dict().items() if "lora_B" in name]
    assert trained and all(tensor.abs().max() > 0 for tensor in trained)
    write_report(run, result)
    page = run.store.read_bytes(run.key("report.html")).decode()
    assert "Fine-tuning on winners" in page and "DPO loss" not in page
    card = render_card(run.config, write_report(run, result).summary, kohya_name="x.safetensors", fused=False)
    assert "(Fine-tuning on winners)" in card and "best against worst" in card and "Preference Optim" not in card
    assert "- sft-winners" in card and "matching loss" not in card


@pytest.mark.parametrize(("name", "message"), [
    ("sft", "objective is 'sft', which trains on images: expected how its LoRA is trained, one of dpo, sft_winners"),
    ("ppo", "there is no training objective 'ppo': expected one of")])
def test_another_objective_is_refused_before_anything_loads(name, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        open_run(root=str(tmp_path), overrides={"objective": name})
