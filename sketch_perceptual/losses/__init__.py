"""Perceptual losses: callables `(images, target) -> (B,)` on images in [-1, 1], by name in `LOSSES`."""

from .base import ImageLoss, all_weights, check_images, named_networks
from .calibration import calibrate, gram_matrix, soft_distance
from .controls import LPIPSLoss, PixelLoss
from .distance import DEFAULT_LAYERS, PerceptualLoss
from .registry import LOSSES, build_loss, build_losses, check_loss
from .style import StyleLoss, total_variation
from .tone import ToneLoss

__all__ = [
    "DEFAULT_LAYERS",
    "LOSSES",
    "ImageLoss",
    "LPIPSLoss",
    "PerceptualLoss",
    "PixelLoss",
    "StyleLoss",
    "ToneLoss",
    "all_weights",
    "build_loss",
    "build_losses",
    "calibrate",
    "check_images",
    "check_loss",
    "gram_matrix",
    "named_networks",
    "soft_distance",
    "total_variation",
]
