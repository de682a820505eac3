"""Tone of a drawing: how white its paper is, and how much ink is where."""

import torch.nn.functional as F
from torch import Tensor

from .base import ImageLoss


class ToneLoss(ImageLoss):
    """Mean absolute difference of the means over squares of 8 pixels, 1 for unrelated drawings; needs no network.

    Networks hardly see paper: at 512 px, 5 % grey costs the Gram loss 2 % of what unrelated drawings cost, this 45 %
    (research/strokes.md). It does not see what a stroke looks like within a square. Partial squares at the border
    are weighted by their area.
    """

    SIDE = 8
    TYPICAL = 0.27  # between the reference drawings, in [-1, 1]

    def compare(self, images: Tensor, target: Tensor) -> Tensor:
        difference = images.float() - target.float()
        sums = F.avg_pool2d(difference, self.SIDE, ceil_mode=True, divisor_override=1)
        return sums.abs().flatten(1).sum(1) / (difference.shape[1:].numel() * self.TYPICAL)
