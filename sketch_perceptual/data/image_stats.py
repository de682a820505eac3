"""Image statistics: blank, inverted or tinted paper, stroke width."""

import numpy as np
from PIL import Image

EDGE, SAMPLE = 32, 1024  # the border is 1 / EDGE of the shorter side; about SAMPLE of its pixels are enough
DARK, LIGHT = 96, 160  # black paper is darker than DARK, chalk on it at least LIGHT
FAINT = 64  # a 14-bit scan stored as 16 bits stays below this when converted to 8
WHITE, NEUTRAL = 235, 16  # white paper is at least this bright, and its channels differ by at most NEUTRAL


def study(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Return the share of each level in an RGB image, (3, 256), and a sample of its border pixels, (N, 3)."""
    shares = np.reshape(image.histogram(), (3, 256)) / (image.width * image.height)
    width, height = image.size
    edge = max(1, min(width, height) // EDGE)
    right, bottom = width - edge, height - edge
    sides = (0, 0, width, edge), (0, bottom, width, height), (0, 0, edge, height), (right, 0, width, height)
    border = np.concatenate([np.asarray(image.crop(side)).reshape(-1, 3) for side in sides])
    return shares, border[:: len(border) // SAMPLE + 1]


def is_blank(shares: np.ndarray) -> bool:
    """Return whether an image is near-constant."""
    # A few specks or JPEG noise do not make a drawing: 0.01 % black ink on white already deviates by 2.5.
    levels = np.arange(256)
    return (shares @ levels**2 - (shares @ levels) ** 2).max() < 2**2


def is_faint(shares: np.ndarray) -> bool:
    """Return whether an image is nearly, but not entirely, black all over."""
    return 0 < np.flatnonzero(shares.any(0))[-1] < FAINT


def is_white_on_black(shares: np.ndarray, border: np.ndarray) -> bool:
    """Return whether light strokes lie on dark paper: border and most of the image are dark, a little is light."""
    dark, light = shares[:, :DARK].sum(1).mean(), shares[:, LIGHT:].sum(1).mean()
    return (border < DARK).mean() > 0.8 and dark > 0.6 and 1e-4 < light < 0.4


def is_tinted(border: np.ndarray) -> bool:
    """Return whether the paper (the median of the border) is light, but grey or coloured."""
    paper = np.median(border, 0)
    return paper.mean() >= 112 and (paper.max() < WHITE or np.ptp(paper) > NEUTRAL)


def stroke_width(image: Image.Image) -> float:
    """Estimate the stroke width of an RGB drawing in pixels: very wide for filled areas, 0 for a blank image.

    Twice the ink's area over the length of its outline; counting pixel edges makes that 4 / pi longer on average.
    """
    grey = np.asarray(image.convert("L"))
    low, high = int(grey.min()), int(grey.max())
    ink = grey < (low + high + 1) // 2
    if ink.mean() > 0.5:
        ink = ~ink
    outline = np.count_nonzero(ink[1:] != ink[:-1]) + np.count_nonzero(ink[:, 1:] != ink[:, :-1])
    return float(8 / np.pi * np.count_nonzero(ink) / outline) if outline else 0.0
