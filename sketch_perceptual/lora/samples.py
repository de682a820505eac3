"""Samples and losses of a training step."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Sample:
    """Latents, noise and timesteps of a batch.

    Args:
        latents, noise: (B, C, h, w) float32.
        timesteps: (B,).
        prompt_embeds: embeddings of the captions.
        images: (B, 3, H, W) in [-1, 1]; needed only where they are scored.
        masks: (B, 1, H, W) in [0, 1], weights of the pixels; None for 1 everywhere.
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
        """Average errors (B, C, h, w) over each row, weighted by the masks: (B,)."""
        if self.masks is None:
            return errors.flatten(1).mean(1)
        counts = F.interpolate(self.masks, errors.shape[-2:], mode="area").expand_as(errors).flatten(1)
        return (errors.flatten(1) * counts).sum(1) / counts.sum(1).clamp(min=1)


@dataclass
class Losses:
    """Losses of each row, (B,).

    Args:
        denoising: error of the predicted noise, velocity or x0.
        model_pred: (B, C, h, w), the prediction that both losses depend on.
        timesteps: (B,).
        perceptual: 0 where the gate is shut.
        gated: 1 where it is open, else 0.
    """

    denoising: Tensor
    model_pred: Tensor
    timesteps: Tensor
    perceptual: Tensor
    gated: Tensor
