"""Noise processes: add noise to latents, and recover them from a prediction.

    process = process_of(noise_scheduler)
    target = process.target(latents, noise, timesteps)

Published models are trained on noisy = alpha(t) * latents + sigma(t) * noise. `Diffusion` and `Flow` know the two
factors; `Process` derives the target, x0 and the signal-to-noise ratio (SNR) from them.
"""

import torch
from torch import Tensor

from ..errors import InputError
from ..losses.base import has_values

# Below this share of signal, 1 in 10,000, dividing the noise prediction by it leaves no picture to score.
MIN_SIGNAL = 1e-4
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class Process:
    """A blend of latents and noise; subclasses give `factors`.

    Attributes:
        prediction_type: what the model predicts: one of PREDICTION_TYPES, or "flow", noise - latents.
        num_train_timesteps: length of the schedule.
    """

    prediction_type: str
    num_train_timesteps: int

    def factors(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at the timesteps, (B,) float32 each, on their device."""
        raise NotImplementedError

    def snr(self, timesteps: Tensor) -> Tensor:
        """(alpha / sigma)^2, (B,) float32."""
        alpha, sigma = self.factors(timesteps)
        return (alpha / sigma).square()

    def draw(self, count: int, rng: torch.Generator) -> Tensor:
        """Timesteps to train at, (count,), drawn uniformly with a generator of the CPU."""
        return torch.randint(self.num_train_timesteps, (count,), generator=rng)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        alpha, sigma = self._factors_like(latents, timesteps)
        return alpha * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The tensor that the model is trained to predict from the noisy latents."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        if self.prediction_type == "flow":
            return noise - latents
        alpha, sigma = self._factors_like(latents, timesteps)
        return alpha * noise - sigma * latents

    def predict_x0(self, model_pred: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """The clean latents that a prediction stands for, row by row, in float32.

        An epsilon prediction where no signal is left (zero-terminal SNR) stands for no latents: `InputError`.
        """
        model_pred, noisy_latents = model_pred.float(), noisy_latents.float()
        if self.prediction_type == "sample":
            return model_pred
        alpha, sigma = self._factors_like(model_pred, timesteps)
        if self.prediction_type == "flow":
            return noisy_latents - sigma * model_pred
        if self.prediction_type == "v_prediction":
            return alpha * noisy_latents - sigma * model_pred
        if has_values(alpha) and (alpha == 0).any():
            raise InputError(
                "an epsilon prediction at zero SNR does not determine x0; use v_prediction with this schedule"
            )
        return (noisy_latents - sigma * model_pred) / alpha

    def may_score(self, timesteps: Tensor, min_snr: float = 0.0) -> Tensor:
        """Return which rows can be scored, (B,) bool: an SNR of `min_snr`, and for epsilon at least MIN_SIGNAL."""
        alpha, sigma = (factor.square() for factor in self.factors(timesteps))
        is_open = alpha >= min_snr * sigma
        return is_open & (alpha >= MIN_SIGNAL) if self.prediction_type == "epsilon" else is_open

    def min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Min-SNR weights (B,) of the denoising loss (Hang et al. 2023, section 3.4), finite at zero SNR.

        For flow, where the paper gives none: those of the same error of x0.
        """
        snr = self.snr(timesteps)
        if self.prediction_type == "epsilon":
            return (gamma / snr).clamp(max=1)
        capped = snr.clamp(max=gamma)
        if self.prediction_type == "v_prediction":
            return capped / (snr + 1)
        return capped * self.factors(timesteps)[1].square() if self.prediction_type == "flow" else capped

    def _factors_like(self, latents: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma, (B, 1, 1, 1) beside latents (B, C, h, w)."""
        alpha, sigma = self.factors(timesteps.to(latents.device))
        shape = (-1, *[1] * (latents.ndim - 1))
        return alpha.view(shape), sigma.view(shape)


class Diffusion(Process):
    """alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar) (Ho et al. 2020), as in `DDPMScheduler`."""

    def __init__(self, noise_scheduler):
        self.noise_scheduler = noise_scheduler
        self.num_train_timesteps = noise_scheduler.config.num_train_timesteps
        self.prediction_type = noise_scheduler.config.prediction_type
        if self.prediction_type not in PREDICTION_TYPES:
            raise InputError(
                f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}; got {self.prediction_type!r}"
            )

    def factors(self, timesteps):
        alpha_bar = self._alpha_bar(timesteps)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def snr(self, timesteps):
        alpha_bar = self._alpha_bar(timesteps)
        return alpha_bar / (1 - alpha_bar)  # not from the roots, which would round

    def _alpha_bar(self, timesteps):
        return self.noise_scheduler.alphas_cumprod.to(timesteps.device, torch.float32)[timesteps]


class Flow(Process):
    """alpha = 1 - sigma, sigma = t / num_train_timesteps (Lipman et al. 2023): `FlowMatchEulerDiscreteScheduler`.

    Timesteps are floats in (0, num_train_timesteps], after the scheduler's shift.
    """

    prediction_type = "flow"

    def __init__(self, noise_scheduler):
        self.noise_scheduler = noise_scheduler
        self.num_train_timesteps = noise_scheduler.config.num_train_timesteps

    def factors(self, timesteps):
        sigma = timesteps.float() / self.num_train_timesteps
        return 1 - sigma, sigma

    def draw(self, count, rng):
        """Logit-normal (Esser et al. 2024, section 3.1), through the scheduler's shift."""
        share = torch.sigmoid(torch.randn(count, generator=rng))
        return self.noise_scheduler.timesteps[(share * self.num_train_timesteps).long()]


def process_of(noise_scheduler) -> Process:
    """Return the noise process of a diffusers scheduler; `InputError` for an unknown kind."""
    if hasattr(noise_scheduler, "alphas_cumprod"):
        return Diffusion(noise_scheduler)
    if type(noise_scheduler).__name__.startswith("FlowMatch"):
        return Flow(noise_scheduler)
    raise InputError(f"{type(noise_scheduler).__name__} is neither a DDPM nor a flow-matching scheduler")
