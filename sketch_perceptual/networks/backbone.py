"""VGG-16 with its first two max-pools replaced by attention (Seo 2025, section 3), read at named taps."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import InputError
from .attention import CBAM
from .hub_model import HubModel, read_config
from .settings import FLAG, TEXTS, check_json, check_settings, integer, is_positive, one_of, optional
from .vgg16_weights import read_vgg16, unknown_to

# Simonyan & Zisserman 2015, configuration D: convolutions per stage, each stage ended by a max-pool.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
ATTENTION_STAGES = (1, 2)
LAYERS = tuple(f"relu{s}_{c}" for s, widths in enumerate(STAGES, 1) for c in range(1, len(widths) + 1))
BUNDLED = Path(__file__).parents[1] / "assets" / "attention-vgg16"
IMAGENETS = 224  # pixels a side of VGG-16's training images
UNITS = ("softening", "distance", "gram")  # of a layer's calibration, see `losses.calibrate`


def is_calibration(value) -> bool:
    try:
        return all(
            name in LAYERS and all(is_positive(units[unit]) for unit in UNITS) and _is_weight(units.get("weight", 1))
            for name, units in value.items()
        )
    except (AttributeError, KeyError, TypeError):
        return False


def _is_weight(value) -> bool:
    return is_positive(value) or value == 0


CALIBRATION = (
    is_calibration,
    f"for each layer a positive {', '.join(UNITS)}, and optionally a weight that is not negative (without a"
    " calibration, the network is calibrated when a loss is built)",
)


class AttentionVGG16(
    nn.Module,
    HubModel,
    library_name="sketch-perceptual",
    tags=["sketch", "perceptual-loss", "vgg16", "attention"],
):
    """VGG-16 for drawings: `features[4]` and `features[9]` are attention instead of max-pools (Seo 2025, section 3).

    Without those pools the last map of a 224 px image is 28x28, a forward pass takes 183.2 G multiply-adds against
    VGG-16's 15.4 G, and the convolutions see less of the image: a square of 15 px in place of 40 at relu3_3, 28 of 92
    at relu4_3, 54 of 196 at relu5_3. All other layers keep torchvision's names, so its `vgg16` weights fit.

    Args:
        attention: "cbam" in place of the two pools; "identity", nothing in their place, the control that separates
            attention from resolution; or "none" for torchvision's plain `vgg16` with its pools.
        pool_after_attention: keep the max-pool after each attention: VGG's cost, not the paper's network.
        open_gates: initialise the gates to one half for any image and the weights after them to four times their
            value, so that an untuned network equals "identity", or with pools "none", bit for bit. Not the paper's
            network, whose gates start at random.
        num_classes: outputs of the classifier; 0 leaves the classifier out.
        spatial_kernel: width of the spatial attention's convolution, odd.
        reduction: channel attention's bottleneck divides the channels by this.
        head: the classifier: "vgg", VGG-16's three layers on the 7x7 map (119.5 M weights, dropout), or "linear", one
            layer on the mean of the map, for small data sets.
        classes: the class of each output: folder names or labels, as many as `num_classes`.
        last_layer: the deepest layer that is kept, e.g. "relu4_3", whose output the classifier takes. None keeps all.
        calibration: the units of the losses at each layer, see `losses.calibrate`.
        resolution: pixels a side of the drawings that it was tuned on, see `tuned_resolution`; None if unknown.

    Images are RGB in [-1, 1], (B, 3, H, W); ImageNet's normalisation happens inside.
    """

    mean: Tensor
    std: Tensor
    noun = "backbone"
    usage = """from sketch_perceptual import PerceptualLoss, to_tensor
from sketch_perceptual.drawings import draw

