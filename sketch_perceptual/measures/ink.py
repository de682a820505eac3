"""Black pictures, colour and ink."""

import numpy as np
from PIL import Image


def is_black(image: Image.Image) -> bool:
    """Whether there is nothing to see: flagged by a safety checker, or an overflow."""
    return image.convert("RGB").getbbox() is None  # the box of what is not 0


def chroma(image: Image.Image) -> float:
    """How much colour is in an image: the mean over pixels of max(R, G, B) - min(R, G, B), 0 for grey to 1."""
    return float(np.ptp(np.asarray(image.convert("RGB")), axis=2).mean() / 255)


def ink(image: Image.Image) -> float:
    """How much of an image is drawn on: the share of its pixels that are darker than mid-grey."""
    return float((np.asarray(image.convert("L")) < 128).mean())
