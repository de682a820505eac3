"""Damaged images, and what is said of each."""

import io
import struct

import numpy as np
from PIL import Image


def noise(kind="PNG", size=(64, 64)):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def tiff(*values, dtype="f4"):
    buffer = io.BytesIO()
    Image.fromarray(np.array([values], dtype)).save(buffer, "TIFF")
    return buffer.getvalue()


def bitmap_header(width, height):
    """A BMP that says how large it is and holds nothing."""
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + head


IMAGES = {
    "empty": (b"", "the file is empty"),
    "not an image": (b"<html></html>", "it is not an image that Pillow knows"),
    "head only": (b"\x89PNG\r\n\x1a\n", "not an image|truncated|Truncated"),
    "truncated PNG": (noise()[:5000], "truncated"),
    "truncated JPEG": (noise("JPEG")[:1500], "truncated"),
    "truncated WebP": (noise("WEBP")[:1500], "decoder"),
    "damaged PNG": (noise()[:100] + b"\xff" * 20 + noise()[120:], r"broken|CRC|decoder error|-3"),
    "bomb that Pillow warns of": (bitmap_header(10000, 10000), "89478485 pixels"),
    "bomb that Pillow refuses": (bitmap_header(20000, 20000), "89478485 pixels"),
    "float with NaN": (tiff(0.5, np.nan), "run from nan to nan"),
    "float below 0": (tiff(-1, 1), r"from -1\.0 to 1\.0, expected 0 to 1 or 0 to 255"),
    "float above 255": (tiff(0, 1000), r"to 1000\.0, expected"),
    "32-bit integers": (tiff(0, 70000, dtype="i4"), "from 0 to 70000, expected 0 to 65535"),
}
