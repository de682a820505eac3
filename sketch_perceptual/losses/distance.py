"""The perceptual distance of two drawings."""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError, check_choice
from ..networks.backbone import BUNDLED, AttentionVGG16, check_layers, load_backbone
from .base import ImageLoss
from .calibration import calibrate, soft_distance

DEFAULT_LAYERS = ("relu1_2", "relu2_2", "relu3_3", "relu4_3")  # Johnson et al. 2016, the style layers


class PerceptualLoss(ImageLoss):
    """Distance of two drawings in a backbone's features: 0 for equal ones, about 1 for unrelated ones.

    At each layer the squared distance of soft unit vectors, divided by its value for unrelated drawings; then the mean
    over layers. So weights mean the same for every backbone, and no layer dominates: in the paper's loss, taken
    literally (L1 between activations, summed), relu1_2 makes up three quarters.

    Args:
        backbone: an `AttentionVGG16`, of which the loss keeps a frozen view that shares its weights (see
            `load_frozen`), or where to load one (see `load_backbone`): a folder, a Hub id, a `.safetensors` with
            VGG-16 weights, or "imagenet"; by default the sketch-tuned network that comes with the package.
            It is calibrated if it was not yet, see `calibrate`.
        layers: taps, "relu1_1" to "relu5_3" ("relu4_3" for the default backbone).
        layer_weights: one factor per layer; None for those of the backbone's calibration, if it has learned them for
            exactly these layers, or else 1 for each.
        resolution: see `ImageLoss`.
        normalization: "soft", or "none" for plain activations, summed over layers without a unit: with distance="l1"
            the paper's loss to the letter (Seo 2025, section 4.1).
        distance: "l2", the squared distance, or "l1"; soft unit vectors are compared only by "l2".
    """

    def __init__(
        self,
        backbone: AttentionVGG16 | str | Path = BUNDLED,
        layers: Sequence[str] = DEFAULT_LAYERS,
        layer_weights: Sequence[float] | None = None,
        resolution: int | None = None,
        normalization: str = "soft",
        distance: str = "l2",
    ):
        super().__init__(resolution)
        check_choice("normalization", normalization, ("soft", "none"))
        check_choice("distance", distance, ("l2", "l1"))
        if (normalization, distance) == ("soft", "l1"):
            raise InputError('`distance`="l1" needs `normalization`="none": soft unit vectors are compared by "l2"')
        self.layers = check_layers(layers)
        self.backbone = load_frozen(backbone, self.layers)
        self.smallest_side = self.backbone.smallest_side(self.layers)
        self.normalization, self.distance = normalization, distance
        self.calibration = calibrate(self.backbone, self.layers) if normalization == "soft" else {}
        weights = self._learned_weights() if layer_weights is None else list(layer_weights)
        if len(weights) != len(self.layers):
            raise InputError(f"{len(weights)} `layer_weights` for {len(self.layers)} layers")
        if min(weights) < 0 or sum(weights) == 0:
            raise InputError(f"`layer_weights` must not be negative, nor all 0; got {weights}")
        total = sum(weights) if normalization == "soft" else 1
        self.layer_weights = {name: weight / total for name, weight in zip(self.layers, weights, strict=True)}

    def _learned_weights(self) -> list[float]:
        """Return the calibration's weights if they are for exactly these layers, or else 1 for each."""
        learned = {name: values["weight"] for name, values in self.calibration.items() if "weight" in values}
        return [learned[name] if set(learned) == set(self.layers) else 1.0 for name in self.layers]

    def forward(self, images: Tensor, target: Tensor, *, per_layer: bool = False, spatial: bool = False):  # type: ignore[override]
        """Return the distance (B,), or distances by layer before they are weighted and added, or maps of them.

        Args:
            images, target: (B, 3, H, W), or (B, 1, H, W) if grey, in [-1, 1].
            per_layer: return a dictionary of layers, (B,) each.
            spatial: return maps (B, H, W), upsampled bilinearly; the mean of a map is about the loss. With
                `per_layer`, one for each layer.
        """
        layers = super().forward(images, target, spatial=spatial)
        if spatial:
            size = images.shape[-2:]
            layers = {name: F.interpolate(x[:, None], size, mode="bilinear")[:, 0] for name, x in layers.items()}
        if per_layer:
            return layers
        return sum(self.layer_weights[name] * value for name, value in layers.items())

    def compare(self, images: Tensor, target: Tensor, spatial: bool) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the distance at each layer: (B,), or maps (B, h, w)."""
        with torch.no_grad():
            targets = self.backbone.taps(target, self.layers)
        values = {}
        for name, features in self.backbone.walk(images, self.layers):
            distances = self._distances(name, features, targets.pop(name))
            values[name] = distances if spatial else distances.mean((1, 2))
        return {name: values[name] for name in self.layers}

    def _distances(self, name: str, features: Tensor, target: Tensor) -> Tensor:
        """Return the distance at each position, (B, h, w) in float32."""
        if self.normalization == "none":
            difference = features - target
            return (difference.abs() if self.distance == "l1" else difference.square()).float().mean(1)
        values = self.calibration[name]
        return soft_distance(features, target, values["softening"]) / values["distance"]


@torch.random.fork_rng(devices=[])  # the loss does not change a script's random numbers
def load_frozen(
    backbone: AttentionVGG16 | str | Path, layers: Sequence[str], attention: str = "cbam"
) -> AttentionVGG16:
    """Load a frozen network that ends at the deepest of the layers, or return a frozen view of the caller's network.

    The view shares weights and calibration with the caller's network, until one of them is moved or cast. The caller's
    network stays trainable, with its mode and device; training it further changes the loss.
    """
    if not isinstance(backbone, nn.Module):
        with torch.device("cpu"):  # whatever device a parent is built on, "meta" too
            return load_backbone(backbone, attention, layers).requires_grad_(False).eval()
    if not isinstance(backbone, AttentionVGG16):
        raise InputError(
            f"`backbone` must be an AttentionVGG16, or where to load one from, got {type(backbone).__name__}"
        )
    backbone.find_taps(layers)
    shared = {id(weight): nn.Parameter(weight.detach(), requires_grad=False) for weight in backbone.parameters()}
    return copy.deepcopy(backbone, shared | {id(backbone.settings): backbone.settings}).eval()
