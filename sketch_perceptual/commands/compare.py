"""Print the perceptual distance of two drawings: 0 if they are equal, about 1 if they are unrelated.

    sketch-perceptual compare fox.png other-fox.png --figure difference.png

Two folders are compared picture by picture, paired by name. The distance is `PerceptualLoss`; --figure shows each pair
and where it differs.
"""

import argparse
import json
import math
import sys
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from ..cli.arguments import Parser, at_least
from ..cli.console import print_result
from ..cli.entry import run
from ..data.folders import find_images
from ..data.images import load_image, to_pil, to_tensor
from ..errors import InputError, first_names, shown
from ..figures import image_grid
from ..files import PICTURES, Output, check_outputs, write_whole
from ..losses import DEFAULT_LAYERS, PerceptualLoss
from ..networks.backbone import BUNDLED, tuned_resolution
from ..networks.hub_model import fingerprint

SHOWN = 256  # side of an image in the figure, in pixels
FITS = ("refuse", "pad", "canvas")
FULL_RED = 1.5  # distance shown as full red; unrelated drawings have 1 on average


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="sketch-perceptual compare", usage="%(prog)s A B [options]", description=__doc__)
    add = parser.add_argument
    add("first", type=Path, metavar="A", help="an image, or a folder of images")
    add("second", type=Path, metavar="B", help="another image, or the folder with the other images")
    add(
        "--backbone",
        default=str(BUNDLED),
        help='a folder or Hub id, a .safetensors with VGG-16 weights, "imagenet" or "bundled"',
    )
    add(
        "--layers",
        nargs="+",
        metavar="LAYER",
        default=list(DEFAULT_LAYERS),
        help="layers of the network to compare",
    )
    add(
        "--resolution",
        type=at_least(16),
        help="larger images are shrunk to this; default: the resolution the backbone was tuned at",
    )
    add(
        "--fit",
        choices=FITS,
        default="refuse",
        help="images of different sizes: refuse them, scale both up to the larger frame and pad them (pad), or put"
        " both unscaled on a canvas of that size (canvas)",
    )
    add("--background", default="white", help="colour of the padding and behind transparent images")
    add("--figure", type=Path, help="write a picture of both images and a map of their differences")
    add("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    if args.first.is_dir() != args.second.is_dir():
        parser.error(f"{args.first} and {args.second} must be two images or two folders")
    return args


def main(argv: list[str] | None = None) -> None:
    run(print_distances, parse_args(argv), "sketch-perceptual compare")


def print_distances(args: argparse.Namespace) -> None:
    if args.figure is not None:
        check_outputs([Output("figure", args.figure, PICTURES)], [args.first, args.second, args.backbone])
    result = compare(args)
    print_result(json.dumps(result, indent=2) if args.json else as_text(result))


@torch.inference_mode()
def compare(args: argparse.Namespace) -> dict:
    """Return the distance of each pair and the settings; write the figure."""
    matches = find_pairs(args.first, args.second)
    resolution = args.resolution or tuned_resolution(args.backbone)
    loss = PerceptualLoss(args.backbone, args.layers, resolution=resolution)
    smallest = 2 ** (max(int(name[4]) for name in loss.layers) - 1)  # each stage except the last halves an image
    pairs: list[dict[str, Any]] = []
    rows = {}
    for first, second in tqdm(matches, unit="pair", disable=None if len(matches) > 1 else True):
        images = same_size(first, second, args.fit, args.background)
        if min(images[0].size) < smallest:
            raise InputError(f"{first} and {second}: sides must have at least {smallest} pixels for these `layers`")
        a, b = (to_tensor(image)[None] for image in images)
        layers = {name: float(value) for name, value in loss(a, b, per_layer=True).items()}
        distance = sum(loss.layer_weights[name] * value for name, value in layers.items())
        if not math.isfinite(distance):
            raise InputError(
                f"the distance of {first} and {second} is {distance}: `backbone` {args.backbone} has weights that are"
                " not finite, or too large"
            )
        pairs.append({"first": str(first), "second": str(second), "distance": distance, "layers": layers})
        if args.figure is not None:
            name = first.relative_to(args.first) if args.first.is_dir() else ""
            shown = [*images, difference_map(a, b, loss(a, b, spatial=True))]
            rows[f"{distance:.3f}  {name}"] = [ImageOps.pad(image, (SHOWN, SHOWN), color="white") for image in shown]
    if args.figure is not None:
        heads = ["A", "B"] if args.first.is_dir() else [args.first.name, args.second.name]
        figure = image_grid(rows, [*heads, "where they differ"], SHOWN)
        write_whole(args.figure, figure.save)
    return {
        "pairs": pairs,
        "mean": sum(pair["distance"] for pair in pairs) / len(pairs),
        "backbone": "bundled" if args.backbone == str(BUNDLED) else args.backbone,
        "backbone_weights": fingerprint(loss.backbone),
        "layer_weights": loss.layer_weights,
        "resolution": resolution,
        "fit": args.fit,
        "background": args.background,
    }


def find_pairs(first: Path, second: Path) -> list[tuple[Path, Path]]:
    """Return the two images or, from two folders, those of the same name in any format; name the rest on stderr."""
    if not first.is_dir():
        return [(first, second)]
    one, other = by_name(first), by_name(second)
    if not (names := [name for name in one if name in other]):
        raise InputError(f"no image of {first} has the name of an image of {second}")
    if lone := [shown(side[name]) for side in (one, other) for name in side if name not in names]:
        print(f"{len(lone)} images without a pair, not compared: {first_names(lone)}", file=sys.stderr)
    return [(one[name], other[name]) for name in names]


def by_name(folder: Path) -> dict[PurePosixPath, Path]:
    """Return the images of a folder by path without the ending."""
    images = {}
    for name in find_images(folder)[1]:
        stem = PurePosixPath(name).with_suffix("")
        if stem in images:
            raise InputError(f"{images[stem]} and {folder / name} have the same name: rename one")
        images[stem] = folder / name
    return images


def same_size(first: Path, second: Path, fit: str, background: str) -> list[Image.Image]:
    """Load both images and, if they differ in size, bring them to the larger width and height: see `--fit`."""
    images = [load_image(path, background) for path in (first, second)]
    if images[0].size == images[1].size:
        return images
    if fit == "refuse":
        sizes = " and ".join(f"{image.width} x {image.height}" for image in images)
        raise InputError(f"{first} and {second} have different sizes, {sizes}: resize one, or set `fit` to pad")
    width, height = (max(sides) for sides in zip(*(image.size for image in images), strict=True))
    if fit == "pad":
        return [ImageOps.pad(image, (width, height), color=background) for image in images]
    papers = [Image.new("RGB", (width, height), background) for _ in images]
    for paper, image in zip(papers, images, strict=True):
        paper.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return papers


def difference_map(a: Tensor, b: Tensor, distances: Tensor) -> Image.Image:
    """Return both drawings in pale grey, with red where they differ."""
    pale = to_pil(torch.minimum(a, b)[0] / 4 + 0.75)
    strength = to_pil((distances / FULL_RED).clamp(0, 1).expand(3, -1, -1) * 2 - 1).convert("L")
    return Image.composite(Image.new("RGB", pale.size, "#d7191c"), pale, strength)


def as_text(result: dict) -> str:
    lines = [("distance", *result["layer_weights"], "")]
    for pair in result["pairs"]:
        lines.append((pair["distance"], *pair["layers"].values(), f"{shown(pair['first'])}  {shown(pair['second'])}"))
    if (count := len(result["pairs"])) > 1:
        means = (sum(pair["layers"][name] for pair in result["pairs"]) / count for name in result["layer_weights"])
        lines.append((result["mean"], *means, f"mean of {count}"))
    cells = [[value if isinstance(value, str) else f"{value:.3f}" for value in line] for line in lines]
    return "\n".join("".join(f"{cell:<10}" for cell in line).rstrip() for line in cells)
