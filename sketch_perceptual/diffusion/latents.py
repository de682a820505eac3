"""Images to the latents that a model is trained on, and back: the only place that knows a VAE's scale and layout."""

import torch
from torch import Tensor, nn

from ..errors import InputError

# What diffusers clamps a posterior's log variance to; the least is none.
LOG_VARIANCE = (-30.0, 20.0)
# By name, so that a loss needs no diffusers.
VAES = {"AutoencoderKL", "AsymmetricAutoencoderKL", "AutoencoderTiny"}


class Latents:
    """The latents of a VAE, scaled and shifted as models are trained on them: (z - shift_factor) * scaling_factor.

    Args:
        vae: diffusers' `AutoencoderKL` or `AutoencoderTiny`; `InputError` for others. It is used as it is, on its
            device and in its dtype.

    Attributes:
        channels: of a latent, 4 for SD-1.5.
        pixels: of an image that a latent's side stands for, 8 for SD-1.5.
    """

    def __init__(self, vae, argument: str = "vae"):
        if not VAES & {kind.__name__ for kind in type(vae).__mro__}:
            raise InputError(
                f"`{argument}` must be diffusers' AutoencoderKL or AutoencoderTiny, got {type(vae).__name__} (unwrap"
                " what is compiled or distributed; VAEs of videos are not known)"
            )
        if getattr(vae.config, "latents_mean", None):
            raise InputError(f"`{argument}` has a latents_mean for each channel, which is not supported")
        self.vae = vae
        self.channels = vae.config.latent_channels
        blocks = getattr(vae.config, "block_out_channels", None) or vae.config.down_block_out_channels
        self.pixels = 2 ** (len(blocks) - 1)
        self.scale = vae.config.scaling_factor
        self.shift = getattr(vae.config, "shift_factor", None) or 0.0

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> moments: mean and log variance (B, 2 * channels, h, w) of z, not scaled.

        In the encoder's dtype. An `AutoencoderTiny` encodes without a variance.
        """
        encoded = self.vae.encode(images.to(dtype_of(self.vae.encoder)))
        if hasattr(encoded, "latent_dist"):
            return encoded.latent_dist.parameters
        return torch.cat([encoded.latents, torch.full_like(encoded.latents, LOG_VARIANCE[0])], 1)

    def mean(self, moments: Tensor) -> Tensor:
        """Moments -> latents (B, channels, h, w) without a random draw."""
        return self._scaled(moments.chunk(2, dim=1)[0])

    def sample(self, moments: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Moments -> latents (B, channels, h, w), drawn with a generator of the CPU."""
        mean, log_variance = moments.chunk(2, dim=1)
        noise = torch.randn(mean.shape, generator=rng, dtype=mean.dtype).to(mean.device)
        return self._scaled(mean + (0.5 * log_variance.clamp(*LOG_VARIANCE)).exp() * noise)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> images (B, 3, H, W) about [-1, 1], not clamped, in the decoder's dtype, with autocast off."""
        with torch.autocast(latents.device.type, enabled=False):
            z = latents.to(dtype_of(self.vae.decoder)) / self.scale
            return self.vae.decode(z + self.shift if self.shift else z).sample

    def cast_decoder(self, dtype: torch.dtype) -> None:
        """Bring the decoding half of the VAE to `dtype`; float16 overflows in it."""
        self.vae.decoder.to(dtype)
        if getattr(self.vae, "post_quant_conv", None) is not None:
            self.vae.post_quant_conv.to(dtype)

    def _scaled(self, z: Tensor) -> Tensor:
        return (z - self.shift if self.shift else z) * self.scale


def dtype_of(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype
