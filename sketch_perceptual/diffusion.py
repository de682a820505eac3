"""The perceptual term of a latent diffusion run (Seo 2025, section 4.1): predicted x0, decoded, scored.

    perceptual_term = PerceptualTerm(perceptual_loss, vae, noise_scheduler)
    loss = perceptual_term.add(loss, model_pred, noisy_latents, timesteps, images, weight=0.3)

Latents here are already multiplied by the VAE's scaling factor; only `sample_latents` and `decode` know it.
"""

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .diffusion_checks import (
    check_batch,
    check_prediction_type,
    check_returns,
    check_scheduler,
    check_vae,
    latent_layout,
)
from .errors import InputError
from .losses.base import has_values, name_of, one_per_image, spans_zero_to_one

# Below this share of signal, 1 in 10,000, dividing the noise prediction by it leaves no picture to score.
MIN_SIGNAL = 1e-4
# No perceptual loss, 1 for unrelated drawings, counts more: a row that is right already is not to be blown up.
MAX_FACTOR = 1.0
# What counts of a square, at the least: a few pixels of it are not to count as much as a whole.
MIN_SHARE = 1 / 64
# What diffusers clamps a posterior's log variance to; the least is none.
LOG_VARIANCE = (-30.0, 20.0)


def encode_moments(vae, images: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> mean and log variance (B, 8, H/8, W/8) of the posterior, not scaled.

    In the encoder's dtype; what `sample_latents` takes. An `AutoencoderTiny` encodes without a variance.
    """
    encoded = vae.encode(images.to(_dtype(vae.encoder)))
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.parameters
    return torch.cat([encoded.latents, torch.full_like(encoded.latents, LOG_VARIANCE[0])], 1)


def sample_latents(vae, moments: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Mean and log variance (B, 8, h, w) -> scaled latents (B, 4, h, w), drawn with a `generator` of the CPU."""
    mean, log_variance = moments.chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype).to(mean.device)
    return (mean + (0.5 * log_variance.clamp(*LOG_VARIANCE)).exp() * noise) * vae.config.scaling_factor


def decode(vae, latents: Tensor) -> Tensor:
    """Scaled latents -> (B, 3, H, W) about [-1, 1], not clamped, in the decoder's dtype, autocast off.

    `vae` is an `AutoencoderKL` or an `AutoencoderTiny`, whose scaling factor is 1.
    """
    with torch.autocast(latents.device.type, enabled=False):
        return vae.decode(latents.to(_dtype(vae.decoder)) / vae.config.scaling_factor).sample


def cast_decoder(vae, dtype: torch.dtype) -> None:
    """Bring the decoding half of an `AutoencoderKL` or `AutoencoderTiny` to `dtype`; it overflows in float16."""
    vae.decoder.to(dtype)
    if getattr(vae, "post_quant_conv", None) is not None:
        vae.post_quant_conv.to(dtype)


def signal(noise_scheduler, timesteps: Tensor) -> Tensor:
    """alpha_bar at the timesteps: the share of signal in each noisy latent, (B,) float32 on their device."""
    return noise_scheduler.alphas_cumprod.to(timesteps.device, torch.float32)[timesteps]


def predict_x0(model_pred: Tensor, noisy_latents: Tensor, timesteps: Tensor, noise_scheduler) -> Tensor:
    """The clean latents that a prediction stands for, row by row, in float32.

    Exact for "epsilon", "v_prediction" (Salimans & Ho 2022) and "sample". An epsilon prediction where no signal is
    left (zero-terminal SNR) stands for no latents at all and is an `InputError`.
    """
    prediction_type = check_prediction_type(noise_scheduler.config.prediction_type)
    alpha_bar = signal(noise_scheduler, timesteps).view(-1, *[1] * (model_pred.ndim - 1))
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    model_pred, noisy_latents = model_pred.float(), noisy_latents.float()
    if prediction_type == "sample":
        return model_pred
    if prediction_type == "v_prediction":
        return alpha * noisy_latents - sigma * model_pred
    if has_values(alpha_bar) and (alpha_bar == 0).any():
        raise InputError(
            "an epsilon prediction at zero SNR does not determine x0; use v_prediction with this schedule"
        )
    return (noisy_latents - sigma * model_pred) / alpha


