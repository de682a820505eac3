"""Controls that a perceptual loss must beat: pixels, and LPIPS as published."""

import warnings
from pathlib import Path

import torch
from torch import Tensor

from ..extras import optional
from ..networks.backbone import load_backbone
from .base import ImageLoss
from .calibration import reference_drawings, unrelated


class PixelLoss(ImageLoss):
    """Mean absolute difference of the pixels, 1 for unrelated drawings: the control that every loss must beat."""

    TYPICAL = 0.44  # between the reference drawings, in [-1, 1]

    def compare(self, images: Tensor, target: Tensor) -> Tensor:
        return (images.float() - target.float()).abs().flatten(1).mean(1) / self.TYPICAL


class LPIPSLoss(ImageLoss):
    """LPIPS (Zhang et al. 2018) with VGG-16, from the `lpips` package, divided by its value for unrelated drawings.

    Args:
        backbone: VGG-16 weights: "imagenet" or a `.safetensors` (see `AttentionVGG16.load_vgg16`).
        resolution: see `ImageLoss`.
    """

    smallest_side = 16  # after four pools

    @torch.random.fork_rng(devices=[])  # lpips starts from random weights
    def __init__(self, backbone: str | Path = "imagenet", resolution: int | None = None):
        super().__init__(resolution)
        lpips = optional("lpips", "eval")
        trunk = load_backbone(backbone, attention="none").state_dict()
        with warnings.catch_warnings():  # lpips still passes a deprecated torchvision argument
            warnings.simplefilter("ignore", UserWarning)
            self.net = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        convolutions = self.net.net.state_dict()  # slice1.0.weight is features.0.weight
        self.net.net.load_state_dict({name: trunk["features." + name.split(".", 1)[1]] for name in convolutions})
        with torch.no_grad():
            self.typical = float(unrelated(lambda *pair: self.net(*pair).flatten(), reference_drawings()))

    def compare(self, images: Tensor, target: Tensor) -> Tensor:
        return self.net(images, target).flatten().float() / self.typical
