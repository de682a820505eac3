"""What paper and strokes of a drawing look like, told from its pixels."""

import numpy as np
from PIL import Image

EDGE, SAMPLE = 32, 1024  # the border is this part of the shorter side; so many of its pixels are enough
DARK, LIGHT = 96, 160  # levels of black paper at most, of chalk on it at least
FAINT = 64  # no level of a 14-bit scan is above it when its 16 bits become 8
WHITE, NEUTRAL = 235, 16  # white paper is at least as bright, and its channels differ by no more


def study(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """How much of an RGB image has each level, (3, 256), and pixels of its border, (N, 3)."""
    shares = np.reshape(image.histogram(), (3, 256)) / (image.width * image.height)
    width, height = image.size
    edge = max(1, min(width, height) // EDGE)
    right, bottom = width - edge, height - edge
    sides = (0, 0, width, edge), (0, bottom, width, height), (0, 0, edge, height), (right, 0, width, height)
    border = np.concatenate([np.asarray(image.crop(side)).reshape(-1, 3) for side in sides])
    return shares, border[:: len(border) // SAMPLE + 1]


def is_blank(shares: np.ndarray) -> bool:
    """Whether an image is near-constant."""
    # A few specks or JPEG noise do not make a drawing: 0.01 % black ink on white already deviates by 2.5.
    levels = np.arange(256)
    return (shares @ levels**2 - (shares @ levels) ** 2).max() < 2**2


def is_faint(shares: np.ndarray) -> bool:
    """Whether an image is nearly black all over, but not quite."""
    return 0 < np.flatnonzero(shares.any(0))[-1] < FAINT


def is_white_on_black(shares: np.ndarray, border: np.ndarray) -> bool:
    """Whether light strokes lie on dark paper: the border and most of the image are dark, a little of it is light."""
    dark, light = shares[:, :DARK].sum(1).mean(), shares[:, LIGHT:].sum(1).mean()
    return (border < DARK).mean() > 0.8 and dark > 0.6 and 1e-4 < light < 0.4


def is_tinted(border: np.ndarray) -> bool:
    """Whether the paper is light, but grey or coloured: the median of the border."""
    paper = np.median(border, 0)
    return paper.mean() >= 112 and (paper.max() < WHITE or np.ptp(paper) > NEUTRAL)


def stroke_width(image: Image.Image) -> float:
    """How wide the strokes of an RGB drawing are, in pixels, about; areas count as very wide ones; 0 if it is blank.

    Twice the area of the ink over the length of its outline, of which pixels of all directions show 4 / pi.
    """
    grey = np.asarray(image.convert("L"))
    low, high = int(grey.min()), int(grey.max())
    ink = grey < (low + high + 1) // 2
    if ink.mean() > 0.5:
        ink = ~ink
    outline = np.count_nonzero(ink[1:] != ink[:-1]) + np.count_nonzero(ink[:, 1:] != ink[:, :-1])
    return float(8 / np.pi * np.count_nonzero(ink) / outline) if outline else 0.0
