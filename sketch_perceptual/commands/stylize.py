"""Convert images with Johnson's image transformation network (Johnson et al. 2016; Seo 2025, section 4.1).

    sketch-perceptual stylize --model sketch-style --input photos --output sketches

`--input` is an image or a folder, searched recursively; sizes, transparency and EXIF are kept. No source is
overwritten, and images in `--output` are not converted. Large images are converted in tiles, without seams.
"""

import argparse
import sys
from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from ..cli.arguments import Parser, at_least
from ..cli.console import print_result
from ..cli.entry import run
from ..data.folders import find_images, is_inside
from ..data.images import HALVED, load_extras, load_image, to_pil, to_tensor
from ..errors import InputError, TooLittleMemory, first_line, printable, shown
from ..files import PICTURES, Output, check_folder, check_outputs, check_target, write_whole
from ..networks.style_net import JohnsonNet, load_johnson, settled

WHOLE = 2**21  # pixels: larger images are converted in tiles
TILE = 1024  # side of a tile, in pixels
MARGIN = 64  # around a tile, cut off again: wider than the receptive field; a multiple of the stride
SAMPLES, SAMPLE = 8, 512  # number of tiles that the normalization is computed from, and their side


@torch.inference_mode()
def stylize(network: JohnsonNet, images: list[Image.Image]) -> list[Image.Image]:
    """Convert RGB images of one size, on the device of the network.

    Images with more than WHOLE pixels are converted in tiles; instance norm then uses the statistics of one sample for
    all tiles.
    """
    if images[0].width * images[0].height > WHOLE:
        return [stylize_tiles(network, image) for image in images]
    return list(map(to_pil, network(to_batch(network, images))))


def stylize_tiles(network: JohnsonNet, image: Image.Image) -> Image.Image:
    network = settled(network, to_batch(network, sample_tiles(image)))
    page = Image.new("RGB", image.size)
    for left, top in corners(image.size, TILE):
        right, bottom = min(left + TILE, image.width), min(top + TILE, image.height)
        x, y = max(0, left - MARGIN), max(0, top - MARGIN)
        tile = image.crop((x, y, min(right + MARGIN, image.width), min(bottom + MARGIN, image.height)))
        drawn = to_pil(network(to_batch(network, [tile]))[0])
        page.paste(drawn.crop((left - x, top - y, right - x, bottom - y)), (left, top))
    return page


def sample_tiles(image: Image.Image) -> list[Image.Image]:
    """Return up to SAMPLES tiles of one size, from random positions of an image."""
    width, height = min(SAMPLE, image.width), min(SAMPLE, image.height)
    positions = [(min(x, image.width - width), min(y, image.height - height)) for x, y in corners(image.size, SAMPLE)]
    chosen = torch.randperm(len(positions), generator=torch.Generator().manual_seed(0))[:SAMPLES].tolist()
    return [image.crop((x, y, x + width, y + height)) for x, y in map(positions.__getitem__, chosen)]


def corners(size: tuple[int, int], side: int) -> list[tuple[int, int]]:
    return [(x, y) for y in range(0, size[1], side) for x in range(0, size[0], side)]


def to_batch(network: JohnsonNet, images: list[Image.Image]) -> torch.Tensor:
    return torch.stack(list(map(to_tensor, images))).to(next(network.parameters()).device)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="sketch-perceptual stylize", description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="a folder or Hub id of train_johnson.py")
    add("--input", required=True, type=Path, help="an image or a folder")
    add("--output", required=True, type=Path, help="the image or folder to write")
    add("--batch_size", type=at_least(1), default=1, help="batch size, for consecutive images of one size")
    add("--background", default="white", help="colour behind transparent images; they stay transparent")
    add("--device", help="default: the first GPU, otherwise the CPU")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    run(convert_images, parse_args(argv), "sketch-perceptual stylize")


