"""Checks of what a perceptual term is given: loss, scheduler, and tensors that must match."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, first_line
from ..losses.base import name_of, one_per_image
from .latents import Latents
from .process import Diffusion

TRIAL_SIDES = (64, 256)  # pixels; losses of several scales need more than the first


def check_returns(loss: Callable[[Tensor, Tensor], Any], device: torch.device, dtype: torch.dtype) -> None:
    """InputError unless a loss returns one number an image; tried on two small ones, without a gradient.

    A loss that fails on every size tried, as one for 224 px does, is not judged.
    """
    if not callable(loss) or isinstance(loss, type):
        raise InputError(f"`loss` must be a callable (images, target) -> (B,), got {loss!r}")
    for pixels in TRIAL_SIDES:
        ramp = torch.linspace(-1, 1, pixels, device=device, dtype=dtype).expand(2, 3, pixels, pixels)
        try:
            with _trial(ramp.device):
                value = loss(ramp.mT.clone(), ramp.clone())
        except (AssertionError, RuntimeError, ValueError):
            continue
        except Exception as error:
            raise InputError(
                f"`loss`, {name_of(loss)}, fails on images of {tuple(ramp.shape)} in {dtype}:"
                f" {type(error).__name__}: {first_line(error)}"
            ) from error
        one_per_image(value, ramp, f"`loss`, {name_of(loss)},")
        return


@contextmanager
def _trial(device: torch.device):
    """No gradient, no autocast, and a script's own draws stay what they are."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def check_scheduler(noise_scheduler) -> None:
    """InputError unless it adds noise as sqrt(alpha_bar) * latents + sqrt(1 - alpha_bar) * noise (Ho et al. 2020)."""
    name = type(noise_scheduler).__name__
    if not hasattr(noise_scheduler, "alphas_cumprod"):
        raise InputError(
            f"{name} has no alphas_cumprod: the term needs a scheduler like DDPMScheduler, not flow matching"
        )
    Diffusion(noise_scheduler)  # checks its prediction_type
    timestep = torch.tensor([noise_scheduler.config.num_train_timesteps // 4])
    alpha_bar = noise_scheduler.alphas_cumprod[timestep].float().view(1, 1, 1, 1).cpu()
    one = torch.ones_like(alpha_bar)
    for latents, noise, expected in ((one, 0 * one, alpha_bar), (0 * one, one, 1 - alpha_bar)):
        noisy = noise_scheduler.add_noise(latents, noise, timestep)
        if not torch.allclose(noisy.float().square(), expected, atol=1e-3):
            raise InputError(
                f"{name} does not add noise as DDPMScheduler does (samplers often add"
                " sigma * noise): train with DDPMScheduler.from_config(noise_scheduler.config)"
            )


def check_batch(
    model_pred: Tensor, noisy_latents: Tensor, timesteps: Tensor, images: Tensor, masks, latents: Latents
) -> None:
    """InputError unless these belong together: latents of the VAE, and the images that they are latents of."""
    named = {"model_pred": model_pred, "noisy_latents": noisy_latents, "timesteps": timesteps, "images": images}
    for name, x in named.items():
        if not isinstance(x, Tensor) or x.ndim == 0:
            got = "a scalar" if isinstance(x, Tensor) else type(x).__name__
            raise InputError(f"`{name}` must be a tensor with one row for each sample, got {got}")
    rows = {name: len(x) for name, x in named.items()}
    if len(set(rows.values())) > 1:
        raise InputError(
            f"{', '.join(f'`{name}` has {count}' for name, count in rows.items())} rows; all must be of the same"
            " samples: with prior preservation the first half, noisy_latents[:len(model_pred)] and so on"
        )
    channels, pixels = latents.channels, latents.pixels
    for name, x in (("model_pred", model_pred), ("noisy_latents", noisy_latents)):
        if x.ndim != 4 or x.shape[1] != channels or x.shape != model_pred.shape:
            raise InputError(
                f"`{name}` must be latents of the VAE, {_shape(len(x), channels, *model_pred.shape[2:4])}, without a"
                f" variance, mask or control image beside them; got {_shape(*x.shape)}"
            )
    size = [side * pixels for side in model_pred.shape[2:]]
    for name, x, depth in (("images", images, 3), ("masks", masks, 1)):
        if x is not None and x.shape != (len(model_pred), depth, *size):
            raise InputError(
                f"`{name}` must be {_shape(len(model_pred), depth, *size)}, {pixels} times as large as the latents:"
                f" those of the images that were encoded; got {_shape(*x.shape)}"
            )


def _shape(*sides: int) -> str:
    return f"({', '.join(map(str, sides))})"