def denoising_target(latents: Tensor, noise: Tensor, timesteps: Tensor, noise_scheduler) -> Tensor:
    """What the model is asked to predict from the noisy latents, by the scheduler's prediction type."""
    prediction_type = check_prediction_type(noise_scheduler.config.prediction_type)
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return noise_scheduler.get_velocity(latents, noise, timesteps)
    return latents


def min_snr_weights(timesteps: Tensor, gamma: float, noise_scheduler) -> Tensor:
    """Min-SNR weights (B,) of the denoising loss (Hang et al. 2023, section 3.4), finite at zero SNR."""
    prediction_type = check_prediction_type(noise_scheduler.config.prediction_type)
    alpha_bar = signal(noise_scheduler, timesteps)
    snr = alpha_bar / (1 - alpha_bar)
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1)
    capped = snr.clamp(max=gamma)
    return capped / (snr + 1) if prediction_type == "v_prediction" else capped


def balance(loss: Tensor, values: Tensor, model_pred: Tensor, weight: float) -> tuple[Tensor, dict[str, Tensor]]:
    """`loss`, a scalar, plus `values` (B,), which pull `weight` times as hard as it at each row of `model_pred`.

    A row's factor makes the length of its gradient at the prediction `weight` times that of the gradient of `loss`,
    but is no more than MAX_FACTOR of a mean over rows. What lies between the prediction and `values`, decoder and
    backbone, is passed through backwards here, once; the backward pass of the sum leads from the prediction on.

    Returns the sum and what was reached at each row, (B,), 0 where `values` has no gradient: "factor", of a mean over
    rows; "gradient_ratio" of the lengths, and "gradient_cosine" of the angle between the gradients.
    """
    if loss.ndim:
        raise InputError(f"`loss` must be a scalar, got {tuple(loss.shape)}: take its mean first")
    if weight == 0 or not values.requires_grad:
        return loss, dict.fromkeys(("factor", "gradient_ratio", "gradient_cosine"), torch.zeros_like(values))
    if not loss.requires_grad:
        raise InputError("`loss` carries no gradient, so nothing would be learned: pass it as computed, not detached")
    (pull,) = torch.autograd.grad(values.sum(), model_pred)
    (own,) = torch.autograd.grad(loss, model_pred, retain_graph=True, allow_unused=True)
    if own is None:
        raise InputError(
            "`loss` must be computed from `model_pred`: pass the tensor that it came from, not a copy. A compiled step"
            " cuts the two apart: compile the model, unet = torch.compile(unet), and not the step around it"
        )
    pull, own = pull.float().flatten(1) / len(values), own.float().flatten(1)
    tiny = torch.finfo(torch.float32).tiny
    length, own_length = pull.norm(dim=1), own.norm(dim=1)
    factor = (weight * own_length / length.clamp(min=tiny)).clamp(max=MAX_FACTOR)
    linear = (model_pred.flatten(1) * (factor[:, None] * pull)).sum()  # whose gradient is what the term adds
    return loss + (factor * values).mean().detach() + (linear - linear.detach()), {
        "factor": factor,
        "gradient_ratio": factor * length / own_length.clamp(min=tiny),
        "gradient_cosine": (pull * own).sum(1) / (length * own_length).clamp(min=tiny),
    }


