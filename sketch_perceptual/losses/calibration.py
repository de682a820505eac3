"""What makes one unit of a loss the same for every network and layer: its value between unrelated drawings.

The drawings are made by the package, so nobody's data set decides what a weight means.
"""

from collections.abc import Callable, Iterable
from functools import cache, partial
from itertools import cycle

import torch
from torch import Tensor

from ..data.images import to_tensor
from ..drawings import CLASSES, STYLES, draw
from ..networks.backbone import AttentionVGG16

SIDE = 64  # pixels of the reference drawings
SHIFTS = (1, 5, 6)  # a drawing meets others in its own style and in both of the rest


@cache
def reference_drawings(side: int = SIDE) -> Tensor:
    """One drawing of each class, the styles in turn: (16, 3, side, side) in [-1, 1]; always the same."""
    drawings = [draw(name, 0, 0, style, side) for name, style in zip(CLASSES, cycle(STYLES), strict=False)]
    return torch.stack([to_tensor(drawing) for drawing in drawings])


def unrelated(distance: Callable[[Tensor, Tensor], Tensor], drawings: Tensor) -> Tensor:
    """The mean of a distance `(images, target) -> (B,)` over drawings of different classes, a scalar."""
    return torch.stack([distance(drawings, drawings.roll(shift, 0)).mean() for shift in SHIFTS]).mean()


def soft_distance(features: Tensor, target: Tensor, softening: float) -> Tensor:
    """Squared distance of soft unit vectors, place by place: (B, C, h, w) twice -> (B, h, w) in float32.

    f / sqrt(|f|^2 + e^2) along the channels: LPIPS' unit vectors (Zhang et al. 2018), except that what is weak beside
    the `softening` e stays weak. On blank paper unit vectors are noise.
    """
    f, g = features.float(), target.float()
    # |u - v|^2 = |u|^2 + |v|^2 - 2 uv: nothing as large as the features is kept for the backward pass
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
    """Measure what is not known yet of these layers, keep it in `backbone.calibration`, and return that.

    At each layer, on the reference drawings:

    - `softening`: half of the features' root mean square length, the e of `soft_distance`;
    - `distance`, `gram`: the mean of `soft_distance` and of `gram_distance` between drawings of different classes.

    One that was learned also has `weight`, how much the layer counts; see research/learned.py. After training on,
    empty `backbone.calibration` first. Deterministic; seconds on a CPU.
    """
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
    """Four digits, so that machines agree; 1 where a network that sees nothing has measured 0."""
    return float(f"{float(value):.4g}") or 1.0
