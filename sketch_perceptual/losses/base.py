"""Base classes of the losses: frozen networks, checked inputs, eval mode, float32 results."""

import warnings
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import InputError


class FrozenParts(nn.Module):
    """Module whose networks are frozen, in eval mode, and hidden from a parent: base of the losses.

    A module set as an attribute is moved, cast, copied and pickled with this one, but is not in the `parameters()`,
    `state_dict()`, `modules()` and `apply()` of a parent. So no optimizer, checkpoint, `requires_grad_(True)` or
    weight initialisation reaches it. `named_networks` does.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module):
            self.__dict__[name] = value.requires_grad_(False).eval()
        else:
            super().__setattr__(name, value)

    def networks(self) -> dict[str, nn.Module]:
        """Attribute -> network."""
        return {name: value for name, value in self.__dict__.items() if isinstance(value, nn.Module)}

    def _apply(self, fn, recurse=True):
        _check_keeps_values(fn, type(self).__name__)
        for network in self.networks().values():
            network._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # Checkpoints from when the networks were registered still load strictly.
        old = tuple(f"{prefix}{name}." for name in self.networks())
        super()._load_from_state_dict({k: v for k, v in state_dict.items() if not k.startswith(old)}, prefix, *args)


def _check_keeps_values(fn: Callable[[Tensor], Tensor], name: str) -> None:
    """InputError if `fn`, which moves a module, loses its weights, like `to_empty` and a move to "meta"."""
    moved = fn(probe := torch.full((8,), 0.5))
    if moved.is_meta or (has_values(moved) and not torch.equal(moved.to(probe), probe)):
        raise InputError(
            f"`to_empty` or the device meta would lose the weights of {name}, which no checkpoint of its parent"
            " contains: build it after the parent has been moved"
        )


def named_networks(loss: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield `loss.named_modules()`, including those of networks that are hidden in losses."""
    for name, module in loss.named_modules(prefix=prefix):
        yield name, module
        if isinstance(module, FrozenParts):
            for part, network in module.networks().items():
                yield from named_networks(network, f"{name}.{part}" if name else part)


def all_weights(loss: nn.Module) -> dict[str, Tensor]:
    """Return `loss.state_dict()`, including the weights of networks that are hidden in losses."""
    return {
        f"{name}.{key}" if name else key: weight
        for name, module in named_networks(loss)
        for key, weight in module.state_dict().items()
    }


def first_weight(loss: nn.Module) -> Tensor | None:
    """Return a floating-point parameter or buffer, which has the device and dtype of a loss; None without any."""
    for _, module in named_networks(loss):
        for tensor in chain(module.parameters(recurse=False), module.buffers(recurse=False)):
            if tensor.is_floating_point():
                return tensor
    return None


class ImageLoss(FrozenParts):
    """Base of the losses: checks its inputs, stays in eval mode, and computes with autocast off.

    Call with images and target, RGB or grey in [-1, 1], (B, 3, H, W) or (B, 1, H, W), of any floating dtype; returns
    (B,) in float32, 0 on equal images and about 1 on unrelated drawings. It computes in the dtype of its weights,
    float32 unless it was cast. The gradient reaches only `images`. Subclasses implement `compare(images, target)` for
    two RGB batches of one shape.

    Args:
        resolution: images whose shorter side is longer are shrunk to it (bilinear, antialiased); never enlarged.
            None leaves them as they are.
    """

    smallest_side = 2  # pixels; smaller images would vanish in the network's pools

    def __init__(self, resolution: int | None = None):
        super().__init__()
        if resolution is not None and (not isinstance(resolution, int) or resolution < 16):
            raise InputError(f"`resolution` must be an integer of at least 16 pixels or None, got {resolution!r}")
        self.resolution = resolution

    def compare(self, images: Tensor, target: Tensor):
        raise NotImplementedError

    def forward(self, images: Tensor, target: Tensor, **options):
        check_images(images, target, self.smallest_side)
        weight = first_weight(self)
        if weight is not None and weight.device != images.device:
            self.to(images.device)
        dtype = torch.float32 if weight is None else weight.dtype
        with torch.autocast(images.device.type, enabled=False):
            images, target = (
                self._shrink(x.float().expand(-1, 3, -1, -1)).to(dtype) for x in (images, target.detach())
            )
            return self.compare(images, target, **options)

    def train(self, mode: bool = True):
        """Stay in eval mode, whatever a parent module does."""
        return super().train(False)

    def _shrink(self, x: Tensor) -> Tensor:
        shorter = min(x.shape[-2:])
        if self.resolution is None or shorter <= self.resolution:
            return x
        size = [round(side * self.resolution / shorter) for side in x.shape[-2:]]
        return F.interpolate(x, size, mode="bilinear", antialias=True)