class PerceptualTerm:
    """Scores the image that a prediction stands for: `(model_pred, noisy_latents, timesteps, images) -> (B,)`.

    Rows outside the gate are 0 and cost no decode. Inside, x0 is decoded with gradients through the frozen decoder
    and compared with the image. Decoder and loss run in `dtype` with autocast off, and nothing is clamped: white
    paper sits at the range's edge, where a clamp has no gradient.

    A call traces into one graph (`torch.compile(fullgraph=True)`) and then decodes every row, also those that count 0.
    `add` asks autograd for gradients, which is traced only with `torch._dynamo.config.trace_autograd_ops`: compile the
    model rather than the step.

    Args:
        loss: any callable `(images, target) -> (B,)` or `(B, 1, 1, 1)` on RGB in [-1, 1], e.g. `PerceptualLoss`. It is
            tried here on two small images; a module is frozen.
        vae: the pipeline's `AutoencoderKL` or `AutoencoderTiny`; it is frozen and its decoder cast to `dtype`.
        noise_scheduler: the training scheduler, which adds noise as `DDPMScheduler` does; gives alphas_cumprod and
            the prediction type.
        min_snr: the gate: rows with SNR = alpha_bar / (1 - alpha_bar) at or above this; 1 is t <= 353 on SD-1.5,
            0 is no gate (the paper). An epsilon prediction is never scored below a signal share of 1e-4.
        max_timestep: a gate by timestep instead: rows with t <= max_timestep.
        start_step, every: rows count only from this training step on, in each `every`-th step.
        target: "image", or "reconstruction": the image through the VAE and back, so that the decoder's own loss of
            detail is not held against the prediction.
        decoder: another decoder for the same latents, e.g. an `AutoencoderTiny`; None is the VAE's.
        dtype: torch.float32 or torch.bfloat16. VAE decoders overflow in float16.
        crop: decode and compare a random square of this many pixels a side, another for each row, where the image is
            larger. At the square's edges the decoder sees less than it would in the whole.
        checkpoint: recompute the decoder's activations in the backward pass instead of keeping them.
    """

    def __init__(
        self,
        loss: Callable[[Tensor, Tensor], Tensor],
        vae,
        noise_scheduler,
        *,
        min_snr: float = 0.0,
        max_timestep: int | None = None,
        start_step: int = 0,
        every: int = 1,
        target: str = "image",
        decoder=None,
        dtype: torch.dtype = torch.float32,
        crop: int | None = None,
        checkpoint: bool = False,
    ):
        if dtype not in (torch.float32, torch.bfloat16):
            raise InputError(f"the perceptual term runs in float32 or bfloat16, not {dtype}")
        if target not in ("image", "reconstruction"):
            raise InputError(f'the perceptual target must be "image" or "reconstruction", got {target!r}')
        if every < 1 or start_step < 0 or min_snr < 0:
            raise InputError("the perceptual term needs every >= 1, start_step >= 0 and min_snr >= 0")
        check_scheduler(noise_scheduler)
        check_vae(vae)
        _, self.pixels = latent_layout(vae)
        if crop is not None and (not isinstance(crop, int) or crop < 16 or crop % self.pixels):
            raise InputError(
                f"the perceptual term's `crop` must be an integer of 16 pixels or more and a multiple of"
                f" {self.pixels}, got {crop!r}"
            )
        if decoder is not None:
            check_vae(decoder, "decoder")
            if latent_layout(decoder) != latent_layout(vae):
                raise InputError("`decoder` decodes latents of other channels or of another size than those of `vae`")
        self.loss, self.vae, self.noise_scheduler = loss, vae, noise_scheduler
        self.start_step, self.every, self.target, self.dtype = start_step, every, target, dtype
        self.crop = crop
        self.decoder = _frozen_decoder(vae if decoder is None else decoder, dtype, checkpoint)
        device = next(vae.parameters()).device
        if isinstance(loss, nn.Module):
            loss.to(device, dtype).requires_grad_(False).eval()
        check_returns(loss, device, dtype)
        self.warns_of_range = True
        self.open = self._open_timesteps(min_snr, max_timestep)
        self.first_open = int(self.open.nonzero()[0])

    def _open_timesteps(self, min_snr: float, max_timestep: int | None) -> Tensor:
        timesteps = torch.arange(self.noise_scheduler.config.num_train_timesteps)
        alpha_bar = signal(self.noise_scheduler, timesteps)
        is_open = alpha_bar >= min_snr * (1 - alpha_bar) if max_timestep is None else timesteps <= max_timestep
        if self.noise_scheduler.config.prediction_type == "epsilon":
            is_open &= alpha_bar >= MIN_SIGNAL
        if not is_open.any():
            raise InputError(f"the gate never opens: min_snr={min_snr}, max_timestep={max_timestep}")
        return is_open

    def gate(self, timesteps: Tensor, step: int | None = None) -> Tensor:
        """Rows that are scored, (B,) bool on the CPU; `step` counts from 0 and is needed by start_step and every."""
        if step is None:
            if self.start_step > 0 or self.every > 1:
                raise InputError("start_step and every need the training step: perceptual_term(..., step=global_step)")
        elif step < self.start_step or (step - self.start_step) % self.every:
            return torch.zeros(len(timesteps), dtype=torch.bool)
        if torch.compiler.is_compiling():
            return self.open.to(timesteps.device)[timesteps]
        timesteps = timesteps.cpu()
        if timesteps.is_floating_point() or ((timesteps < 0) | (timesteps >= len(self.open))).any():
            raise InputError(f"`timesteps` must be integers from 0 to {len(self.open) - 1}")
        return self.open[timesteps]

    def __call__(
        self,
        model_pred: Tensor,
        noisy_latents: Tensor,
        timesteps: Tensor,
        images: Tensor,
        step: int | None = None,
        generator: torch.Generator | None = None,
        masks: Tensor | None = None,
    ) -> Tensor:
        """The loss of each row, (B,) float32, exactly 0 where the gate is shut.

        Args:
            model_pred: the denoiser's output (B, 4, h, w), of the scheduler's prediction type.
            noisy_latents: its input (B, 4, h, w).
            timesteps: (B,) integers.
            images: the clean images (B, 3, H, W) in [-1, 1].
            step: the training step, from 0.
            generator: of the CPU; draws the squares of `crop`.
            masks: what counts of the images, (B, 1, H, W) in [0, 1]. Elsewhere the prediction is taken to be right,
                and the loss is divided by the share that counts.
        """
        check_batch(model_pred, noisy_latents, timesteps, images, masks, self.vae)
        self._warn_of_range(images)
        is_open = self.gate(timesteps, step)
        if torch.compiler.is_compiling():  # shapes that depend on values cannot be traced
            timesteps = timesteps.where(is_open.to(timesteps.device), self.first_open)
            values = self._score(model_pred, noisy_latents, timesteps, images, masks, generator)
            return values.where(is_open.to(values.device), 0)
        per_row = model_pred.new_zeros(len(model_pred), dtype=torch.float32)
        rows = is_open.nonzero().flatten().to(model_pred.device)
        if len(rows) == 0:
            return per_row
        model_pred, noisy_latents, timesteps, images = (
            x[rows] for x in (model_pred, noisy_latents, timesteps, images)
        )
        masks = None if masks is None else masks[rows]
        values = self._score(model_pred, noisy_latents, timesteps, images, masks, generator)
        return per_row.index_put((rows,), values)

    def _score(self, model_pred, noisy_latents, timesteps, images, masks, generator) -> Tensor:
        """The loss of each row, (B,) float32, whatever the gate."""
        latents = predict_x0(model_pred, noisy_latents, timesteps, self.noise_scheduler)
        images = images if masks is None else torch.cat([images, masks.to(images)], 1)
        # a script may have cast its VAE since, a pipeline does after drawing
        if _dtype(self.decoder.decoder) != self.dtype:
            cast_decoder(self.decoder, self.dtype)
        if self.crop is not None:
            latents, images = self._random_squares(latents, images, self.crop // self.pixels, generator)
        with torch.autocast(model_pred.device.type, enabled=False):
            target = self._target(images[:, :3]).to(self.dtype)
            decoded = decode(self.decoder, latents)
            if masks is None:
                return self._compare(decoded, target)
            counts = images[:, 3:].to(self.dtype)
            values = self._compare(target + counts * (decoded - target), target)
            return values / counts.float().mean((1, 2, 3)).clamp(min=MIN_SHARE)

    def _compare(self, images: Tensor, target: Tensor) -> Tensor:
        return one_per_image(self.loss(images, target), images, name_of(self.loss)).float()

    def _warn_of_range(self, images: Tensor) -> None:
        """Warn at the first call, and look at no later one: it would wait for the GPU."""
        if self.warns_of_range and has_values(images):
            self.warns_of_range = False
            if spans_zero_to_one(*images.detach().float().aminmax()):
                warnings.warn("`images` of the perceptual term span [0, 1]; the range here is [-1, 1]", stacklevel=3)

    def add(
        self,
        loss: Tensor,
        model_pred: Tensor,
        noisy_latents: Tensor,
        timesteps: Tensor,
        images: Tensor,
        weight: float = 0.3,
        step: int | None = None,
        generator: torch.Generator | None = None,
        masks: Tensor | None = None,
    ) -> Tensor:
        """`loss` plus the term, which pulls `weight` times as hard as `loss` at each scored row of the prediction.

        Args:
            loss: the scalar denoising loss, computed from `model_pred` and perhaps from more, such as a prior.
            weight: length of the term's gradient at the prediction over that of `loss`, row by row; 0 returns `loss`.
            model_pred, noisy_latents, timesteps, images, step, generator, masks: those of a call.
        """
        if not (isinstance(weight, int | float) and 0 <= weight < math.inf):
            raise InputError(f"`weight` must be a number of at least 0, got {weight!r}")
        if weight == 0:
            return loss
        if torch.is_grad_enabled() and not model_pred.requires_grad:
            raise InputError(
                "`model_pred` carries no gradient, so nothing would be learned: pass it as the model returned it, not"
                " detached; validate under torch.no_grad()"
            )
        values = self(model_pred, noisy_latents, timesteps, images, step, generator, masks)
        if torch.is_grad_enabled() and not values.requires_grad and self.gate(timesteps, step).any():
            raise InputError(
                f"the perceptual loss {name_of(self.loss)} must carry a gradient to the images: return its values not"
                " detached, and not computed under torch.no_grad()"
            )
        return balance(loss, values, model_pred, weight)[0]

    def _random_squares(self, latents: Tensor, images: Tensor, side: int, generator) -> tuple[Tensor, Tensor]:
        sizes = [min(side, whole) for whole in latents.shape[-2:]]
        starts = [
            _randint(whole - size + 1, len(latents), generator).to(latents.device)
            for whole, size in zip(latents.shape[-2:], sizes, strict=True)
        ]

        def cut(x: Tensor, pixels: int) -> Tensor:
            lines, columns = (
                pixels * start[:, None] + torch.arange(pixels * size, device=x.device)
                for start, size in zip(starts, sizes, strict=True)
            )
            return x.take_along_dim(lines[:, None, :, None], 2).take_along_dim(columns[:, None, None], 3)

        return cut(latents, 1), cut(images, self.pixels)

    @torch.no_grad()
    def _target(self, images: Tensor) -> Tensor:
        if self.target == "image":
            return images
        mean = encode_moments(self.vae, images).chunk(2, dim=1)[0]
        return decode(self.decoder, mean * self.vae.config.scaling_factor).clamp(-1, 1)


def _frozen_decoder(vae, dtype: torch.dtype, checkpoint: bool):
    vae.requires_grad_(False)
    cast_decoder(vae, dtype)
    if checkpoint:
        vae.enable_gradient_checkpointing()
        # AutoencoderTiny's encoder skips its input scaling while checkpointing; encoding needs no gradient anyway.
        vae.encoder.gradient_checkpointing = False
    return vae


def _randint(high: int, count: int, generator: torch.Generator | None) -> Tensor:
    if generator is None:  # no generator can be traced, not even None
        return torch.randint(high, (count,))
    return torch.randint(high, (count,), generator=generator)


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype
