"""Perceptual losses: callables `(images, target) -> (B,)` on RGB images in [-1, 1], by name in `LOSSES`."""

import importlib
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbone import BUNDLED, AttentionVGG16, check_layers, is_vgg16_weights, load_backbone
from .errors import InputError

DEFAULT_LAYERS = ("relu1_2", "relu2_2", "relu3_3", "relu4_3")  # Johnson et al. 2016, the style layers
ENTRY_POINTS = "sketch_perceptual.losses"


class ImageLoss(nn.Module):
    """Base of the losses here: checks its inputs, is frozen for good, and computes with autocast off.

    Call with images and target, both RGB in [-1, 1], (B, 3, H, W); returns (B,) in float32, 0 on equal images.
    The gradient reaches `images` alone. Subclasses write `compare(images, target) -> (B,)`.

    Args:
        resolution: images whose shorter side is longer are shrunk to it (bilinear, antialiased); never enlarged.
            None leaves them as they are.
    """

    def __init__(self, resolution: int | None = None):
        super().__init__()
        if resolution is not None and resolution < 16:
            raise InputError(f"resolution must be at least 16 pixels or None, got {resolution}")
        self.resolution = resolution

    def compare(self, images: Tensor, target: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        check_images(images, target)
        weight = next(self.parameters(), images.new_zeros((), dtype=torch.float32))
        if weight.device != images.device:
            self.to(images.device)
        with torch.autocast(images.device.type, enabled=False):
            images, target = (self._shrink(x.float()).to(weight.dtype) for x in (images, target.detach()))
            return self.compare(images, target).float()

    def train(self, mode: bool = True):
        """Stays in eval mode, whatever a parent module does."""
        return super().train(False)

    def _freeze(self) -> None:
        self.requires_grad_(False).eval()

    def _shrink(self, x: Tensor) -> Tensor:
        shorter = min(x.shape[-2:])
        if self.resolution is None or shorter <= self.resolution:
            return x
        size = [round(side * self.resolution / shorter) for side in x.shape[-2:]]
        return F.interpolate(x, size, mode="bilinear", antialias=True)


class PerceptualLoss(ImageLoss):
    """Weighted sum over layers of the mean distance between a backbone's activations (Seo 2025, section 4.1).

    Args:
        backbone: an `AttentionVGG16`, or where to load one (see `load_backbone`): a folder, a Hub id, a `.safetensors`
            with VGG-16 weights, or "imagenet"; by default the sketch-tuned network that comes with the package.
        layers: taps, "relu1_1" to "relu5_3" ("relu4_3" for the default backbone).
        layer_weights: one factor a layer; None is 1 for each.
        resolution: see `ImageLoss`.
        distance: "l1" (the paper) or "l2" (mean squared).
    """

    def __init__(
        self,
        backbone: AttentionVGG16 | str | Path = BUNDLED,
        layers: Sequence[str] = DEFAULT_LAYERS,
        layer_weights: Sequence[float] | None = None,
        resolution: int | None = None,
        distance: str = "l1",
    ):
        super().__init__(resolution)
        distances = {"l1": F.l1_loss, "l2": F.mse_loss}
        if distance not in distances:
            raise InputError(f'distance must be "l1" or "l2", got {distance!r}')
        self.distance = distances[distance]
        self.layers = check_layers(layers)
        weights = [1.0] * len(self.layers) if layer_weights is None else list(layer_weights)
        if len(weights) != len(self.layers):
            raise InputError(f"{len(weights)} layer_weights for {len(self.layers)} layers")
        self.layer_weights = dict(zip(self.layers, weights, strict=True))
        self.backbone = _cut(backbone, self.layers)
        self._freeze()

    def compare(self, images: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.backbone.taps(target, self.layers)
        found = self.backbone.taps(images, self.layers)
        return sum(
            weight * self.distance(found[name], wanted[name], reduction="none").flatten(1).float().mean(1)
            for name, weight in self.layer_weights.items()
        )


class StyleLoss(ImageLoss):
    """Squared distance between the Gram matrices of a backbone's activations, summed (Johnson et al. 2016, eq. 4).

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
        self.backbone = _cut(backbone, self.layers)
        self._freeze()

    def compare(self, images: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.grams(target)
        return style_distance(self.grams(images), wanted)

    def grams(self, images: Tensor) -> dict[str, Tensor]:
        """The Gram matrix (B, C, C) at each layer."""
        return {name: gram_matrix(tap) for name, tap in self.backbone.taps(images, self.layers).items()}


def gram_matrix(features: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, C) in float32: products of channels, over C x H x W."""
    flat = features.float().flatten(2)
    return flat @ flat.mT / flat[0].numel()


def style_distance(grams: dict[str, Tensor], wanted: dict[str, Tensor]) -> Tensor:
    """Sum over layers of the squared Frobenius norm, (B,)."""
    return sum((grams[name] - gram).square().sum((1, 2)) for name, gram in wanted.items())


def total_variation(images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B,): mean squared difference of neighbours, to the right and below; 0 on one colour."""
    x = images.float()
    return sum(difference.square().flatten(1).mean(1) for difference in (x.diff(dim=2), x.diff(dim=3)))


class PixelLoss(ImageLoss):
    """Mean absolute difference of the pixels: the control that every perceptual loss must beat."""

    def compare(self, images: Tensor, target: Tensor) -> Tensor:
        return (images - target).abs().flatten(1).mean(1)


class LPIPSLoss(ImageLoss):
    """LPIPS (Zhang et al. 2018) with VGG-16, from the `lpips` package.

    Args:
        backbone: VGG-16 weights: "imagenet" or a `.safetensors` (see `AttentionVGG16.load_vgg16`).
        resolution: see `ImageLoss`.
    """

    def __init__(self, backbone: str | Path = "imagenet", resolution: int | None = None):
        super().__init__(resolution)
        try:
            import lpips
        except ImportError as error:
            raise InputError("the loss lpips needs the lpips package: pip install lpips") from error
        trunk = load_backbone(backbone, attention="none").state_dict()
        with warnings.catch_warnings():  # lpips asks torchvision in words that torchvision has given up
            warnings.simplefilter("ignore", UserWarning)
            self.net = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        convolutions = self.net.net.state_dict()  # slice1.0.weight is features.0.weight
        self.net.net.load_state_dict({name: trunk["features." + name.split(".", 1)[1]] for name in convolutions})
        self._freeze()

    def compare(self, images: Tensor, target: Tensor) -> Tensor:
        return self.net(images, target).flatten()


def attention_vgg(backbone: AttentionVGG16 | str | Path = BUNDLED, **options) -> PerceptualLoss:
    """`PerceptualLoss` on a sketch-tuned attention-VGG: the one that comes with the package, or `backbone`."""
    loss = PerceptualLoss(backbone, **options)
    _expect_attention(loss, "cbam", "vgg")
    if is_vgg16_weights(backbone):
        warnings.warn(
            f"{backbone} holds plain VGG-16 weights, so the attention is untrained and random: the arm that fails in"
            " the paper. Tune it, or choose --perceptual_loss vgg.",
            stacklevel=2,
        )
    return loss


def vgg(backbone: str | Path = "imagenet", **options) -> PerceptualLoss:
    """`PerceptualLoss` on plain VGG-16: ImageNet weights, a `.safetensors`, or a folder tuned without attention."""
    loss = PerceptualLoss(_cut(backbone, options.get("layers", DEFAULT_LAYERS), "none"), **options)
    _expect_attention(loss, "none", "attention_vgg")
    return loss


LOSSES: dict[str, Callable] = {
    "attention_vgg": attention_vgg,
    "vgg": vgg,
    "pixel": PixelLoss,
    "lpips": LPIPSLoss,
}


def build_loss(name: str, **options) -> Callable[[Tensor, Tensor], Tensor]:
    """Build a loss by name; `options` that are None are left to the loss's own defaults.

    Args:
        name: a key of `LOSSES`, an entry point of the group "sketch_perceptual.losses", or "module:Class".
    """
    plugins = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    options = {option: value for option, value in options.items() if value is not None}
    if name in LOSSES:
        builder = LOSSES[name]
    elif name in plugins:
        builder = plugins[name].load()
    elif ":" in name:
        builder = _import(name)
    else:
        raise InputError(
            f"there is no perceptual loss {name!r}: choose {', '.join([*LOSSES, *plugins])}, or write module:Class"
        )
    try:
        loss = builder(**options)
    except TypeError as error:
        raise InputError(f"the loss {name} does not take these options, {', '.join(options)}: {error}") from error
    if name not in LOSSES:
        check_loss(loss, name)
    return loss


@torch.no_grad()
def typical_distance(loss: Callable[[Tensor, Tensor], Tensor], images: Sequence[Tensor]) -> float:
    """What `loss` says of unrelated drawings: its mean over each of the `images`, (3, H, W), against the next.

    On the same drawings it is 0.36 for pixels and can be 42 for a VGG-16; divided by this number, one weight means the
    same for all. 1.0 if the images do not differ.
    """
    pairs = zip(images, [*images[1:], images[0]], strict=True)
    return sum(float(loss(a[None], b[None])) for a, b in pairs) / len(images) or 1.0


def check_loss(loss: Callable[[Tensor, Tensor], Tensor], name: str = "loss") -> None:
    """The contract of a perceptual loss, for anyone's plug-in; what is broken is an `InputError` that says so.

    `(images, target)`, both (B, 3, H, W) in [-1, 1] -> (B,) in float32, finite, 0 on equal images, positive on
    different ones, each row on its own, with a gradient to the images and to no weight.
    """
    draw = torch.Generator().manual_seed(0)
    images, target = torch.rand(2, 2, 3, 64, 64, generator=draw) * 2 - 1
    weight = next(loss.parameters(), None) if isinstance(loss, nn.Module) else None
    if weight is not None:
        images, target = images.to(weight.device), target.to(weight.device)
    images.requires_grad_()
    value = loss(images, target)

    def require(kept: bool, rule: str) -> None:
        if not kept:
            raise InputError(f"the perceptual loss {name} {rule}")

    require(isinstance(value, Tensor) and value.shape == (2,), "must return one number an image, shape (B,)")
    require(value.dtype == torch.float32, f"must return float32, not {value.dtype}")
    require(
        bool(torch.isfinite(value).all() and (value > 0).all()),
        "must be finite and positive on different images",
    )
    require(bool((loss(target, target).abs() < 1e-6).all()), "must be 0 on equal images")
    alone = loss(images[:1], target[:1])
    require(torch.allclose(alone, value[:1], rtol=1e-3), "must score each image on its own, whatever the batch")
    require(value.requires_grad, "must carry a gradient to the images")
    value.sum().backward()
    require(bool(images.grad.abs().sum() > 0), "must carry a gradient to the images")
    weights = loss.parameters() if isinstance(loss, nn.Module) else ()
    require(not any(w.requires_grad for w in weights), "must be frozen: requires_grad_(False) on its weights")


def check_images(images: Tensor, target: Tensor) -> None:
    """Refuse what is not two batches of RGB in [-1, 1]; only the target's values are checked.

    A prediction may leave the range, and one that is not finite is the training loop's to skip.
    """
    for what, x in (("images", images), ("target", target)):
        if not x.is_floating_point():
            raise InputError(
                f"{what} must be floating point in [-1, 1], got {x.dtype}: use sketch_perceptual.to_tensor"
            )
        if x.ndim != 4 or x.shape[1] != 3:
            raise InputError(f"{what} must be RGB of shape (B, 3, H, W), got {tuple(x.shape)}")
    if images.shape != target.shape:
        raise InputError(f"images and target must have one shape, got {tuple(images.shape)} and {tuple(target.shape)}")
    low, high = target.detach().aminmax()
    if not (low >= -1.1 and high <= 1.1):
        raise InputError(f"target must lie in [-1, 1], got {low:.4g} to {high:.4g}: use sketch_perceptual.to_tensor")
    if low >= 0 and images.detach().amin() >= 0:
        warnings.warn("images and target both lie in [0, 1]; the range here is [-1, 1]", stacklevel=3)


def _cut(backbone: AttentionVGG16 | str | Path, layers: Sequence[str], attention: str = "cbam") -> AttentionVGG16:
    """A network as it is, or one that is loaded here and ends at the deepest of the layers: 30 MB of 550."""
    if isinstance(backbone, nn.Module):
        backbone.find_taps(layers)
        return backbone
    network = load_backbone(backbone, attention)
    taps = network.find_taps(layers)
    return network.truncate(taps[max(taps)])


def _expect_attention(loss: PerceptualLoss, attention: str, other: str) -> None:
    if loss.backbone.attention != attention:
        raise InputError(
            f"the backbone has attention={loss.backbone.attention!r}: score it with --perceptual_loss {other}"
        )


def _import(name: str) -> Callable:
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"the loss {name} cannot be imported ({error}); is its folder on PYTHONPATH?") from error
