"""A preview sheet of the model's inputs, written before training."""

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
BESIDE = "#808080"  # padding of pictures that are not square

See = Callable[[Images, int], list[Tensor]]


def in_epochs(data: Images, index: int) -> list[Tensor]:
    """Return the model's inputs for an image in the first epochs."""
    return [data[epoch, index]["pixel_values"] for epoch in range(EPOCHS)]


def fitted(resolution: int, fit: str, background: str, data: Images, index: int) -> list[Tensor]:
    """Return the model's input for an image if it is the same in all epochs."""
    return [to_tensor(fit_image(data.image(index), resolution, fit, background))]


def read_data(
    data: Images, on_bad_image: str, figure: str | None = None, *, copies: bool = False, see: See = in_epochs
) -> Contents:
    """Call `read_once`; with `figure`, write a sheet of the model's inputs, which `see` returns, to that file."""
    contents = read_once(data, on_bad_image, copies=copies)
    if figure and not has_complained():
        write_sheet(figure, sheet_rows(data.select(contents.positions), see))
    return contents


def sheet_rows(data: Images, see: See = in_epochs, what: str = "") -> dict[str, list[Image.Image]]:
    """Return rows of `image_grid` for a few random images; with one column if all epochs are the same."""
    indices = sorted(torch.randperm(len(data), generator=generator("sheet"))[:ROWS].tolist())
    rows = {what + _title(data, index): [pad(to_pil(x), BESIDE) for x in see(data, index)] for index in indices}
    is_random = any(image != images[0] for images in rows.values() for image in images)
    return rows if is_random else {title: images[:1] for title, images in rows.items()}


def write_sheet(path: str | Path, rows: dict[str, list[Image.Image]]) -> None:
    columns = max(map(len, rows.values()))
    heads = [f"epoch {number + 1}" for number in range(columns)] if columns > 1 else None
    write_figure(path, image_grid(rows, heads))
    logger.info("preview of the model's inputs: %s", path)


def pad(picture: Image.Image, background: str) -> Image.Image:
    """Pad a picture to a square of `SHEET_SIZE`."""
    return fit_image(picture, SHEET_SIZE, "pad", background)


def _title(data: Images, index: int) -> str:
    """Return the number and name of an image, and its caption or class if it has one."""
    title, row = f"{index + 1}: {Path(data.name(index)).name} ", data.rows[index]
    if isinstance(data, CaptionedImages):
        return title + shown(" | ".join(data.captions[row]))
    return title + shown(data.classes[data.labels[index]] if isinstance(data, LabelledImages) else "")
