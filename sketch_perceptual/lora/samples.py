"""What a training step is made of: a sample of noisy latents, and the losses there."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Sample:
    """A batch at timesteps that were drawn.

    Args:
        latents, noise: (B, C, h, w) float32.
        timesteps: (B,).
        prompt_embeds: what the model is conditioned on.
        images: (B, 3, H, W) in [-1, 1]; needed only where they are scored.
        masks: (B, 1, H, W) in [0, 1], what counts of the images; None for all.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    prompt_embeds: Tensor
    images: Tensor | None = None
    masks: Tensor | None = None

    def to(self, device: torch.device) -> "Sample":
        moved = {name: x.to(device) for name, x in vars(self).items() if x is not None}
        return replace(self, **moved)

    def mean(self, errors: Tensor) -> Tensor:
        """Errors (B, C, h, w) -> their mean where the masks count, (B,)."""
        if self.masks is None:
            return errors.flatten(1).mean(1)
        counts = F.interpolate(self.masks, errors.shape[-2:], mode="area").expand_as(errors).flatten(1)
        return (errors.flatten(1) * counts).sum(1) / counts.sum(1).clamp(min=1)


@dataclass
class Losses:
    """Losses of each row, (B,), and what they were computed from.

    Args:
        denoising: of the noise, the velocity or x0.
        model_pred: (B, C, h, w), which both losses pull at.
        timesteps: (B,).
        perceptual: 0 where the gate is shut.
        gated: 1 where it is open, else 0.
    """

    denoising: Tensor
    model_pred: Tensor
    timesteps: Tensor
    perceptual: Tensor
    gated: Tensor
