"""Latent adaptive normalisation (paper Eq. 7): after every step the reference's channel statistics, nothing else."""

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import DPMSolverMultistepScheduler

from hgdpo_core.config import PoolConfig, SamplerConfig, TargetConfig, TripletConfig
from hgdpo_core.config.base import content_hash
from hgdpo_core.config.presets import figures
from hgdpo_core.errors import ConfigError
from hgdpo_core.evaluate import plan_evaluation
from hgdpo_core.images import decode_image
from hgdpo_core.models import Conditioning, find_model, load_pipeline
from hgdpo_core.models.lora import add_lora, save_lora
from hgdpo_core.models.sampling import make_scheduler, match_statistics, sample_latents
from hgdpo_core.models.sd15 import UnetDenoiser
from hgdpo_core.stages.base import Worker
from hgdpo_core.stages.pool import plan_pool, pool_settings
from hgdpo_core.storage import Store

STEPS = 5
SAMPLER = SamplerConfig(width=32, height=32, steps=2, guidance_scale=1.5)
LAN = SAMPLER.model_copy(update={"latent_normalisation": True})
POOL = PoolConfig(images_per_prompt=2, prompts_per_shard=2)
PROMPTS = ["a woman in a red top", "a man in a blue top"]


@pytest.fixture(scope="module")
def reference():
    return UnetDenoiser(tiny.tiny_unet())


@pytest.fixture(scope="module")
def policy(reference):
    """The reference with every weight a little larger: its latents drift away."""
    denoiser = copy.deepcopy(reference)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.mul_(1.1)
    return denoiser


def inputs(batch=3):
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn((batch, 4, 32), generator=generator)
    negative = torch.randn((1, 4, 32), generator=generator)
    noise = torch.randn((batch, 4, 8, 8), generator=generator)
    return make_scheduler({**tiny.SD15, "steps_offset": 1}), embeds, negative, noise


def sample(denoiser, guidance=2.0, **options):
    scheduler, embeds, negative, noise = inputs()
    return sample_latents(denoiser, scheduler, Conditioning(embeds), Conditioning(negative), noise, steps=STEPS,
                          guidance_scale=guidance, **options)


def test_a_stochastic_solver_is_sampled_without_its_noise(reference):
    """Else an image would depend on more than its seed, on its batch for one."""
    _, embeds, negative, noise = inputs()
    images = [sample_latents(reference, make_scheduler({**tiny.SD15, "steps_offset": 1, "algorithm_type": algorithm}),
                             Conditioning(embeds), Conditioning(negative), noise, steps=STEPS, guidance_scale=2.0)
              for algorithm in ("dpmsolver++", "sde-dpmsolver++", "sde-dpmsolver++")]
    assert torch.equal(images[0], images[1]) and torch.equal(images[1], images[2])


def recorded(denoiser, seen):
    """`denoiser`, noting the latents that it is shown."""
    def denoise(latents, *arguments):
        seen.append(latents)
        return denoiser(latents, *arguments)
    return denoise


def statistics(latents):
    return torch.stack([latents.mean(dim=(2, 3)), latents.std(dim=(2, 3))])


def test_the_plain_path_is_the_loop_of_plain_diffusers(policy):
    scheduler, embeds, negative, noise = inputs()
    expected = DPMSolverMultistepScheduler.from_config(scheduler.config)
    expected.set_timesteps(STEPS)
    latents = noise * expected.init_noise_sigma
    with torch.no_grad():
        for timestep in expected.timesteps:
            both = torch.cat([negative.expand_as(embeds), embeds])
            low, high = policy.network(torch.cat([latents, latents]), timestep, both).sample.chunk(2)
            latents = expected.step(low + 2.0 * (high - low), timestep, latents).prev_sample
    assert torch.equal(sample(policy), latents)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_after_every_step_the_statistics_are_the_references(policy, reference, guidance):
    policy_saw, reference_saw = [], []
    result = sample(recorded(policy, policy_saw), guidance, reference=recorded(reference, reference_saw))
    for ours, theirs in zip([*policy_saw, result], [*reference_saw, sample(reference, guidance)], strict=True):
        torch.testing.assert_close(statistics(ours), statistics(theirs), rtol=1e-4, atol=1e-5)
    assert (statistics(sample(policy, guidance)) - statistics(sample(reference, guidance))).abs().max() > 1e-2
    assert (result - sample(reference, guidance)).abs().max() > 1e-2  # the pattern stays the policy's own


