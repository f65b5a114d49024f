"""Supervised fine-tuning against a plain implementation, caption dropout and resuming."""

import pytest
import torch
from diffusers import DDPMScheduler
from tiny import SD15, tiny_unet, trainable
from training_cases import EMPTY, Images, all_weights, sft_config, train_images, train_sft

from hgdpo_core.errors import InputError, StoppedError
from hgdpo_core.models import Conditioning
from hgdpo_core.models.ddpm import draw_timesteps
from hgdpo_core.storage import Store
from hgdpo_core.training.checkpoints import Checkpoints
from hgdpo_core.training.data import epoch_order, sample_generator
from hgdpo_core.training.parts import draw_noise
from hgdpo_core.training.sft import drop_captions


@pytest.mark.parametrize(("kind", "flip"), [("epsilon", False), ("v_prediction", True)])
def test_losses_and_weights_equal_a_plain_implementation(kind, flip):
    settings = sft_config(caption_dropout=0.5, flip=flip)
    schedule = {**SD15, "prediction_type": kind}
    scheduler, unet, images = DDPMScheduler(**schedule), tiny_unet(), Images()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3, weight_decay=0)
    losses = []
    for step in range(4):
        total = torch.zeros(())
        for k in (2 * step, 2 * step + 1):
            index = epoch_order(5, 7, k // 5)[k % 5]
            latents, generator = images.latents[index][None], [sample_generator(7, k)]
            t = draw_timesteps(generator, 1000)
            noise = draw_noise(generator, latents)
            dropped = torch.rand(1, generator=generator[0]).item() < 0.5
            if flip and torch.rand(1, generator=generator[0]).item() < 0.5:
                latents = images.mirrored[index][None]
            embeds = EMPTY if dropped else images.embeds[index][None]
            target = noise if kind == "epsilon" else scheduler.get_velocity(latents, noise, t)
            total = total + (unet(scheduler.add_noise(latents, noise, t), t, embeds).sample - target).pow(2).mean()
        optimizer.zero_grad()
        (total / 2).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        losses.append(total.item() / 2)

    trained, result = train_images(settings, schedule=schedule)
    assert [row["loss"] for row in result.log] == pytest.approx(losses, rel=1e-4)
    # a few elements whose gradient is near zero may take Adam's first step of 1e-3 the other way
    difference = (all_weights(trained) - all_weights(unet)).abs()
    assert difference.mean() < 1e-6 and difference.max() < 5e-3
    assert list(result.log[0]) == ["step", "loss", "grad_norm", "learning_rate"]


def test_it_learns():
    class Same(Images):
        """One image over and over: its noise is easily distinguished from it."""

        def __init__(self):
            super().__init__(1)

    _, result = train_images(sft_config(batch_size=8, max_steps=40, learning_rate=3e-3, caption_dropout=0.0), Same())
    losses = [row["loss"] for row in result.log]
    assert sum(losses[-5:]) / 5 < 0.7 * sum(losses[:3]) / 3


def test_captions_drop_at_their_rate_and_by_their_own_draw():
    embeds, empty = torch.ones(2000, 1, 1), torch.zeros(1, 1, 1)

    def drop(probability, rows):
        return drop_captions(Conditioning(embeds[list(rows)]), Conditioning(empty), probability,
                             [sample_generator(0, k) for k in rows]).embeds

    dropped = drop(0.1, range(2000))
    assert 0.08 < 1 - dropped.mean().item() < 0.12
    assert torch.equal(drop(0.1, range(500, 2000)), dropped[500:])
    assert torch.equal(drop(0.0, range(2000)), embeds)


def test_all_weights_are_trained_in_float32():
    unet = tiny_unet().to(torch.bfloat16)
    before = all_weights(unet).clone()
    train_sft(*trainable(unet, SD15), Images(), sft_config(mixed_precision="bf16"), Conditioning(EMPTY))
    assert {p.dtype for p in unet.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in unet.parameters())
    assert (all_weights(unet.cpu()) != before).float().mean() > 0.99


@pytest.mark.parametrize(("optimizer", "ema_decay"), [("adamw", 0.5), ("adam8bit", None)])
def test_a_resumed_training_is_bit_identical(optimizer, ema_decay, tmp_path):
    if optimizer == "adam8bit":
        pytest.importorskip("bitsandbytes")
    settings = sft_config(max_steps=6, warmup_steps=4, optimizer=optimizer, caption_dropout=0.3, ema_decay=ema_decay)
    undisturbed, whole = train_images(settings)
    location = Checkpoints(Store(str(tmp_path)), "models/base/checkpoints")
    answers = iter([False, False, False, True])
    with pytest.raises(StoppedError, match="step 3 is kept"):
        train_images(settings, checkpoints=location, should_stop=lambda: next(answers))
    resumed, result = train_images(settings, checkpoints=location)
    assert result.resumed_from == 3 and result.log == whole.log
    assert torch.equal(all_weights(resumed), all_weights(undisturbed))


def test_the_average_of_weights_is_what_comes_out_and_the_training_stays_the_same():
    steps = [all_weights(train_images(sft_config(max_steps=steps))[0]) for steps in (1, 2, 3, 4)]
    average = steps[0]
    for step, weights in enumerate(steps[1:], start=2):
        keep = min(0.25, step / (9 + step))
        average = keep * average + (1 - keep) * weights
    averaged, result = train_images(sft_config(ema_decay=0.25))
    torch.testing.assert_close(all_weights(averaged), average, rtol=1e-5, atol=1e-6)
    assert (all_weights(averaged) - steps[3]).abs().max() > 1e-4
    assert result.log == train_images(sft_config())[1].log


def test_accumulation_equals_the_larger_batch():
    whole, one = train_images(sft_config(batch_size=4))
    split, two = train_images(sft_config(batch_size=2, gradient_accumulation_steps=2))
    assert [row["loss"] for row in two.log] == pytest.approx([row["loss"] for row in one.log], rel=1e-4)
    assert (all_weights(split) - all_weights(whole)).abs().mean() < 1e-6


def test_stopping_before_the_first_step_without_checkpoints_says_what_is_lost():
    with pytest.raises(StoppedError, match="nothing is kept"):
        train_images(sft_config(), should_stop=lambda: True)


def test_unfit_inputs_are_refused():
    with pytest.raises(InputError, match="empty_embeds"):
        train_images(sft_config(), empty=torch.zeros(5, 32))
    with pytest.raises(InputError, match="float32"):
        train_images(sft_config(), empty=EMPTY.half())
