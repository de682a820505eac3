"""Measures of blackness, colour and ink."""

import numpy as np
from PIL import Image


def is_black(image: Image.Image) -> bool:
    """Return whether an image is all black: flagged by a safety checker, or an overflow."""
    return image.convert("RGB").getbbox() is None  # the bounding box of nonzero pixels


def chroma(image: Image.Image) -> float:
    """Return the amount of colour, from 0 for grey to 1: the mean over pixels of max(R, G, B) - min(R, G, B)."""
    return float(np.ptp(np.asarray(image.convert("RGB")), axis=2).mean() / 255)


def ink(image: Image.Image) -> float:
    """Return the share of pixels that are darker than mid-grey."""
    return float((np.asarray(image.convert("L")) < 128).mean())