def test_the_reference_walks_its_own_way(policy, reference):
    """Not a bit of the policy may reach it: its trajectory is the plain one, from the same noise."""
    seen, alone = [], []
    sample(policy, reference=recorded(reference, seen))
    sample(recorded(reference, alone))
    assert all(torch.equal(a, b) for a, b in zip(seen, alone, strict=True))


def test_an_equal_reference_changes_no_bit(policy):
    assert torch.equal(sample(policy, reference=policy), sample(policy))


def test_a_constant_channel_takes_the_mean_alone():
    latents, other = torch.full((1, 2, 4, 4), 3.0), torch.randn((1, 2, 4, 4))
    matched = match_statistics(latents, other)
    torch.testing.assert_close(matched.mean(dim=(2, 3)), other.mean(dim=(2, 3)))
    assert matched.isfinite().all()


def test_half_precision_stays_half(policy):
    latents, other = torch.randn((2, 4, 8, 8)).bfloat16(), torch.randn((2, 4, 8, 8)).bfloat16() + 1
    matched = match_statistics(latents, other)
    assert matched.dtype == torch.bfloat16
    torch.testing.assert_close(statistics(matched.float()), statistics(other.float()), rtol=0.02, atol=0.02)


# -- through the generator


@pytest.fixture(scope="module")
def target(target_folder):
    return find_model(TargetConfig(source=str(target_folder), dtype="float32"))


@pytest.fixture(scope="module")
def tuned(target, tmp_path_factory):
    """The target wearing a LoRA that does something."""
    folder = tmp_path_factory.mktemp("lora")
    unet = load_pipeline(target).unet
    add_lora(unet, rank=2, seed=0)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    save_lora(unet, folder)
    return target.with_lora(folder, 1.0)


def draw(root, model, sampler):
    plan = plan_pool(Store(str(root)), model, sampler, POOL, PROMPTS)
    plan.make(Worker("cpu"))
    rows = [row for index in plan.indices for row in plan.folder.read(index).to_pylist()]
    return plan, np.stack([np.asarray(decode_image(row["image"])).astype(int) for row in rows])


def test_a_pool_with_normalisation_is_another_pool_between_both(tmp_path, target, tuned):
    reference, reference_images = draw(tmp_path, target, SAMPLER)
    plain, plain_images = draw(tmp_path, tuned, SAMPLER)
    normalised, images = draw(tmp_path, tuned, LAN)
    assert len({reference.pool_id, plain.pool_id, normalised.pool_id}) == 3
    assert np.abs(images - plain_images).max() > 0 and np.abs(images - reference_images).max() > 0


def test_a_model_without_a_lora_is_refused(tmp_path, target):
    with pytest.raises(ConfigError, match="the model has no LoRA"):
        plan_pool(Store(str(tmp_path)), target, LAN, POOL, PROMPTS)


def test_an_evaluation_normalises_the_tuned_model_alone(tmp_path, target, tuned):
    store, config = Store(str(tmp_path)), figures().evaluation
    planned = {model: plan_evaluation(store, model, LAN, POOL, config, PROMPTS).sampler for model in (target, tuned)}
    assert planned == {target: SAMPLER, tuned: LAN}


def test_ids_from_before_the_settings_stay():
    """Golden values from the code before LAN and pool_size existed: existing pools and triplets keep their ids."""
    model: Any = SimpleNamespace(identity=lambda: {"fingerprint": "f"}, lora=None)
    assert content_hash(pool_settings(model, SAMPLER, POOL)) == "eca8b2aa519f"
    folders = {"stage": "triplets", "pool": "pools/p", "scores": "scores/p/s", "prompts_id": "5-test"}
    assert content_hash({**folders, **TripletConfig().identity()}) == "c6d50806a83c"
    assert TripletConfig(pool_size=3).identity() == {"loser_rank": None, "pool_size": 3}
