"""The two losses of HG-DPO (arXiv:2405.20216v1), per sample: the caller reduces. All arithmetic is float32.

    paper                      here
    eps_theta, eps_ref         policy, reference prediction
    x^w, x^l                   winner, loser
    d(.)                       denoising_error: the MEAN squared error of one sample
    beta                       beta, without a factor 1/2 (see config.DpoConfig)
    mu(l)                      mean over height and width, per channel
    beta_t, alpha_t, abar_t    scheduler.betas, .alphas, .alphas_cumprod at timestep t
"""

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

from hgdpo_core.errors import ConfigError, InputError
from hgdpo_core.schedule import check_prediction


def denoising_error(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """d of Eq. 3: the squared error of each sample, averaged over all its elements; float32 `[B]`.

    The mean, not the sum: with a sum, beta would be off by a factor of C*H*W. Both tensors are floating point
    `[B, ...]` of one shape; InputError otherwise.
    """
    _require_same("denoising_error", prediction=prediction, target=target)
    if prediction.ndim < 2:
        raise InputError(f"denoising_error: expected [B, ...] with at least 2 axes, got "
                         f"{list(prediction.shape)}: give one row of elements for each sample")
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def preference_margin(policy_winner_error: torch.Tensor, policy_loser_error: torch.Tensor,
                      reference_winner_error: torch.Tensor,
                      reference_loser_error: torch.Tensor) -> torch.Tensor:
    """How much more the policy improved on losers than on winners; float32 `[B]`, negative is good.

    margin = [d(policy, w) - d(reference, w)] - [d(policy, l) - d(reference, l)]; all four are `[B]` results
    of `denoising_error`. The paper's last term prints x_t^w in the loser's reference error: a misprint.
    """
    _require_same("preference_margin",
                  policy_winner_error=policy_winner_error, policy_loser_error=policy_loser_error,
                  reference_winner_error=reference_winner_error, reference_loser_error=reference_loser_error)
    if policy_winner_error.ndim != 1:
        raise InputError(f"preference_margin: expected errors [B], got {list(policy_winner_error.shape)}: "
                         "average over the elements of each sample first (denoising_error)")
    winner_change = policy_winner_error.float() - reference_winner_error.float()
    loser_change = policy_loser_error.float() - reference_loser_error.float()
    return winner_change - loser_change


def diffusion_dpo_loss(policy_winner_error: torch.Tensor, policy_loser_error: torch.Tensor,
                       reference_winner_error: torch.Tensor, reference_loser_error: torch.Tensor, *,
                       beta: float) -> torch.Tensor:
    """Diffusion-DPO loss of each pair, -log sigmoid(-beta * margin); float32 `[B]`.

    arXiv:2405.20216v1, Eq. 3 (after arXiv:2311.12908, Eq. 14). The errors are `[B]` results of
    `denoising_error`; equal policy and reference give log 2. `beta` > 0 is the paper's (2500), which is
    `beta_dpo=5000` in code that carries a factor 1/2. InputError for shapes or dtypes, ConfigError for beta.
    """
    if not 0 < beta < float("inf"):
        raise ConfigError(f"beta is {beta}: expected a positive finite number, such as the paper's 2500")
    margin = preference_margin(policy_winner_error, policy_loser_error,
                               reference_winner_error, reference_loser_error)
    return -F.logsigmoid(-beta * margin)


def statistic_matching_loss(policy_prediction: torch.Tensor, reference_prediction: torch.Tensor,
                            timesteps: torch.Tensor, scheduler: DDPMScheduler) -> torch.Tensor:
    """Statistic matching loss of each sample; float32 `[B]`. arXiv:2405.20216v1, Eq. 8, in closed form.

    Both networks take one DDPM step t -> t-1 of the full chain from the same noisy winner x_t with the same
    variance noise; the loss is the squared distance of the channel means of the two results, summed over
    channels. The noise cancels and the step is affine in the prediction, so with c_t of `step_coefficient`

        mu(l_policy) - mu(l_reference) = c_t * mu(reference_prediction - policy_prediction)

    and x_t itself is not needed. Predictions are floating point `[B,C,H,W]` of the noisy winners, `timesteps`
    integers `[B]` in [0, T). A clipping scheduler's own step would differ; training never clips.
    """
    _require_same("statistic_matching_loss", policy_prediction=policy_prediction,
                  reference_prediction=reference_prediction)
    shape = list(policy_prediction.shape)
    if len(shape) != 4:
        raise InputError(f"statistic_matching_loss: expected predictions [B,C,H,W], got {shape}")
    if list(timesteps.shape) != shape[:1]:
        raise InputError(f"statistic_matching_loss: expected one timestep for each of {shape[0]} samples, "
                         f"got shape {list(timesteps.shape)}")
    # non_blocking: both predictions are still being computed, and the host would wait for them
    coefficient_B = step_coefficient(timesteps, scheduler).to(policy_prediction.device, non_blocking=True)
    mean_difference_BC = (reference_prediction.float() - policy_prediction.float()).mean(dim=(2, 3))
    return (coefficient_B[:, None] * mean_difference_BC).square().sum(1)


def step_coefficient(timesteps: torch.Tensor, scheduler: DDPMScheduler) -> torch.Tensor:
    """c_t: how far one DDPM step t -> t-1 moves against a change of the prediction; float32 `[B]` on the CPU.

    epsilon:      beta_t / (sqrt(alpha_t) * sqrt(1 - alpha_bar_t))
    v-prediction: sqrt(alpha_bar_{t-1}) * beta_t / sqrt(1 - alpha_bar_t), with alpha_bar_{-1} = 1

    from DDPM (arXiv:2006.11239, Eq. 7). InputError for timesteps that are not integers in [0, T); ModelError
    for other prediction types and for epsilon with zero terminal SNR.
    """
    if timesteps.dtype not in (torch.int64, torch.int32):
        raise InputError(f"timesteps are {timesteps.dtype}: expected integers of the chain, not sigmas")
    kind = check_prediction(scheduler)
    # On the CPU, where the tables are: fetching them from a GPU would stall it in every step.
    t = timesteps.to("cpu", torch.int64)
    if t.numel() and not 0 <= int(t.min()) <= int(t.max()) < len(scheduler):
        raise InputError(f"timesteps are from {int(t.min())} to {int(t.max())}: "
                         f"expected 0 to {len(scheduler) - 1}")
    alpha_bar = scheduler.alphas.cumprod(0)  # alphas_cumprod itself wanders to the device of the last latents
    beta_t, alpha_t, alpha_bar_t = scheduler.betas[t], scheduler.alphas[t], alpha_bar[t]
    if kind == "epsilon":
        return beta_t / (alpha_t.sqrt() * (1 - alpha_bar_t).sqrt())
    alpha_bar_previous = torch.where(t > 0, alpha_bar[(t - 1).clamp(min=0)], 1.0)
    return alpha_bar_previous.sqrt() * beta_t / (1 - alpha_bar_t).sqrt()


def _require_same(function: str, **tensors: torch.Tensor) -> None:
    """Refuse mixed shapes before broadcasting hides the mistake, and integers: no network predicts them."""
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if len({tuple(shape) for shape in shapes.values()}) > 1:
        raise InputError(f"{function}: expected tensors of one shape, got {shapes}: "
                         "they must belong to the same batch")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise InputError(f"{function}: {name} is {tensor.dtype}: expected a floating point tensor")
