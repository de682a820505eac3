"""The perceptual term of a latent diffusion run (Seo 2025, section 4.1): predicted x0, decoded, scored.

    perceptual_term = PerceptualTerm(perceptual_loss, vae, noise_scheduler)
    loss = perceptual_term.add(loss, model_pred, noisy_latents, timesteps, images, weight=0.3)

Latents are scaled as the model is trained on them.
"""

import math
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..losses.base import has_values, name_of, one_per_image, spans_zero_to_one
from .balance import balance
from .checks import check_batch, check_returns, check_scheduler
from .latents import Latents, dtype_of
from .process import Diffusion, Process, process_of

# What counts of a square, at the least: a few pixels of it are not to count as much as a whole.
MIN_SHARE = 1 / 64
# Pixels around a square that are decoded and not scored: without them TAESD's square is off by more than TAESD itself.
MARGIN = 16

Square = tuple[Tensor, list[int]]  # first row and column of each square, (B, 2), and its height and width


def predict_x0(model_pred: Tensor, noisy_latents: Tensor, timesteps: Tensor, noise_scheduler) -> Tensor:
    """The clean latents that a prediction stands for, row by row, in float32.

    Exact for "epsilon", "v_prediction" (Salimans & Ho 2022) and "sample". An epsilon prediction where no signal is
    left (zero-terminal SNR) stands for no latents at all and is an `InputError`.
    """
    return process_of(noise_scheduler).predict_x0(model_pred, noisy_latents, timesteps)


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
        noise_scheduler: the training scheduler, which adds noise as `DDPMScheduler` does; or its `Process`.
        min_snr: the gate: rows with SNR = alpha_bar / (1 - alpha_bar) at or above this; 1 is t <= 353 on SD-1.5,
            0 is no gate (the paper). An epsilon prediction is never scored below a signal share of 1e-4.
        max_timestep: a gate by timestep instead: rows with t <= max_timestep.
        start_step, every: rows count only from this training step on, in each `every`-th step.
        target: "image", or "reconstruction": the image through the VAE and back, so that the decoder's own loss of
            detail is not held against the prediction.
        decoder: another decoder for the same latents, e.g. an `AutoencoderTiny`; None is the VAE's.
        dtype: torch.float32 or torch.bfloat16. VAE decoders overflow in float16.
        crop: compare a square of this many pixels a side, another for each row, where the image is larger: half of the
            squares are drawn in proportion to their ink, half anywhere. 16 more pixels on each side are decoded, since
            a decoder sees less at an edge.
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
        if not isinstance(noise_scheduler, Process):
            check_scheduler(noise_scheduler)
        elif not isinstance(noise_scheduler, Diffusion):
            raise InputError(f"the perceptual term needs a `Diffusion` process, got {type(noise_scheduler).__name__}")
        self.latents = Latents(vae)
        pixels = self.latents.pixels
        if crop is not None and (not isinstance(crop, int) or crop < 16 or crop % pixels):
            raise InputError(
                f"the perceptual term's `crop` must be an integer of 16 pixels or more and a multiple of {pixels}, got"
                f" {crop!r}"
            )
        self.decoder = self.latents if decoder is None else Latents(decoder, "decoder")
        if (self.decoder.channels, self.decoder.pixels) != (self.latents.channels, pixels):
            raise InputError("`decoder` decodes latents of other channels or of another size than those of `vae`")
        self.loss = loss
        self.process = noise_scheduler if isinstance(noise_scheduler, Process) else process_of(noise_scheduler)
        self.start_step, self.every, self.target, self.dtype = start_step, every, target, dtype
        self.crop = crop
        _freeze(self.decoder, dtype, checkpoint)
        device = next(vae.parameters()).device
        if isinstance(loss, nn.Module):
            loss.to(device, dtype).requires_grad_(False).eval()
        check_returns(loss, device, dtype)
        self.warns_of_range = True
        self.open = self._open_timesteps(min_snr, max_timestep)
        self.first_open = int(self.open.nonzero()[0])

    def _open_timesteps(self, min_snr: float, max_timestep: int | None) -> Tensor:
        timesteps = torch.arange(self.process.num_train_timesteps)
        is_open = self.process.may_score(timesteps, min_snr if max_timestep is None else 0.0)
        if max_timestep is not None:
            is_open &= timesteps <= max_timestep
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
        check_batch(model_pred, noisy_latents, timesteps, images, masks, self.latents)
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
        latents = self.process.predict_x0(model_pred, noisy_latents, timesteps)
        images = images if masks is None else torch.cat([images, masks.to(images)], 1)
        # a script may have cast its VAE since, a pipeline does after drawing
        if dtype_of(self.decoder.vae.decoder) != self.dtype:
            self.decoder.cast_decoder(self.dtype)
        scored: Square | None = None
        if self.crop is not None and self.crop < max(images.shape[-2:]):
            latents, images, scored = self._random_squares(latents, images, generator)
        with torch.autocast(model_pred.device.type, enabled=False):
            target = self._target(images[:, :3]).to(self.dtype)
            decoded = self.decoder.decode(latents)
            if scored is not None:
                decoded, target, images = (cut_squares(x, *scored) for x in (decoded, target, images))
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

    def _random_squares(self, latents: Tensor, images: Tensor, generator) -> tuple[Tensor, Tensor, Square]:
        """Cut a window of each row, and return where in it, in pixels, the square is that counts."""
        pixels = self.latents.pixels
        margin, whole = MARGIN // pixels, latents.shape[-2:]
        side = [min(self.crop // pixels, length) for length in whole]
        window = [min(length + 2 * margin, most) for length, most in zip(side, whole, strict=True)]
        starts = draw_squares(images, side, pixels, generator)
        last = torch.tensor([most - length for length, most in zip(window, whole, strict=True)])
        firsts = (starts - margin).clamp(min=0).minimum(last)
        cut = (
            cut_squares(latents, firsts, window),
            cut_squares(images, pixels * firsts, [pixels * length for length in window]),
        )
        return *cut, (pixels * (starts - firsts), [pixels * length for length in side])

    @torch.no_grad()
    def _target(self, images: Tensor) -> Tensor:
        if self.target == "image":
            return images
        return self.decoder.decode(self.latents.mean(self.latents.encode(images))).clamp(-1, 1)


def _freeze(decoder: Latents, dtype: torch.dtype, checkpoint: bool) -> None:
    decoder.vae.requires_grad_(False)
    decoder.cast_decoder(dtype)
    if checkpoint:
        decoder.vae.enable_gradient_checkpointing()
        # AutoencoderTiny's encoder skips its input scaling while checkpointing; encoding needs no gradient anyway.
        decoder.vae.encoder.gradient_checkpointing = False


def draw_squares(images: Tensor, side: list[int], pixels: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw a square in each image: half of them in proportion to their ink, half anywhere.

    Ink is the difference from the median, which is paper of any tone.

    Args:
        images: (B, 3, H, W) in [-1, 1], or (B, 4, H, W) with a mask of what counts, to which both halves keep.
        side: height and width of a square in latents of `pixels` a side, on whose grid it lies.

    Returns:
        Its first row and column in latents, (B, 2) on the CPU.
    """
    grey = images[:, :3].float().mean(1, keepdim=True)
    ink = (grey - grey.flatten(1).median(1).values.view(-1, 1, 1, 1)).abs()
    counts = images[:, 3:].float() if images.shape[1] > 3 else torch.ones_like(ink)
    tiny = torch.finfo(torch.float32).tiny

    def shares(x: Tensor) -> Tensor:
        squares = F.avg_pool2d(F.avg_pool2d(x, pixels), side, stride=1).flatten(1).cpu()
        return squares / squares.sum(1, keepdim=True).clamp(min=tiny)

    odds = shares(ink * counts) + shares(counts) + tiny
    chosen = _multinomial(odds, generator)
    columns = grey.shape[-1] // pixels - side[1] + 1
    return torch.stack([chosen // columns, chosen % columns], 1)


def cut_squares(x: Tensor, starts: Tensor, size: list[int]) -> Tensor:
    """Cut a rectangle of `size` from each image of (B, C, H, W), beginning at `starts`, (B, 2)."""
    rows, columns = (
        (start[:, None] + torch.arange(length)).to(x.device) for start, length in zip(starts.T, size, strict=True)
    )
    return x.take_along_dim(rows[:, None, :, None], 2).take_along_dim(columns[:, None, None], 3)


def _multinomial(odds: Tensor, generator: torch.Generator | None) -> Tensor:
    if generator is None:  # no generator can be traced, not even None
        return torch.multinomial(odds, 1)[:, 0]
    return torch.multinomial(odds, 1, generator=generator)[:, 0]
