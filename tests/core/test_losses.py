"""The losses against numbers worked out by hand and against diffusers' own DDPM step."""

import math

import pytest
import torch
from diffusers import DDPMScheduler, PNDMScheduler

from hgdpo_core.errors import ConfigError, InputError, ModelError
from hgdpo_core.losses import (
    denoising_error,
    diffusion_dpo_loss,
    preference_margin,
    statistic_matching_loss,
    step_coefficient,
)
from hgdpo_core.schedule import prediction_target, training_scheduler

SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def scheduler_of(kind: str = "epsilon", **settings) -> DDPMScheduler:
    return training_scheduler({**SD15, "prediction_type": kind, **settings})


def errors(*values: float) -> list[torch.Tensor]:
    return [torch.tensor([value]) for value in values]


def test_denoising_error_is_the_mean_not_the_sum():
    prediction, target = torch.zeros(2, 4, 3, 5), torch.stack([torch.ones(4, 3, 5), 2 * torch.ones(4, 3, 5)])
    assert denoising_error(prediction, target).tolist() == [1.0, 4.0]


def test_equal_policy_and_reference_give_log_2():
    loss = diffusion_dpo_loss(*errors(0.3, 0.7, 0.3, 0.7), beta=2500.0)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)


def test_a_hand_worked_pair():
    # By hand: margin = (0.1 - 0.2) - (0.5 - 0.4) = -0.2; beta 10: -log sigmoid(2) = log(1 + e^-2) = 0.126928.
    loss = diffusion_dpo_loss(*errors(0.1, 0.5, 0.2, 0.4), beta=10.0)
    assert preference_margin(*errors(0.1, 0.5, 0.2, 0.4)).item() == pytest.approx(-0.2, rel=1e-6)
    assert loss.item() == pytest.approx(0.126928, rel=1e-5)


def test_swapping_winner_and_loser_negates_the_margin():
    torch.manual_seed(0)
    policy_w, policy_l, reference_w, reference_l = torch.rand(4, 8)
    margin = preference_margin(policy_w, policy_l, reference_w, reference_l)
    swapped = preference_margin(policy_l, policy_w, reference_l, reference_w)
    assert torch.equal(swapped, -margin)


def test_the_gradient_of_the_loss_is_the_textbook_one():
    # d/dm [-log sigmoid(-beta m)] = beta * sigmoid(beta m); winner error +, loser error -.
    policy_w, policy_l, reference_w, reference_l = errors(0.11, 0.5, 0.1, 0.5)
    policy_w.requires_grad_(), policy_l.requires_grad_()
    diffusion_dpo_loss(policy_w, policy_l, reference_w, reference_l, beta=100.0).sum().backward()
    expected = 100 / (1 + math.exp(-1.0))
    assert policy_w.grad.item() == pytest.approx(expected, rel=1e-5)
    assert policy_l.grad.item() == pytest.approx(-expected, rel=1e-5)


def test_extreme_margins_stay_finite():
    assert diffusion_dpo_loss(*errors(5.0, 0.0, 0.0, 0.0), beta=5000.0).item() == pytest.approx(25_000.0)
    assert diffusion_dpo_loss(*errors(0.0, 5.0, 0.0, 0.0), beta=5000.0).item() == 0.0


def test_bfloat16_is_computed_in_float32():
    prediction, target = torch.randn(2, 4, 8, 8).bfloat16(), torch.randn(2, 4, 8, 8).bfloat16()
    result = denoising_error(prediction, target)
    assert result.dtype == torch.float32
    assert torch.equal(result, denoising_error(prediction.float(), target.float()))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_statistic_loss_equals_two_literal_ddpm_steps_at_every_timestep(kind):
    scheduler = scheduler_of(kind)
    torch.manual_seed(0)
    # float64 samples keep the literal step's own rounding out; the scheduler's tables stay float32.
    noisy, policy, reference = torch.randn(3, 1, 4, 6, 5, dtype=torch.float64)
    closed = statistic_matching_loss(policy.expand(1000, -1, -1, -1), reference.expand(1000, -1, -1, -1),
                                     torch.arange(1000), scheduler)
    for t in range(1000):
        stepped = [scheduler.step(prediction, t, noisy, generator=torch.Generator().manual_seed(t)).prev_sample
                   for prediction in (policy, reference)]
        literal = (stepped[0].mean((2, 3)) - stepped[1].mean((2, 3))).square().sum().item()
        assert closed[t].item() == pytest.approx(literal, rel=1e-3), t


