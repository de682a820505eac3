"""Registry of built-in and plug-in losses, and the contract that they must keep."""

import importlib
import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import InputError, first_line
from ..networks.backbone import BUNDLED, AttentionVGG16, is_vgg16_weights
from .base import FrozenParts, first_weight, name_of, one_per_image
from .controls import LPIPSLoss, PixelLoss
from .distance import DEFAULT_LAYERS, PerceptualLoss, load_frozen
from .style import StyleLoss
from .tone import ToneLoss

ENTRY_POINTS = "sketch_perceptual.losses"
WITHOUT_NETWORK = {"pixel", "tone"}


def attention_vgg(backbone: AttentionVGG16 | str | Path = BUNDLED, **options) -> PerceptualLoss:
    """`PerceptualLoss` on a sketch-tuned attention-VGG: the one that comes with the package, or `backbone`."""
    loss = PerceptualLoss(backbone, **options)
    _expect_attention(loss, ("cbam",), "vgg")
    if is_vgg16_weights(backbone):
        warnings.warn(
            f"{backbone} holds plain VGG-16 weights, so the attention is untrained and random: the arm that fails in"
            " the paper. Tune it, or choose the loss vgg.",
            stacklevel=2,
        )
    return loss


def vgg(backbone: str | Path = "imagenet", **options) -> PerceptualLoss:
    """`PerceptualLoss` on VGG-16: ImageNet weights, a `.safetensors`, or a folder tuned without attention."""
    loss = PerceptualLoss(load_frozen(backbone, options.get("layers", DEFAULT_LAYERS), "none"), **options)
    _expect_attention(loss, ("none", "identity"), "attention_vgg")
    return loss


def paper_l1(backbone: AttentionVGG16 | str | Path = BUNDLED, **options) -> PerceptualLoss:
    """The paper's loss, taken literally (Seo 2025, section 4.1): L1 between plain activations, summed over layers.

    It is not calibrated: unrelated drawings are about 60 apart on the bundled backbone, mostly because of relu1_2.
    """
    return PerceptualLoss(backbone, normalization="none", distance="l1", **options)


LOSSES: dict[str, Callable] = {
    "attention_vgg": attention_vgg,
    "vgg": vgg,
    "gram": StyleLoss,
    "tone": ToneLoss,
    "pixel": PixelLoss,
    "lpips": LPIPSLoss,
    "paper_l1": paper_l1,
}


def build_loss(
    name: str, *, size: int = 64, dtype: torch.dtype = torch.float32, **options
) -> Callable[[Tensor, Tensor], Tensor]:
    """Build a loss by name; a plug-in must keep the contract, see `check_loss`.

    Args:
        name: a key of `LOSSES`, an entry point of the group "sketch_perceptual.losses", or "module:Class".
        size, dtype: of the images in training.
        options: keywords of the loss; those that are None keep their defaults.
    """
    plugins = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    options = {option: value for option, value in options.items() if value is not None}
    if name in LOSSES:
        builder = LOSSES[name]
    elif name in plugins:
        builder = _load(name, plugins[name].load)
    elif ":" in name:
        builder = _load(name, lambda: _import(name))
    else:
        raise InputError(
            f"there is no perceptual loss {name!r}: choose {', '.join([*LOSSES, *plugins])}, or write module:Class"
        )
    _check_options(name, builder, options)
    try:
        loss = builder(**options)
    except InputError:
        raise
    except Exception as error:
        if name in LOSSES:
            raise
        raise InputError(f"the loss {name} cannot be built: {_describe(error)}") from error
    if name not in LOSSES:
        check_loss(loss, name, size, dtype)
    return loss


def _check_options(name: str, builder: Callable, options: dict) -> None:
    """InputError if the builder has no parameter for one of the options."""
    parameters = inspect.signature(builder).parameters
    unknown = [option for option in options if option not in parameters]
    if unknown and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        takes = f"only {', '.join(f'`{option}`' for option in parameters)}" if parameters else "no options"
        refused = ", ".join(f"`{option}`" for option in unknown)
        raise InputError(f"the loss {name} does not take {refused}: it takes {takes}")


