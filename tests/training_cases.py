"""Small trainings on random latents in memory, and the plain implementation they are compared with."""

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from tiny import SD15, tiny_unet, trainable

from hgdpo_core.config import DpoConfig, SftConfig
from hgdpo_core.models import Conditioning
from hgdpo_core.models.ddpm import draw_timesteps
from hgdpo_core.models.lora import add_lora, lora_state
from hgdpo_core.training.base import Hooks
from hgdpo_core.training.data import ImageBatch, PairBatch, epoch_order, sample_generator
from hgdpo_core.training.dpo import prepare_dpo
from hgdpo_core.training.loop import run_training
from hgdpo_core.training.parts import draw_noise
from hgdpo_core.training.sft import prepare_sft


def train_dpo(denoiser, schedule, pairs, settings: DpoConfig, *, checkpoints=None, **hooks):
    return run_training(prepare_dpo(denoiser, schedule, settings), pairs, settings, checkpoints, Hooks(**hooks))


def train_sft(denoiser, schedule, images, settings: SftConfig, empty: Conditioning, *, checkpoints=None, **hooks):
    return run_training(prepare_sft(denoiser, schedule, settings, empty), images, settings, checkpoints, Hooks(**hooks))


class Pairs:
    """Random latents in memory."""

    def __init__(self, size: int = 7):
        generator = torch.Generator().manual_seed(3)
        self.winners, self.losers = torch.randn(2, size, 4, 8, 8, generator=generator)
        self.embeds = torch.randn(size, 5, 32, generator=generator)
        self.mirrored = torch.randn(2, size, 4, 8, 8, generator=generator)  # of mirrored images: no mirror of the above

    def __len__(self):
        return len(self.winners)

    def order(self, seed, epoch):
        return epoch_order(len(self), seed, epoch)

    def batch(self, indices):
        return PairBatch(self.winners[indices], self.losers[indices], self.embeds[indices], None,
                         *self.mirrored[:, indices])


def config(**settings) -> DpoConfig:
    return DpoConfig(**{"batch_size": 2, "learning_rate": 1e-2, "max_steps": 4, "lora_rank": 4, "beta": 20.0,
                        "lambda_stat": 10.0, "mixed_precision": "no", "seed": 11, **settings})


def train(settings: DpoConfig, pairs=None, *, checkpoints=None, schedule=SD15, **hooks):
    unet = tiny_unet()
    pairs = Pairs() if pairs is None else pairs
    result = train_dpo(*trainable(unet, schedule), pairs, settings, checkpoints=checkpoints, **hooks)
    return unet.cpu(), result


def weights(unet) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in lora_state(unet).values()])


def plain_training(settings: DpoConfig, schedule: dict) -> tuple[UNet2DConditionModel, list[float], list[float]]:
    """Equation by equation, nothing shared: two UNets, four passes a batch, two literal DDPM steps, float32."""
    scheduler = DDPMScheduler(**schedule, clip_sample=False)
    reference, policy, pairs = tiny_unet().requires_grad_(False), tiny_unet(), Pairs()
    add_lora(policy, settings.lora_rank, settings.seed)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=settings.learning_rate,
                                  weight_decay=0)
    losses, norms = [], []
    for step in range(settings.max_steps):
        total = torch.zeros(())
        for k in range(step * settings.batch_size, (step + 1) * settings.batch_size):
            index = epoch_order(len(pairs), settings.seed, k // len(pairs))[k % len(pairs)]
            winner, loser, embeds = (t[index][None] for t in (pairs.winners, pairs.losers, pairs.embeds))
            generator = [sample_generator(settings.seed, k)]
            t = draw_timesteps(generator, 1000)
            noise_w = draw_noise(generator, winner)
            noise_l = noise_w if settings.share_noise else draw_noise(generator, loser)
            if settings.flip and torch.rand(1, generator=generator[0]) < 0.5:
                winner, loser = pairs.mirrored[:, index, None]
            error, predicted = {}, {}
            for name, latents, noise in (("w", winner, noise_w), ("l", loser, noise_l)):
                noisy = scheduler.add_noise(latents, noise, t)
                target = noise
                if schedule["prediction_type"] == "v_prediction":
                    target = scheduler.get_velocity(latents, noise, t)
                for unet_name, unet in (("policy", policy), ("reference", reference)):
                    predicted[unet_name, name] = unet(noisy, t, embeds).sample
                    error[unet_name, name] = (predicted[unet_name, name] - target).pow(2).mean()
            margin = (error["policy", "w"] - error["reference", "w"]) - (error["policy", "l"] - error["reference", "l"])
            noisy = scheduler.add_noise(winner, noise_w, t)
            ends = [scheduler.step(predicted[name, "w"], int(t), noisy, generator=torch.Generator().manual_seed(0))
                    .prev_sample.mean((2, 3)) for name in ("policy", "reference")]
            stat = (ends[0] - ends[1]).pow(2).sum()
            total = total + torch.log(1 + torch.exp(settings.beta * margin)) + settings.lambda_stat * stat
        loss = total / settings.batch_size
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.max_grad_norm).item())
        optimizer.step()
        losses.append(loss.item())
    return policy, losses, norms


# -- SFT

EMPTY = torch.zeros(1, 5, 32)


class Images:
    """Random latents in memory."""

    def __init__(self, size: int = 5):
        generator = torch.Generator().manual_seed(3)
        self.latents = torch.randn(size, 4, 8, 8, generator=generator)
        self.embeds = torch.randn(size, 5, 32, generator=generator)
        self.mirrored = torch.randn(size, 4, 8, 8, generator=generator)

    def __len__(self):
        return len(self.latents)

    def order(self, seed, epoch):
        return epoch_order(len(self), seed, epoch)

    def batch(self, indices):
        return ImageBatch(self.latents[indices], self.embeds[indices], self.mirrored[indices])


def sft_config(**settings) -> SftConfig:
    return SftConfig(**{"batch_size": 2, "learning_rate": 1e-3, "max_steps": 4, "mixed_precision": "no", "seed": 7,
                        **settings})


def train_images(settings: SftConfig, images=None, *, checkpoints=None, schedule=SD15, empty=EMPTY, **hooks):
    unet = tiny_unet()
    images = Images() if images is None else images
    result = train_sft(*trainable(unet, schedule), images, settings, Conditioning(empty), checkpoints=checkpoints,
                       **hooks)
    return unet.cpu(), result


def all_weights(unet) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in unet.state_dict().values()])