def test_statistic_loss_of_equal_predictions_is_zero():
    prediction, timesteps = torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999])
    loss = statistic_matching_loss(prediction, prediction, timesteps, scheduler_of())
    assert loss.tolist() == [0, 0, 0]


def test_statistic_loss_sees_means_only_and_sums_channels():
    scheduler, timesteps = scheduler_of(), torch.tensor([400])
    reference = torch.zeros(1, 4, 2, 2)
    pattern = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).expand(1, 4, 2, 2)  # each channel's mean is 0
    assert statistic_matching_loss(pattern, reference, timesteps, scheduler).item() == 0
    one_channel = reference.clone()
    one_channel[:, 0] = 1
    all_channels = torch.ones_like(reference)
    one = statistic_matching_loss(one_channel, reference, timesteps, scheduler).item()
    assert one == pytest.approx(step_coefficient(timesteps, scheduler).item() ** 2)
    assert statistic_matching_loss(all_channels, reference, timesteps, scheduler).item() == pytest.approx(4 * one)


def test_prediction_targets():
    latents, noise = torch.randn(2, 2, 4, 3, 3)
    timesteps = torch.tensor([0, 999])
    assert torch.equal(prediction_target(scheduler_of(), latents, noise, timesteps), noise)
    scheduler = scheduler_of("v_prediction")
    alpha_bar = scheduler.alphas_cumprod[timesteps][:, None, None, None]
    velocity = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents
    torch.testing.assert_close(prediction_target(scheduler, latents, noise, timesteps), velocity)


def test_the_training_scheduler_never_clips_and_keeps_the_betas():
    pndm = PNDMScheduler(**SD15, skip_prk_steps=True, steps_offset=1)
    scheduler = training_scheduler(pndm.config)
    assert scheduler.config["clip_sample"] is False and scheduler.config["thresholding"] is False
    assert len(scheduler) == 1000 and torch.equal(scheduler.betas, pndm.betas)


@pytest.mark.parametrize(("config", "words"), [
    ({**SD15, "prediction_type": "sample"}, "epsilon or v_prediction"),
    ({**SD15, "rescale_betas_zero_snr": True}, "zero terminal SNR"),
    ({**SD15, "beta_schedule": "cubic"}, "cubic"),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "flow matching"),
])
def test_unfit_schedules_are_refused(config, words):
    with pytest.raises(ModelError, match=words):
        training_scheduler(config)


def test_statistic_loss_refuses_other_schedules_itself():
    prediction, timesteps = torch.randn(1, 4, 2, 2), torch.tensor([5])
    for scheduler in (DDPMScheduler(prediction_type="sample"), DDPMScheduler(rescale_betas_zero_snr=True)):
        with pytest.raises(ModelError):
            statistic_matching_loss(prediction, prediction, timesteps, scheduler)
    zero_snr = scheduler_of("v_prediction", rescale_betas_zero_snr=True)
    assert torch.isfinite(statistic_matching_loss(prediction, 2 * prediction, torch.tensor([999]), zero_snr)).all()


@pytest.mark.parametrize("wrong", [
    lambda: denoising_error(torch.randn(2, 4, 3, 3), torch.randn(1, 4, 3, 3)),
    lambda: denoising_error(torch.randn(2), torch.randn(2)),
    lambda: denoising_error(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64)),
    lambda: diffusion_dpo_loss(torch.rand(3), torch.rand(3), torch.rand(3), torch.rand(1), beta=1.0),
    lambda: diffusion_dpo_loss(*torch.rand(4, 3, 1), beta=1.0),
    lambda: statistic_matching_loss(*torch.rand(2, 2, 4, 3, 3), torch.tensor([1]), scheduler_of()),
    lambda: statistic_matching_loss(*torch.rand(2, 1, 4, 3, 3), torch.tensor([1.0]), scheduler_of()),
    lambda: statistic_matching_loss(*torch.rand(2, 1, 4, 3, 3), torch.tensor([1000]), scheduler_of()),
    lambda: statistic_matching_loss(*torch.rand(2, 1, 4, 3, 3), torch.tensor([-1]), scheduler_of()),
    lambda: statistic_matching_loss(*torch.rand(2, 1, 4), torch.tensor([1]), scheduler_of()),
])
def test_wrong_shapes_and_dtypes_are_refused_before_broadcasting(wrong):
    with pytest.raises(InputError):
        wrong()


@pytest.mark.parametrize("beta", [0.0, -1.0, math.inf, math.nan])
def test_beta_must_be_positive_and_finite(beta):
    with pytest.raises(ConfigError, match="beta"):
        diffusion_dpo_loss(*errors(1, 1, 1, 1), beta=beta)