def convert_images(args: argparse.Namespace) -> None:
    """Convert the images of `input`; SystemExit with 2 if some cannot be read."""
    targets = find_targets(args.input, args.output)
    files = [path for path in (args.output, *targets.values()) if not path.is_dir()]
    check_outputs([Output("output", path) for path in files], [args.model, *targets])
    if args.input.is_dir():
        check_folder("output", args.output)
    else:
        check_target("output", args.output, PICTURES)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    network = to_device(load_johnson(args.model), device)
    load_image(Image.new("RGB", (1, 1)), args.background)  # an unknown colour fails here, not for each image
    unreadable = convert(network, targets, args.batch_size, args.background)
    if count := len(targets) - len(unreadable):
        print_result(f"{count} images written to {shown(args.output)}")
    if not unreadable:
        return
    if len(targets) == 1:
        raise InputError(unreadable[0])
    print(*map(printable, unreadable), sep="\n", file=sys.stderr)
    written = "all other images were written" if len(unreadable) < len(targets) else "nothing was written"
    print(f"{len(unreadable)} of {len(targets)} images could not be read; {written}.", file=sys.stderr)
    sys.exit(2)


def find_targets(source: Path, output: Path) -> dict[Path, Path]:
    """Return the output path of each image of `source`; InputError if the paths cannot be used."""
    if not source.exists():
        raise InputError(f"`input` {source}: there is no such file or folder")
    if not source.is_dir():
        return {source: output}
    images = [source / name for name in find_images(source, "`input`")[1]]
    sources = [path for path in images if not (output.is_dir() and is_inside(path, output))]
    names = {path: path.relative_to(source).as_posix() for path in sources}
    targets = {path: output / output_name(name) for path, name in names.items()}
    if not targets:
        raise InputError(f"`output` {output} contains all images of `input`: choose another folder")
    if len(set(targets.values())) < len(targets):
        twice = [path for path, target in targets.items() if list(targets.values()).count(target) > 1]
        raise InputError(f"{twice[0]} and {twice[1]} would both be written to {targets[twice[0]]}: rename one")
    if skipped := len(images) - len(sources):
        print(f"{skipped} images in {shown(output)} are not converted", file=sys.stderr)
    return targets


def to_device(network: JohnsonNet, device: str) -> JohnsonNet:
    try:
        torch.zeros(1, device=device).item()  # fails on "meta", a device without values
        return network.to(device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"`device` {device} cannot be used, try cpu or cuda: {first_line(error)}") from error


def convert(network: JohnsonNet, targets: dict[Path, Path], batch_size: int, background: str) -> list[str]:
    """Convert and write the images; return messages about those that cannot be read."""
    unreadable = []

    def readable() -> Iterator[tuple[Path, Image.Image]]:
        for path in tqdm(targets, unit="image", disable=None):
            try:
                image = load_image(path, background)
            except TooLittleMemory:
                raise
            except InputError as error:
                unreadable.append(str(error))
                continue
            if HALVED in image.info["notes"]:
                unreadable.append(f"{path} has more pixels than Pillow's limit: make it smaller.")
            else:
                yield path, image

    for _, group in groupby(readable(), key=lambda item: item[1].size):
        while batch := list(islice(group, batch_size)):
            paths, images = zip(*batch, strict=True)
            for path, image in zip(paths, stylize(network, list(images)), strict=True):
                save(image, targets[path], *load_extras(path))
    return unreadable


def output_name(name: str) -> str:
    """Return the name itself if its format is good for line drawings, otherwise with .png appended."""
    return name if Path(name).suffix.lower() in (".png", ".webp", ".jpg", ".jpeg") else f"{name}.png"


def save(image: Image.Image, path: Path, alpha: Image.Image | None, exif: bytes) -> None:
    options: dict[str, Any] = {"exif": exif} if exif else {}
    if alpha is not None:
        image.putalpha(alpha)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda partial: image.save(partial, quality=95, lossless=True, **options))
