"""PerceptualLoss beside the lpips package on the same pictures: forward and backward, in turns in one run.

    python -m benchmarks.losses --resolution 224 --batch_size 1

Random weights, which cost what trained ones cost: VGG-16 for `lpips` and `vgg`, at lpips' five layers and at our four,
the bundled backbone's shape, and the paper's network without the two max-pools. A loss reads the target once, the
prediction with a gradient.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import lpips
import torch
from torch import nn

from sketch_perceptual import PerceptualLoss
from sketch_perceptual.losses import DEFAULT_LAYERS, named_networks
from sketch_perceptual.networks.backbone import AttentionVGG16

LOSSES = {
    "lpips": lambda: lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).requires_grad_(False).eval(),
    "vgg, lpips' layers": lambda: PerceptualLoss(
        AttentionVGG16("none", num_classes=0, last_layer="relu5_3"), [*DEFAULT_LAYERS, "relu5_3"]
    ),
    "vgg": lambda: PerceptualLoss(AttentionVGG16("none", num_classes=0, last_layer="relu4_3")),
    "attention_vgg, pools kept": lambda: PerceptualLoss(
        AttentionVGG16(pool_after_attention=True, num_classes=0, last_layer="relu4_3")
    ),
    "attention_vgg, the paper's": lambda: PerceptualLoss(AttentionVGG16(num_classes=0, last_layer="relu4_3")),
}


def seconds(loss: nn.Module, images: torch.Tensor, target: torch.Tensor) -> float:
    cuda = images.device.type == "cuda"
    start = time.perf_counter()
    images.grad = None
    loss(images, target).sum().backward()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def kept(forward: Callable[[], object], module: nn.Module) -> int:
    """Bytes that a forward pass keeps for the backward one, each tensor once, weights left out."""
    storages = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage  # held, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    weights = {
        parameter.untyped_storage()._cdata for _, part in named_networks(module) for parameter in part.parameters()
    }
    return sum(storage.nbytes() for address, storage in storages.items() if address not in weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    shape = (args.batch_size, 3, args.resolution, args.resolution)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    losses = {name: make().to(device) for name, make in LOSSES.items()}
    images, target = (torch.rand(2, *shape) * 2 - 1).to(device)
    images.requires_grad_()
    times = {name: [] for name in losses}
    for _ in range(args.rounds + 1):
        for name, loss in losses.items():
            times[name].append(seconds(loss, images, target))
    for name in losses:
        ratios = [own / other for own, other in zip(times[name][1:], times["lpips"][1:], strict=True)]
        ratio = f"{statistics.median(ratios):.2f} x lpips ({min(ratios):.2f} to {max(ratios):.2f})"
        memory = kept(partial(losses[name], images, target), losses[name]) / 1e6
        print(
            f"{name}: {statistics.median(times[name][1:]):.3f} s, {ratio}, {memory:.0f} MB kept for the backward pass"
        )


if __name__ == "__main__":
    main()
