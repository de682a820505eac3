"""Measure what each loss sees of strokes and paper at the sizes that models draw: its response to known damage.

    python -m research.response --trunk vgg16_hed.safetensors --figure research/response.png

Each of 8 generated drawings is damaged: blurred, on grey or tinted paper, with wider strokes, with gaps, in pale ink.
A loss compares it with the drawing on squares as the term draws them; the value is a share of what it gives unrelated
drawings on such squares. "64 px" compares squares of 64 px at their size, the default; "half, shrunk" squares of half
the side, shrunk to 64 px, the default until 2026-11-30.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from skimage.morphology import skeletonize
from torch import Tensor

from sketch_perceptual import to_tensor
from sketch_perceptual.diffusion.term import cut_squares, draw_squares
from sketch_perceptual.drawings import CLASSES, draw
from sketch_perceptual.losses import build_losses
from sketch_perceptual.seeds import generator

PIXELS = 8  # of a latent
SQUARES = 3  # of each drawing
SIZES = {"512 px": 512, "1024 px": 1024}
Damage = Callable[[Tensor, float], Tensor]


def blur(images: Tensor, pixels: float) -> Tensor:
    return torch.from_numpy(ndimage.gaussian_filter(images.numpy(), pixels, axes=(2, 3), mode="nearest"))


def grey_paper(images: Tensor, percent: float) -> Tensor:
    return (images + 1) * (1 - percent / 100) - 1


def tint(images: Tensor, percent: float) -> Tensor:
    """Yellow paper: less blue."""
    return (images + 1) * (1 - torch.tensor([0, 0, percent / 100]).view(3, 1, 1)) - 1


def wider(images: Tensor, pixels: float) -> Tensor:
    size = int(pixels) + 1
    return -F.max_pool2d(F.pad(-images, (size // 2, (size - 1) // 2) * 2, value=-1), size, 1)


def pale(images: Tensor, percent: float) -> Tensor:
    return 1 - (1 - images) * (1 - percent / 100)


def broken(images: Tensor, percent: float) -> Tensor:
    """Gaps, 8 px wide, over this share of the centre lines."""
    damaged = images.clone()
    rng = np.random.default_rng(0)
    for image in damaged:
        lines = skeletonize(image.mean(0).numpy() < 0)
        gaps = np.zeros_like(lines)
        points = np.argwhere(lines)
        for y, x in rng.permutation(points)[: round(len(points) * percent / 100 / 8)]:
            gaps[max(0, y - 3) : y + 5, max(0, x - 3) : x + 5] = True
        image[:, torch.from_numpy(gaps)] = 1
    return damaged


DAMAGES: dict[str, tuple[Damage, str, tuple[float, ...]]] = {
    "blur": (blur, "px", (0.5, 1, 2, 4)),
    "grey paper": (grey_paper, "%", (2, 5, 10, 20)),
    "tint": (tint, "%", (2, 5, 10, 20)),
    "wider strokes": (wider, "px", (1, 2, 4)),
    "gaps": (broken, "%", (5, 10, 20, 40)),
    "pale ink": (pale, "%", (10, 20, 40, 60)),
}
LOSSES = ("gram tone", "gram", "tone", "attention_vgg", "lpips", "vgg", "pixel")
ON_TRUNK = ("lpips", "vgg")


def squares(images: Tensor, side: int) -> Tensor:
    """First row and column of the squares of each drawing, (SQUARES, B, 2) in pixels."""
    drawn = [
        draw_squares(images, [side // PIXELS] * 2, PIXELS, generator("response", number)) for number in range(SQUARES)
    ]
    return PIXELS * torch.stack(drawn)


def cut(images: Tensor, corners: Tensor, side: int) -> Tensor:
    return torch.cat([cut_squares(images, each, [side, side]) for each in corners])


def mean_of(loss: Callable[[Tensor, Tensor], Tensor], images: Tensor, true: Tensor) -> float:
    with torch.no_grad():
        return float(torch.cat([loss(a, b) for a, b in zip(images.split(8), true.split(8), strict=True)]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--trunk", help="a .safetensors with VGG-16 weights for lpips and vgg; without it they are left out")
    add("--figure", type=Path, help="the curves")
    add("--losses", nargs="+", default=LOSSES, help='names, or several averaged, as in "gram tone"')
    args = parser.parse_args()
    names = [name for name in args.losses if args.trunk or name not in ON_TRUNK]
    curves: dict[tuple[str, str, str, str], list[float]] = {}
    losses = {
        (name, resolution): build_losses(
            name.split(), resolution=resolution, backbone=args.trunk if name in ON_TRUNK else None
        )
        for name in names
        for resolution in (None, 64)
    }
    for size_name, size in SIZES.items():
        images = torch.stack([to_tensor(draw(name, 0, 0, "pen", size)) for name in CLASSES[::2]])
        for scale, side, resolution in (("64 px", 64, None), ("half, shrunk", size // 2, 64)):
            corners = squares(images, side)
            true, other = cut(images, corners, side), cut(images.roll(1, 0), corners.roll(1, 1), side)
            unrelated = {name: mean_of(losses[name, resolution], other, true) for name in names}
            for damage_name, (damage, _, amounts) in DAMAGES.items():
                for amount in amounts:
                    damaged = cut(damage(images, amount).float(), corners, side)
                    for name in names:
                        value = 100 * mean_of(losses[name, resolution], damaged, true) / unrelated[name]
                        curves.setdefault((size_name, damage_name, scale, name), []).append(value)
        print(table(curves, size_name, names), flush=True)
    if args.figure:
        plot(curves, names, args.figure)


def table(curves: dict, size: str, names: list[str]) -> str:
    columns = [(d, amount, unit) for d, (_, unit, amounts) in DAMAGES.items() for amount in amounts[1:3]]
    heads = [f"{d} {amount:g} {unit}" for d, amount, unit in columns]
    lines = [f"| {size}, % of unrelated | squares | " + " | ".join(heads) + " |", "|---" * (len(heads) + 2) + "|"]
    for name in names:
        for scale in ("64 px", "half, shrunk"):
            values = [curves[size, d, scale, name][DAMAGES[d][2].index(amount)] for d, amount, _ in columns]
            lines.append(f"| {name} | {scale} | " + " | ".join(f"{value:.2g}" for value in values) + " |")
    return "\n".join(lines)


def plot(curves: dict, names: list[str], path: Path) -> None:
    figure, axes = plt.subplots(len(SIZES), len(DAMAGES), figsize=(3 * len(DAMAGES), 3 * len(SIZES)), sharey=True)
    for row, size in zip(axes, SIZES, strict=True):
        for axis, (damage, (_, unit, amounts)) in zip(row, DAMAGES.items(), strict=True):
            for number, name in enumerate(names):
                for scale, style in (("64 px", "-"), ("half, shrunk", ":")):
                    label = name if scale == "64 px" else None
                    axis.plot(amounts, curves[size, damage, scale, name], style, color=f"C{number}", label=label)
            axis.set(title=f"{damage}, {size}", xlabel=unit, yscale="log", ylim=(0.01, 300))
        row[0].set_ylabel("% of unrelated drawings")
    axes[0, 0].legend(fontsize=7)
    figure.suptitle("Squares of 64 px at their size (lines), squares of half the side shrunk to 64 px (dotted)")
    figure.tight_layout()
    figure.savefig(path, dpi=60)


if __name__ == "__main__":
    main()