def check_images(images: Tensor, target: Tensor, smallest_side: int = 1) -> None:
    """InputError unless both are batches of RGB or grey in [-1, 1]; only the target's values are checked.

    A prediction may leave the range, and the training loop skips one that is not finite. Values are not checked while
    a graph is traced, nor under `torch.func`'s transforms.
    """
    for name, x in (("images", images), ("target", target)):
        if not isinstance(x, Tensor):
            raise InputError(
                f"{name} must be a tensor (B, 3, H, W) in [-1, 1], got {type(x).__name__}: stack the results of"
                " sketch_perceptual.to_tensor for each image"
            )
        if not x.is_floating_point():
            raise InputError(
                f"{name} must be floating point in [-1, 1], got {x.dtype}: use sketch_perceptual.to_tensor"
            )
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise InputError(f"{name} must be (B, 3, H, W), or (B, 1, H, W) if grey, got {tuple(x.shape)}")
    if images.shape[0] != target.shape[0] or images.shape[2:] != target.shape[2:]:
        raise InputError(
            f"images and `target` must have the same size, got {tuple(images.shape)} and {tuple(target.shape)}"
        )
    if images.device != target.device:
        raise InputError(f"images are on {images.device} and target on {target.device}: move one to the other")
    if images.shape[0] == 0:
        raise InputError(f"images must not be an empty batch, got {tuple(images.shape)}")
    if min(images.shape[2:]) < smallest_side:
        raise InputError(
            f"images must have at least {smallest_side} pixels a side for this loss, got {tuple(images.shape)}"
        )
    if has_values(images, target):
        _check_range(images, target)


def has_values(*tensors: Tensor) -> bool:
    """Return whether Python can read the values: not while tracing, under vmap and the like, or of fake ones."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # torch.func.debug_unwrap is newer than torch 2.6
    return not any(is_wrapped(x) or isinstance(x, FakeTensor) or x.is_meta for x in tensors)


def _check_range(images: Tensor, target: Tensor) -> None:
    low, high = target.detach().aminmax()
    if not (low >= -1.1 and high <= 1.1):
        raise InputError(f"target must lie in [-1, 1], got {low:.4g} to {high:.4g}: use sketch_perceptual.to_tensor")
    if spans_zero_to_one(low, high) and spans_zero_to_one(*images.detach().aminmax()):
        warnings.warn("images and target both span [0, 1]; the range here is [-1, 1]", stacklevel=6)


def spans_zero_to_one(low: Tensor, high: Tensor) -> bool:
    """Return whether values run from ink to paper in [0, 1]; a pale page in [-1, 1] is above 0, but has no 0."""
    return bool(0 <= low < 0.02 and 0.98 < high <= 1.02)


def one_per_image(value: Any, images: Tensor, loss: str) -> Tensor:
    """Reshape a loss's result, (B,), (B, 1) or (B, 1, 1, 1), to (B,); InputError with the loss's name if it cannot."""
    count = len(images)
    if not isinstance(value, Tensor) or value.shape[:1] != (count,) or value.numel() != count:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InputError(
            f"{loss} must return one number per image, shape (B,) or (B, 1, 1, 1); got {shape} for"
            f" {tuple(images.shape)}: reduce over all but the first dimension"
        )
    return value.reshape(count)


def name_of(loss: Any) -> str:
    return getattr(loss, "__name__", type(loss).__name__)
