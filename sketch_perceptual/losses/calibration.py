"""Calibration: the unit of a loss is its value between unrelated drawings, for every network and layer.

The package draws these itself, so the meaning of a weight does not depend on a data set.
"""

from collections.abc import Callable, Iterable
from functools import cache, partial
from itertools import cycle

import torch
from torch import Tensor

from ..data.images import to_tensor
from ..drawings import CLASSES, STYLES, draw
from ..errors import InputError
from ..networks.backbone import AttentionVGG16

SIDE = 64  # pixels of the reference drawings
SHIFTS = (1, 5, 6)  # each drawing is compared with others of its own style and of both other styles


@cache
def reference_drawings(side: int = SIDE) -> Tensor:
    """Return one drawing of each class, in alternating styles: (16, 3, side, side) in [-1, 1]; always the same."""
    drawings = [draw(name, 0, 0, style, side) for name, style in zip(CLASSES, cycle(STYLES), strict=False)]
    return torch.stack([to_tensor(drawing) for drawing in drawings])


def unrelated(distance: Callable[[Tensor, Tensor], Tensor], drawings: Tensor) -> Tensor:
    """Return the mean of a distance `(images, target) -> (B,)` over drawings of different classes, a scalar."""
    return torch.stack([distance(drawings, drawings.roll(shift, 0)).mean() for shift in SHIFTS]).mean()


def soft_distance(features: Tensor, target: Tensor, softening: float) -> Tensor:
    """Squared distance of soft unit vectors at each position: (B, C, h, w) twice -> (B, h, w) in float32.

    f / sqrt(|f|^2 + e^2) along the channels: LPIPS' unit vectors (Zhang et al. 2018), except that features that are
    weak compared with the `softening` e stay weak. On blank paper plain unit vectors would be noise.
    """
    f, g = features.float(), target.float()
    # |u - v|^2 = |u|^2 + |v|^2 - 2 uv: no further tensor of the features' size is kept for the backward pass
    ff, gg, fg = ((x * y).sum(1) for x, y in ((f, f), (g, g), (f, g)))
    a, b = ((squared + softening**2).rsqrt() for squared in (ff, gg))
    return ff * a * a + gg * b * b - 2 * (fg * a * b)


def gram_matrix(features: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, C) in float32: products of channels, over C x H x W (Johnson et al. 2016, eq. 3)."""
    flat = features.float().flatten(2)
    return flat @ flat.mT / flat[0].numel()


def gram_distance(gram: Tensor, target: Tensor) -> Tensor:
    """Squared Frobenius norm of the difference, (B, C, C) twice -> (B,)."""
    return (gram - target).square().sum((1, 2))


@torch.no_grad()
def calibrate(backbone: AttentionVGG16, layers: Iterable[str]) -> dict[str, dict]:
    """Measure the units of these layers that are not in `backbone.calibration`, add them to it, and return it.

    At each layer, on the reference drawings:

    - `softening`: half of the features' root mean square length, the e of `soft_distance`;
    - `distance`, `gram`: the mean of `soft_distance` and of `gram_distance` between drawings of different classes.

    Learned calibrations also have a `weight` for each layer; see research/learned.py. Clear `backbone.calibration`
    first if the backbone was trained further. Deterministic; takes seconds on a CPU.
    """
    if not isinstance(backbone, AttentionVGG16):
        raise InputError(f"`backbone` must be an AttentionVGG16, got {type(backbone).__name__}")
    if missing := [name for name in layers if name not in backbone.calibration]:
        weight = next(backbone.parameters())
        measured = {}
        with torch.autocast(weight.device.type, enabled=False):
            for name, features in backbone.walk(reference_drawings().to(weight), missing):
                features = features.float()
                softening = rounded(features.square().sum(1).mean().sqrt() / 2)
                measured[name] = {
                    "softening": softening,
                    "distance": rounded(unrelated(partial(soft_distance, softening=softening), features)),
                    "gram": rounded(unrelated(gram_distance, gram_matrix(features))),
                }
        backbone.calibration = backbone.calibration | measured
    return backbone.calibration


def rounded(value: Tensor) -> float:
    """Round to four digits, so that machines agree; return 1 for 0, from a network without a response."""
    return float(f"{float(value):.4g}") or 1.0
