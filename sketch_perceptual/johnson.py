"""Johnson's image transformation network (Johnson et al. 2016; Seo 2025, section 4.1), and pictures through it.

    python -m sketch_perceptual.johnson --model sketch-style --input photos --output sketches

`--input` is a picture or a folder with all its folders; sizes, transparency and EXIF are kept.
"""

import argparse
from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from .data.folders import find_images
from .data.images import load_extras, load_image, to_pil, to_tensor
from .errors import InputError
from .networks.johnson import JohnsonNet, load_johnson


@torch.inference_mode()
def stylize(network: JohnsonNet, images: list[Image.Image]) -> list[Image.Image]:
    """RGB pictures of one size through the network, on its device."""
    batch = torch.stack(list(map(to_tensor, images))).to(next(network.parameters()).device)
    return list(map(to_pil, network(batch)))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="a folder or Hub id of train_johnson.py")
    add("--input", required=True, help="a picture or a folder")
    add("--output", required=True, help="where the picture, or the folder of pictures, is written")
    add("--batch_size", type=int, default=1, help="pictures at a time, where they follow each other in one size")
    add("--background", default="white", help="colour behind transparent pictures; their transparency is kept")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    try:
        bad = convert(args)
    except InputError as error:
        parser.error(str(error))
    if bad:
        parser.exit(2, "\n".join(bad) + "\nThe others are written.\n")


def convert(args: argparse.Namespace) -> list[str]:
    """Write what `--input` becomes; returns what is to be said of pictures that cannot be read."""
    network = load_johnson(args.model).to(args.device)
    source, bad = Path(args.input), []
    todo = {source: Path(args.output)}
    if source.is_dir():
        todo = {source / name: Path(args.output, output_name(name)) for name in find_images(source, "--input")[1]}

    def readable() -> Iterator[tuple[Path, Image.Image]]:
        for path in tqdm(todo, unit="picture", disable=None):
            try:
                yield path, load_image(path, args.background)
            except InputError as error:
                bad.append(str(error))

    for _, group in groupby(readable(), key=lambda item: item[1].size):
        while batch := list(islice(group, args.batch_size)):
            paths, images = zip(*batch, strict=True)
            for path, picture in zip(paths, stylize(network, list(images)), strict=True):
                save(picture, todo[path], *load_extras(path))
    return bad


def output_name(name: str) -> str:
    """The name itself where its format keeps lines, else with .png at its end: no two become one."""
    return name if Path(name).suffix.lower() in (".png", ".webp", ".jpg", ".jpeg") else f"{name}.png"


def save(picture: Image.Image, path: Path, alpha: Image.Image | None, exif: bytes) -> None:
    if alpha is not None:
        picture.putalpha(alpha)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, quality=95, lossless=True, **({"exif": exif} if exif else {}))
    except (OSError, ValueError) as error:
        raise InputError(f"--output {path} cannot be written: {error}") from error


if __name__ == "__main__":
    main()
