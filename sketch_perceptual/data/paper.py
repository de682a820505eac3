"""What the paper of a drawing looks like, told from its pixels."""

import numpy as np
from PIL import Image

EDGE = 32  # the border is this part of the shorter side
DARK, LIGHT = 96, 160  # grey levels of black paper at most, of chalk on it at least
FAINT = 64  # no level of a 14-bit scan is above it when its 16 bits become 8
WHITE, NEUTRAL = 235, 16  # white paper is at least as bright, and its channels differ by no more


def is_white_on_black(image: Image.Image) -> bool:
    """Whether an RGB image has light strokes on dark paper: its border and most of it are dark, a little is light."""
    grey = image.convert("L")
    levels, border = _shares(grey), _shares(*_border(grey))
    return border[:DARK].sum() > 0.8 and levels[:DARK].sum() > 0.6 and 1e-4 < levels[LIGHT:].sum() < 0.4


def is_tinted(image: Image.Image) -> bool:
    """Whether the paper of an RGB image is light, but grey or coloured: the median of its border."""
    counts = np.sum([np.reshape(part.histogram(), (3, 256)) for part in _border(image)], 0)
    paper = (counts.cumsum(1) * 2 >= counts.sum(1, keepdims=True)).argmax(1)
    return paper.mean() >= 112 and (paper.max() < WHITE or paper.max() - paper.min() > NEUTRAL)


def is_faint(image: Image.Image) -> bool:
    """Whether an RGB image is nearly black all over, but not quite."""
    return 0 < np.max(image.getextrema()) < FAINT


def is_blank(image: Image.Image) -> bool:
    """Whether an RGB image is near-constant."""
    counts, levels = np.reshape(image.histogram(), (3, 256)) / (image.width * image.height), np.arange(256)
    # A few specks or JPEG noise do not make a drawing: 0.01 % black ink on white already deviates by 2.5.
    return (counts @ levels**2 - (counts @ levels) ** 2).max() < 2**2


def _border(image: Image.Image) -> list[Image.Image]:
    width, height = image.size
    edge = max(1, min(width, height) // EDGE)
    boxes = (
        (0, 0, width, edge),
        (0, height - edge, width, height),
        (0, 0, edge, height),
        (width - edge, 0, width, height),
    )
    return [image.crop(box) for box in boxes]


def _shares(*parts: Image.Image) -> np.ndarray:
    """How much of grey images has each level, (256,)."""
    counts = np.sum([part.histogram() for part in parts], 0)
    return counts / counts.sum()
