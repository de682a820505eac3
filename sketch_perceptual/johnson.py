"""Johnson's image transformation network (Johnson et al. 2016; Seo 2025, section 4.1), and pictures through it.

    python -m sketch_perceptual.johnson --model sketch-style --input photos --output sketches

`--input` is a picture or a folder with all its folders; sizes, transparency and EXIF are kept.
"""

import argparse
from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from .data import find_images
from .errors import InputError, first_line
from .hub import HubModel
from .images import check_choice, load_extras, load_image, to_pil, to_tensor

NORMS = {"instance": lambda channels: nn.InstanceNorm2d(channels, affine=True), "batch": nn.BatchNorm2d}
UPSAMPLING = ("transposed", "resize")
STRIDE = 4  # of the middle of the network
SMALLEST = 8  # pixels a side; the widest kernel mirrors four
TANH = 150 / 127.5  # the authors' code: 0-255 and some more, so that black and white are not at its flat ends


class JohnsonNet(
    nn.Module,
    HubModel,
    library_name="sketch-perceptual",
    tags=["sketch", "style-transfer", "image-to-image"],
    license="apache-2.0",
):
    """Photos (B, 3, H, W) in [-1, 1] to pictures of the same size, in [-1.18, 1.18].

    9x9 convolution to 32 channels, two of 3x3 and stride 2 to 64 and 128, five residual blocks, two steps up, 9x9 to
    RGB, scaled tanh; reflection padding (Johnson et al. 2016, supplement, table 1).

    Args:
        norm: "instance" (the authors' code) or "batch" (their paper), which sees what else is in a batch.
        upsampling: "transposed" convolutions, or "resize", nearest neighbours and a convolution: no checkerboard.
        width: channels of the first layer.
    """

    noun = "style network"

    def __init__(self, norm: str = "instance", upsampling: str = "transposed", width: int = 32):
        super().__init__()
        check_choice("--norm", norm, NORMS)
        check_choice("--upsampling", upsampling, UPSAMPLING)

        def layer(convolution: nn.Module, channels: int) -> list[nn.Module]:
            return [convolution, NORMS[norm](channels), nn.ReLU(inplace=True)]

        def up(channels: int, width: int) -> list[nn.Module]:
            if upsampling == "resize":
                return [nn.Upsample(scale_factor=2), *layer(_conv(channels, width, 3), width)]
            return layer(nn.ConvTranspose2d(channels, width, 3, 2, padding=1, output_padding=1), width)

        self.layers = nn.Sequential(
            *layer(_conv(3, width, 9), width),
            *layer(_conv(width, 2 * width, 3, 2), 2 * width),
            *layer(_conv(2 * width, 4 * width, 3, 2), 4 * width),
            *(_Residual(4 * width, NORMS[norm]) for _ in range(5)),
            *up(4 * width, 2 * width),
            *up(2 * width, width),
            _conv(width, 3, 9),
        )

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        bottom, right = (max(SMALLEST, -(-side // STRIDE) * STRIDE) - side for side in (height, width))
        x = F.pad(images, (0, right, 0, bottom), mode="replicate")
        return torch.tanh(self.layers(x)[..., :height, :width]) * TANH


class _Residual(nn.Module):
    def __init__(self, channels: int, norm):
        super().__init__()
        self.layers = nn.Sequential(
            _conv(channels, channels, 3),
            norm(channels),
            nn.ReLU(inplace=True),
            _conv(channels, channels, 3),
            norm(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def _conv(channels: int, width: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2, padding_mode="reflect")


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


def load_johnson(source: str | Path) -> JohnsonNet:
    """A network from a folder or Hub id written by `save_pretrained`; InputError."""
    try:
        return JohnsonNet.from_pretrained(str(source))
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(
            f"no style network at {source}: it must be a folder or a Hub id ({first_line(error)})"
        ) from error


if __name__ == "__main__":
    main()
