"""A sheet of pictures as a model gets them, drawn before the training begins."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..errors import has_complained, shown
from ..figures import SHEET_SIZE, image_grid, write_figure
from ..seeds import generator
from .datasets import CaptionedImages, Images, LabelledImages
from .images import fit_image, to_pil, to_tensor
from .scan import Contents, read_once

logger = logging.getLogger(__name__)

ROWS, EPOCHS = 8, 4
BESIDE = "#808080"  # beside pictures that are not square

See = Callable[[Images, int], list[Tensor]]


def in_epochs(data: Images, index: int) -> list[Tensor]:
    """What the model gets of an image in the first epochs."""
    return [data[epoch, index]["pixel_values"] for epoch in range(EPOCHS)]


def fitted(resolution: int, fit: str, background: str, data: Images, index: int) -> list[Tensor]:
    """What it always gets where nothing is drawn at random."""
    return [to_tensor(fit_image(data.image(index), resolution, fit, background))]


def read_data(
    data: Images, on_bad_image: str, figure: str | None = None, *, copies: bool = False, see: See = in_epochs
) -> Contents:
    """`read_once`; with `figure`, a sheet of what the model will `see` of the images is written there."""
    contents = read_once(data, on_bad_image, copies=copies)
    if figure and not has_complained():
        write_sheet(figure, sheet_rows(data.select(contents.positions), see))
    return contents


def sheet_rows(data: Images, see: See = in_epochs, what: str = "") -> dict[str, list[Image.Image]]:
    """A row of `image_grid` for each of a few images, at random; one column where all epochs are the same."""
    indices = sorted(torch.randperm(len(data), generator=generator("sheet"))[:ROWS].tolist())
    rows = {what + _title(data, index): [pad(to_pil(x), BESIDE) for x in see(data, index)] for index in indices}
    is_random = any(image != images[0] for images in rows.values() for image in images)
    return rows if is_random else {title: images[:1] for title, images in rows.items()}


def write_sheet(path: str | Path, rows: dict[str, list[Image.Image]]) -> None:
    columns = max(map(len, rows.values()))
    heads = [f"epoch {number + 1}" for number in range(columns)] if columns > 1 else None
    write_figure(path, image_grid(rows, heads))
    logger.info("what the model will see: %s", path)


def pad(picture: Image.Image, background: str) -> Image.Image:
    """A whole picture in a square, as a grid shows it."""
    return fit_image(picture, SHEET_SIZE, "pad", background)


def _title(data: Images, index: int) -> str:
    """The caption or class, if there is one, after what tells images of one name apart."""
    title, row = f"{index + 1}: {Path(data.name(index)).name} ", data.rows[index]
    if isinstance(data, CaptionedImages):
        return title + shown(" | ".join(data.captions[row]))
    return title + shown(data.classes[data.labels[index]] if isinstance(data, LabelledImages) else "")
