"""Supervised fine-tuning against a plain implementation, caption dropout and resuming."""

import pytest
import torch
from diffusers import DDPMScheduler
from tiny import SD15, tiny_unet

from hgdpo_core.checkpoints import Checkpoints
from hgdpo_core.config import SftConfig
from hgdpo_core.errors import InputError, StoppedError
from hgdpo_core.sft import ImageBatch, drop_captions, train_sft
from hgdpo_core.storage import Store
from hgdpo_core.training import draw_noise, draw_timesteps, epoch_order, sample_generator

EMPTY = torch.zeros(1, 5, 32)


class Images:
    """Random latents in memory."""

    def __init__(self, size: int = 5):
        generator = torch.Generator().manual_seed(3)
        self.latents = torch.randn(size, 4, 8, 8, generator=generator)
        self.embeds = torch.randn(size, 5, 32, generator=generator)

    def __len__(self):
        return len(self.latents)

    def order(self, seed, epoch):
        return epoch_order(len(self), seed, epoch)

    def batch(self, indices):
        return ImageBatch(self.latents[indices], self.embeds[indices])


def config(**settings) -> SftConfig:
    return SftConfig(**{"batch_size": 2, "learning_rate": 1e-3, "max_steps": 4, "mixed_precision": "no", "seed": 7,
                        **settings})


def train(settings: SftConfig, images=None, *, checkpoints=None, schedule=SD15, empty=EMPTY, **hooks):
    unet = tiny_unet()
    images = Images() if images is None else images
    result = train_sft(unet, schedule, images, settings, empty, checkpoints=checkpoints, **hooks)
    return unet.cpu(), result


def weights(unet) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in unet.state_dict().values()])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_losses_and_weights_equal_a_plain_implementation(kind):
    settings = config(caption_dropout=0.5)
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
            embeds = EMPTY if dropped else images.embeds[index][None]
            target = noise if kind == "epsilon" else scheduler.get_velocity(latents, noise, t)
            total = total + (unet(scheduler.add_noise(latents, noise, t), t, embeds).sample - target).pow(2).mean()
        optimizer.zero_grad()
        (total / 2).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        losses.append(total.item() / 2)

    trained, result = train(settings, schedule=schedule)
    assert [row["loss"] for row in result.log] == pytest.approx(losses, rel=1e-4)
    # a few elements whose gradient is near zero may take Adam's first step of 1e-3 the other way
    difference = (weights(trained) - weights(unet)).abs()
    assert difference.mean() < 1e-6 and difference.max() < 5e-3
    assert list(result.log[0]) == ["step", "loss", "grad_norm", "learning_rate"]


def test_it_learns():
    class Same(Images):
        """One image over and over: its noise is easily told from it."""

        def __init__(self):
            super().__init__(1)

    _, result = train(config(batch_size=8, max_steps=40, learning_rate=3e-3, caption_dropout=0.0), Same())
    losses = [row["loss"] for row in result.log]
    assert sum(losses[-5:]) / 5 < 0.7 * sum(losses[:3]) / 3


def test_captions_drop_at_their_rate_and_by_their_own_draw():
    embeds, empty = torch.ones(2000, 1, 1), torch.zeros(1, 1, 1)
    dropped = drop_captions(embeds, empty, 0.1, [sample_generator(0, k) for k in range(2000)])
    assert 0.08 < 1 - dropped.mean().item() < 0.12
    part = drop_captions(embeds[500:], empty, 0.1, [sample_generator(0, k) for k in range(500, 2000)])
    assert torch.equal(part, dropped[500:])
    assert torch.equal(drop_captions(embeds, empty, 0.0, [sample_generator(0, k) for k in range(2000)]), embeds)


def test_all_weights_are_trained_in_float32():
    unet = tiny_unet().to(torch.bfloat16)
    before = weights(unet).clone()
    train_sft(unet, SD15, Images(), config(mixed_precision="bf16"), EMPTY, checkpoints=None)
    assert {p.dtype for p in unet.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in unet.parameters())
    assert (weights(unet.cpu()) != before).float().mean() > 0.99


@pytest.mark.parametrize("optimizer", ["adamw", "adam8bit"])
def test_a_resumed_training_is_bit_identical(optimizer, tmp_path):
    if optimizer == "adam8bit":
        pytest.importorskip("bitsandbytes")
    settings = config(max_steps=6, warmup_steps=4, optimizer=optimizer, caption_dropout=0.3)
    undisturbed, whole = train(settings)
    place = Checkpoints(Store(str(tmp_path)), "models/base/checkpoints")
    answers = iter([False, False, False, True])
    with pytest.raises(StoppedError, match="step 3 is kept"):
        train(settings, checkpoints=place, should_stop=lambda: next(answers))
    resumed, result = train(settings, checkpoints=place)
    assert result.resumed_from == 3 and result.log == whole.log
    assert torch.equal(weights(resumed), weights(undisturbed))


def test_accumulation_equals_the_larger_batch():
    whole, one = train(config(batch_size=4))
    split, two = train(config(batch_size=2, gradient_accumulation_steps=2))
    assert [row["loss"] for row in two.log] == pytest.approx([row["loss"] for row in one.log], rel=1e-4)
    assert (weights(split) - weights(whole)).abs().mean() < 1e-6


def test_stopping_before_the_first_step_without_checkpoints_says_what_is_lost():
    with pytest.raises(StoppedError, match="nothing is kept"):
        train(config(), should_stop=lambda: True)


def test_unfit_inputs_are_refused():
    with pytest.raises(InputError, match="empty_embeds"):
        train(config(), empty=torch.zeros(5, 32))
    with pytest.raises(InputError, match="float32"):
        train(config(), empty=EMPTY.half())