class MeanLoss(FrozenParts):
    """Weighted mean of several losses, so that 1 still stands for unrelated drawings.

    Args:
        losses: callables `(images, target) -> (B,)` or `(B, 1, 1, 1)`; modules among them are frozen.
        weights: one positive factor per loss.
    """

    def __init__(self, losses: Sequence[Callable[[Tensor, Tensor], Tensor]], weights: Sequence[float]):
        super().__init__()
        self.losses, self.weights = losses, weights
        self.parts = nn.ModuleList(loss for loss in losses if isinstance(loss, nn.Module))

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        values = [
            weight * one_per_image(loss(images, target), images, name_of(loss)).float()
            for weight, loss in zip(self.weights, self.losses, strict=True)
        ]
        return torch.stack(values).sum(0) / sum(self.weights)


def build_losses(names: Sequence[str], **options) -> Callable[[Tensor, Tensor], Tensor]:
    """Build one loss from several: names as in `build_loss`, or NAME=WEIGHT with a positive weight; InputError.

    Args:
        options: those of `build_loss`, for each of the losses. Beside others, a loss without a network ignores
            `backbone` and `layers`.
    """
    parts, weights = [], []
    shared = {option: value for option, value in options.items() if option not in ("backbone", "layers")}
    for name in names:
        part, _, weight = name.partition("=")
        try:
            weights.append(float(weight or 1))
        except ValueError:
            weights.append(0.0)
        if not 0 < weights[-1] < math.inf:
            raise InputError(f"the weight of the perceptual loss {part} must be a positive number, got {weight!r}")
        parts.append(build_loss(part, **(shared if part in WITHOUT_NETWORK and len(names) > 1 else options)))
    return parts[0] if len(parts) == 1 else MeanLoss(parts, weights)


def check_loss(
    loss: Callable[[Tensor, Tensor], Tensor], name: str = "loss", size: int = 64, dtype: torch.dtype = torch.float32
) -> None:
    """Check that a plug-in keeps the contract of a perceptual loss; InputError if not.

    `(images, target)`, both (B, 3, H, W), the target in [-1, 1] and the images about that, like a decoder's output
    -> (B,), or (B, 1, 1, 1) like lpips, in float32, finite, 0 on equal images, positive on different ones, independent
    of other rows, with a gradient to the images and to no weight. It is tested as in training, on squares of `size`
    pixels in `dtype`, to which a module is cast.
    """
    if isinstance(loss, nn.Module):
        loss.to(dtype)
    weight = first_weight(loss) if isinstance(loss, nn.Module) else None
    device = "cpu" if weight is None else weight.device
    rng = torch.Generator().manual_seed(0)
    images, target = (torch.rand(2, 2, 3, size, size, generator=rng) * 2 - 1).to(device, dtype)
    images = (1.3 * images).requires_grad_()

    def call(images: Tensor, target: Tensor) -> Tensor:
        try:
            value = loss(images, target)
        except Exception as error:
            low, high = (float(x) for x in images.detach().aminmax())
            raise InputError(
                f"the perceptual loss {name} fails on images of {tuple(images.shape)} in {dtype}, from {low:.2g} to"
                f" {high:.2g}: {_describe(error)}"
            ) from error
        return one_per_image(value, images, f"the perceptual loss {name}")

    def require(kept: bool, rule: str) -> None:
        if not kept:
            raise InputError(f"the perceptual loss {name} {rule}")

    value = call(images, target)
    require(value.dtype == torch.float32, f"must return float32, not {value.dtype}")
    require(
        bool(torch.isfinite(value).all() and (value > 0).all()),
        "must be finite and positive on different images",
    )
    require(bool((call(target, target).abs() < 1e-6).all()), "must be 0 on equal images")
    single = call(images[:1], target[:1])
    tolerance = 1e-3 if dtype == torch.float32 else 0.05
    require(torch.allclose(single, value[:1], rtol=tolerance), "must score each image on its own, whatever the batch")
    require(value.requires_grad, "must carry a gradient to the images")
    value.sum().backward()
    require(bool(images.grad.abs().sum() > 0), "must carry a gradient to the images")
    weights = loss.parameters() if isinstance(loss, nn.Module) else ()
    require(not any(w.requires_grad for w in weights), "must be frozen: requires_grad_(False) on its weights")


def _expect_attention(loss: PerceptualLoss, expected: tuple[str, ...], other: str) -> None:
    if loss.backbone.attention not in expected:
        raise InputError(f"the backbone has attention={loss.backbone.attention!r}: the loss for it is {other}")


def _load(name: str, load: Callable[[], Callable]) -> Callable:
    try:
        return load()
    except Exception as error:
        raise InputError(
            f"the loss {name} cannot be imported ({_describe(error)}): install it, or put its folder on PYTHONPATH"
        ) from error


def _import(name: str) -> Callable:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