loss = PerceptualLoss("{source}")
cat, boat = (to_tensor(draw(name, 0, size=64))[None] for name in ("cat", "boat"))  # (1, 3, 64, 64), RGB in [-1, 1]
print(loss(cat, boat))  # about 1: unrelated drawings"""
    sources = f'{HubModel.sources}, a .safetensors with VGG-16 weights, "imagenet" or "bundled"'
    bundled = BUNDLED
    rules: ClassVar = {
        "attention": one_of("cbam", "identity", "none"),
        "pool_after_attention": FLAG,
        "open_gates": FLAG,
        "num_classes": integer(0),
        "spatial_kernel": integer(1),
        "reduction": integer(1),
        "head": one_of("vgg", "linear"),
        "classes": optional(TEXTS),
        "last_layer": optional(one_of(*LAYERS)),
        "calibration": optional(CALIBRATION),
        "resolution": optional(integer(1)),
    }

    def __init__(
        self,
        attention: str = "cbam",
        pool_after_attention: bool = False,
        num_classes: int = 1000,
        spatial_kernel: int = 7,
        reduction: int = 16,
        head: str = "vgg",
        classes: Sequence[str] | None = None,
        last_layer: str | None = None,
        calibration: dict[str, dict] | None = None,
        open_gates: bool = False,
        resolution: int | None = None,
    ):
        super().__init__()
        check_settings(self.rules, {name: value for name, value in locals().items() if name in self.rules})
        if classes is not None and len(classes) != num_classes:
            raise InputError(f"{len(classes)} `classes` for `num_classes`={num_classes}")
        self.attention, self.pool_after_attention, self.num_classes = attention, pool_after_attention, num_classes
        self.head, self.classes, self.last_layer = head, classes, last_layer
        self.gradient_checkpointing = False
        self.features, self.tap_index, self.stage_bounds = nn.Sequential(), {}, [0]
        channels = 3
        for stage, widths in enumerate(STAGES, 1):
            for number, width in enumerate(widths, 1):
                self.features.extend([_conv3x3(channels, width), nn.ReLU(inplace=True)])
                self.tap_index[f"relu{stage}_{number}"] = len(self.features) - 1
                channels = width
            replaced = attention != "none" and stage in ATTENTION_STAGES
            block: OrderedDict[str, nn.Module] = OrderedDict()
            if replaced and attention == "cbam":
                block["attention"] = CBAM(channels, reduction, spatial_kernel)
            if pool_after_attention or not replaced:
                block["pool"] = nn.MaxPool2d(2, 2)
            self.features.append(nn.Sequential(block))
            self.stage_bounds.append(len(self.features))
        if last_layer is not None:
            self.features = self.features[: self.tap_index[last_layer] + 1]
            self.tap_index = {name: index for name, index in self.tap_index.items() if index < len(self.features)}
            channels = dict(zip(LAYERS, chain(*STAGES), strict=True))[last_layer]
        if open_gates:
            for attention, conv in self._gated():
                attention.start_open()
                conv.weight.data *= 4
        self.avgpool = nn.AdaptiveAvgPool2d(1 if num_classes and head == "linear" else 7)
        self.classifier = _classifier(channels, num_classes, head) if num_classes else nn.Identity()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def _gated(self) -> Iterator[tuple[CBAM, nn.Conv2d]]:
        """Yield each attention and the convolution after it."""
        for block, conv in pairwise(self.features):
            attention = getattr(block, "attention", None)
            if isinstance(attention, CBAM) and isinstance(conv, nn.Conv2d):
                yield attention, conv

    @property
    def calibration(self) -> dict[str, dict]:
        """Layer -> units that `losses.calibrate` measured there; saved with the network, empty until then."""
        return self.settings.get("calibration") or {}

    @calibration.setter
    def calibration(self, measured: dict[str, dict]) -> None:
        self.settings["calibration"] = measured

    def normalize(self, images: Tensor) -> Tensor:
        """Convert images in [-1, 1] to ImageNet's normalisation."""
        return ((images + 1) / 2 - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> logits (B, num_classes); without a classifier the flat 7x7 map (B, 25088)."""
        return self.classifier(self.avgpool(self.last_map(images)).flatten(1))

    def last_map(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> the last activations (B, C, h, w): C is 512 unless `last_layer` comes before."""
        x = self.normalize(images)
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return self.features(x)
        for start, end in pairwise(self.stage_bounds):  # elsewhere an in-place ReLU would overwrite a stored input
            x = checkpoint(self.features[start:end], x, use_reentrant=False)
        return x

    def taps(self, images: Tensor, layers: Iterable[str]) -> dict[str, Tensor]:
        """Return the activations (B, C, h, w) at the named layers, e.g. "relu3_3"; stops at the deepest of them."""
        return dict(self.walk(images, layers))

    def walk(self, images: Tensor, layers: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield the same one by one, for a caller that does not keep them all."""
        wanted = self.find_taps(layers)
        x = self.normalize(images)
        for index, layer in enumerate(islice(self.features, max(wanted) + 1)):
            x = layer(x)
            if index in wanted:
                yield wanted[index], x

    def find_taps(self, layers: Iterable[str]) -> dict[int, str]:
        """Return position in `features` -> name of the layer; InputError for an unknown or truncated layer."""
        layers = check_layers(layers)
        if beyond := [name for name in layers if name not in self.tap_index]:
            raise InputError(f"the backbone ends at {self.last_layer} and does not have {', '.join(beyond)}")
        return {self.tap_index[name]: name for name in layers}

    def smallest_side(self, layers: Iterable[str]) -> int:
        """Return the minimum side of an image in pixels, which the pools before these layers reduce to 1."""
        depth = max(self.find_taps(layers))
        return 2 ** sum(isinstance(module, nn.MaxPool2d) for module in self.features[:depth].modules())

    def load_vgg16(self, source: str | Path = "imagenet") -> list[str]:
        """Load VGG-16 weights; return the names of the parameters that `source` does not have and that stay new.

        Args:
            source: "imagenet" (torchvision's weights, downloaded once) or a `.safetensors` file in torchvision's
                names: a full `vgg16` or only its `features`.

        New may be the attention, a last layer with another number of classes, and the whole classifier if the file
        holds only `features`. Any other tensor that is missing, unexpected or of another shape is an `InputError`.
        """
        weights, initial = read_vgg16(source), self.state_dict()
        if self.num_classes == 0 or self.head == "linear":
            weights = {name: weight for name, weight in weights.items() if name.startswith("features.")}
        new = unknown_to(weights, initial)
        weights = {name: weight for name, weight in weights.items() if name not in new}
        wrong = sorted(set(initial) - set(new) - set(weights)) + sorted(set(weights) - set(initial))
        wrong += [name for name in weights if name in initial and weights[name].shape != initial[name].shape]
        if wrong:
            raise InputError(
                f"{source} does not hold torchvision's vgg16: {len(wrong)} tensors are missing, unknown or of another"
                f" shape, first {wrong[0]}. Pass a .safetensors with its names (features.0.weight ...), or, for a"
                " network saved by this package, its folder."
            )
        self.load_state_dict({name: initial[name] for name in new} | weights)
        if self.settings["open_gates"] and any(".attention." in name for name in new):
            for _, conv in self._gated():
                conv.weight.data *= 4
        self.calibration = {}
        return new

    def truncate(self, last_layer: str) -> "AttentionVGG16":
        """Return a copy that ends at `last_layer`, for a loss that reads no deeper: 7.6 M of 138 M weights to relu4_3.

        `network.truncate("relu4_3").half().save_pretrained(folder)` is how the bundled backbone was stored.
        """
        config = self.settings | {"num_classes": 0, "classes": None, "last_layer": last_layer}
        copy = type(self)(**config)
        kept = {name: values for name, values in self.calibration.items() if name in copy.tap_index}
        if any("weight" in values for name, values in self.calibration.items() if name not in kept):
            kept = {name: {unit: values[unit] for unit in UNITS} for name, values in kept.items()}  # learned together
        copy.calibration = kept
        copy.load_state_dict({name: weight for name, weight in self.state_dict().items() if name in copy.state_dict()})
        return copy.train(self.training)


def load_backbone(
    source: str | Path = BUNDLED, attention: str = "cbam", layers: Iterable[str] | None = None
) -> AttentionVGG16:
    """Load a backbone from a folder or Hub id written by `save_pretrained`, or from VGG-16 weights.

    Args:
        source: the folder or id; "bundled" (the default), the sketch-tuned network that comes with the package; or
            "imagenet" or a `.safetensors` file as in `AttentionVGG16.load_vgg16`, for a network without a classifier.
        attention: for VGG-16 weights only: "cbam" (untrained: the arm that fails in the paper) or "none".
        layers: keep only the part that these taps need: to relu4_3, 30 MB of 550.
    """
    if is_vgg16_weights(source):
        backbone = AttentionVGG16(attention=attention, num_classes=0).eval()
        backbone.load_vgg16(source)
    else:
        backbone = AttentionVGG16.from_pretrained(source)
    if layers is None:
        return backbone
    taps = backbone.find_taps(layers)
    return backbone.truncate(taps[max(taps)])


def tuned_resolution(source: str | Path = BUNDLED) -> int:
    """Return the pixels a side of the drawings that a backbone was tuned on; 224 if unknown.

    Args:
        source: as in `load_backbone`.
    """
    if is_vgg16_weights(source):
        return IMAGENETS
    _, config = read_config(source, AttentionVGG16)
    check_json(AttentionVGG16.rules, config, str(source))
    return config.get("resolution") or IMAGENETS


def is_vgg16_weights(source) -> bool:
    """Return whether `source` is bare VGG-16 weights, not a network saved by this package."""
    return source == "imagenet" or str(source).endswith(".safetensors")


def check_layers(layers: Iterable[str]) -> tuple[str, ...]:
    """Return the names as a tuple; InputError for unknown, repeated or no names."""
    layers = tuple(layers)
    unknown = [name for name in layers if name not in LAYERS]
    if unknown or not layers or len(set(layers)) < len(layers):
        raise InputError(f"`layers` must be distinct names from {', '.join(LAYERS)}; got {' '.join(layers) or 'none'}")
    return layers


def _conv3x3(channels: int, width: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels, width, 3, padding=1)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # torchvision's initialisation
    nn.init.zeros_(conv.get_parameter("bias"))
    return conv


def _classifier(channels: int, num_classes: int, head: str) -> nn.Module:
    if head == "linear":
        return nn.Linear(channels, num_classes)
    widths = ((channels * 7 * 7, 4096), (4096, 4096), (4096, num_classes))
    linears = [nn.Linear(*width) for width in widths]
    for linear in linears:
        nn.init.normal_(linear.weight, 0, 0.01)  # torchvision's initialisation
        nn.init.zeros_(linear.bias)
    hidden = [layer for linear in linears[:2] for layer in (linear, nn.ReLU(inplace=True), nn.Dropout())]
    return nn.Sequential(*hidden, linears[2])
