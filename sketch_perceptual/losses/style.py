"""Style loss: the distance of Gram matrices, which do not depend on positions (Johnson et al. 2016)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from ..networks.backbone import BUNDLED, AttentionVGG16, check_layers
from .base import ImageLoss
from .calibration import calibrate, gram_distance, gram_matrix
from .distance import DEFAULT_LAYERS, load_frozen


class StyleLoss(ImageLoss):
    """Squared distance between Gram matrices of a backbone's activations (Johnson et al. 2016, eq. 4).

    At each layer divided by its value for unrelated drawings, then the mean over layers; in the plain sum of the
    paper, relu1_2 makes up 99.8 %. About 1 for unrelated drawings, more between bold and fine ones.

    Args:
        backbone, layers, resolution: see `PerceptualLoss`.
    """

    def __init__(
        self,
        backbone: AttentionVGG16 | str | Path = BUNDLED,
        layers: Sequence[str] = DEFAULT_LAYERS,
        resolution: int | None = None,
    ):
        super().__init__(resolution)
        self.layers = check_layers(layers)
        self.backbone = load_frozen(backbone, self.layers)
        self.smallest_side = self.backbone.smallest_side(self.layers)
        self.calibration = calibrate(self.backbone, self.layers)

    def compare(self, images: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            targets = self.grams(target)
        return self.distance(self.grams(images), targets)

    def grams(self, images: Tensor) -> dict[str, Tensor]:
        """Return the Gram matrix (B, C, C) at each layer."""
        return {name: gram_matrix(features) for name, features in self.backbone.walk(images, self.layers)}

    def distance(self, grams: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of Gram matrices, (B,); targets may be (C, C) or (1, C, C) for all rows."""
        layers = (gram_distance(grams[name], targets[name]) / self.calibration[name]["gram"] for name in self.layers)
        return sum(layers, torch.zeros(())) / len(self.layers)


def total_variation(images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B,): mean squared difference of neighbours to the right and below; 0 for a single colour.

    Images of one pixel a side have no neighbours: InputError.
    """
    if images.ndim != 4 or min(images.shape[2:]) < 2:
        raise InputError(f"images must be (B, C, H, W) with at least 2 pixels a side, got {tuple(images.shape)}")
    x = images.float()
    down, right = (difference.square().flatten(1).mean(1) for difference in (x.diff(dim=2), x.diff(dim=3)))
    return down + right
