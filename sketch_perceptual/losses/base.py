"""What all losses here share: checked inputs, eval mode, float32 results."""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError


class ImageLoss(nn.Module):
    """Base of the losses here: checks its inputs, stays in eval mode, and computes with autocast off.

    Call with images and target, RGB or grey in [-1, 1], (B, 3, H, W) or (B, 1, H, W); returns (B,) in float32, 0 on
    equal images and about 1 on unrelated drawings. The gradient reaches `images` alone. Subclasses write
    `compare(images, target)` for two RGB batches of one shape.

    Args:
        resolution: images whose shorter side is longer are shrunk to it (bilinear, antialiased); never enlarged.
            None leaves them as they are.
    """

    def __init__(self, resolution: int | None = None):
        super().__init__()
        if resolution is not None and resolution < 16:
            raise InputError(f"`resolution` must be at least 16 pixels or None, got {resolution}")
        self.resolution = resolution

    def compare(self, images: Tensor, target: Tensor):
        raise NotImplementedError

    def forward(self, images: Tensor, target: Tensor, **options):
        check_images(images, target)
        weight = next(self.parameters(), images.new_zeros((), dtype=torch.float32))
        if weight.device != images.device:
            self.to(images.device)
        with torch.autocast(images.device.type, enabled=False):
            images, target = (
                self._shrink(x.float().expand(-1, 3, -1, -1)).to(weight.dtype) for x in (images, target.detach())
            )
            return self.compare(images, target, **options)

    def train(self, mode: bool = True):
        """Stays in eval mode, whatever a parent module does."""
        return super().train(False)

    def _shrink(self, x: Tensor) -> Tensor:
        shorter = min(x.shape[-2:])
        if self.resolution is None or shorter <= self.resolution:
            return x
        size = [round(side * self.resolution / shorter) for side in x.shape[-2:]]
        return F.interpolate(x, size, mode="bilinear", antialias=True)


def check_images(images: Tensor, target: Tensor) -> None:
    """Refuse what is not two batches of RGB or grey in [-1, 1]; only the target's values are checked.

    A prediction may leave the range, and one that is not finite is the training loop's to skip.
    """
    for what, x in (("images", images), ("target", target)):
        if not x.is_floating_point():
            raise InputError(
                f"{what} must be floating point in [-1, 1], got {x.dtype}: use sketch_perceptual.to_tensor"
            )
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise InputError(f"{what} must be (B, 3, H, W), or (B, 1, H, W) if grey, got {tuple(x.shape)}")
    if images.shape[0] != target.shape[0] or images.shape[2:] != target.shape[2:]:
        raise InputError(f"images and target must have one size, got {tuple(images.shape)} and {tuple(target.shape)}")
    low, high = target.detach().aminmax()
    if not (low >= -1.1 and high <= 1.1):
        raise InputError(f"target must lie in [-1, 1], got {low:.4g} to {high:.4g}: use sketch_perceptual.to_tensor")
    if _spans_zero_to_one(low, high) and _spans_zero_to_one(*images.detach().aminmax()):
        warnings.warn("images and target both span [0, 1]; the range here is [-1, 1]", stacklevel=3)


def _spans_zero_to_one(low: Tensor, high: Tensor) -> bool:
    """From ink to paper in [0, 1]. In [-1, 1] a blank or pale page is all above 0, but does not begin there."""
    return bool(0 <= low < 0.02 and 0.98 < high <= 1.02)
