"""Load any image as 8-bit RGB: the only module that knows 0-255, alpha, EXIF orientation, palettes and 16 bits."""

import functools
import io
import logging
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..errors import InputError, TooLittleMemory, check_choice, shown
from .image_stats import is_white_on_black, study

logger = logging.getLogger(__name__)

INTERPOLATIONS = {
    name: Image.Resampling[name.upper()] for name in ("bicubic", "bilinear", "box", "hamming", "lanczos", "nearest")
} | {"nearest_exact": Image.Resampling.NEAREST}
UPRIGHT = {  # EXIF orientation -> transpose that undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
Source = str | os.PathLike | bytes | Image.Image | dict | io.IOBase
INVERT = ("never", "auto", "always")
PNG = b"\x89PNG\r\n\x1a\n"
PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")  # the chunks that pixels need
LARGEST = 2**26  # pixels: larger resized images (gigabytes for a strip of 2 x 9000) are cropped first, not bit-exactly
ONE_PAGE = ("MPO", "PSD")  # formats whose further frames are previews or layers
# Notes on images; in messages the number of images comes first.
PAGES = "with several pages or frames: the first is used"
HALVED = "with more pixels than Pillow's limit: read at half size"
STRIPPED = "with damaged or very long metadata: ignored"
INVERTED = "inverted to black on white"


def load_image(
    source: Source, background: str = "white", name: str | None = None, invert: str = "never"
) -> Image.Image:
    """Load any image as 8-bit RGB: upright, transparency composited on `background`, the first of several frames.

    16-bit values lose their lower byte. 32-bit integers are read as 8 bit up to 255, as 16 bit up to 65535;
    floats as 0 to 1, or as 0 to 255 if any exceeds 1. Grey images and JPEGs of up to twice Pillow's pixel limit are
    halved.

    Args:
        source: a path, the bytes of a file, a file opened in mode rb, a PIL image, or
            `{"bytes": ..., "path": ...}` from `datasets`.
        background: a colour that PIL knows, "white" or "#ff8800".
        name: the image's name in messages; its path if None.
        invert: "always", "never", or "auto" if light strokes lie on dark paper.

    Returns the image; `info["notes"]` lists those of PAGES, HALVED, STRIPPED and INVERTED that apply. Raises
    InputError for an image that is missing, damaged, above Pillow's limit or out of range; TooLittleMemory.
    """
    colour = _colour(background)
    check_choice("invert", invert, INVERT)
    try:
        stored, notes = _decode(source)
        image = _eight_bit(_upright(stored), *_scale(stored))
        image = _flatten(image, colour) if image.has_transparency_data else image.convert("RGB")
        if invert == "always" or (invert == "auto" and is_white_on_black(*study(image))):
            image, notes = ImageOps.invert(image), [*notes, INVERTED]
        image.info = {"notes": notes}  # without the orientation, which has been applied
        return image
    except Exception as error:  # Pillow's decoders raise nearly everything on damaged files
        if isinstance(error, MemoryError) or str(error).startswith("out of memory"):  # Pillow, libtiff
            raise TooLittleMemory(f"there is not enough memory to read {name or _name(source)}") from error
        raise InputError(f"Cannot read the image {name or _name(source)}: {_reason(error)}.") from error


def load_extras(source: Source) -> tuple[Image.Image | None, bytes]:
    """Return what `load_image` drops: transparency (mode L, upright) or None, and EXIF without the orientation.

    Broken EXIF is left out, with a warning.
    """
    image, _ = _decode(source)
    upright = _upright(image)
    try:
        exif = image.getexif()
        exif.pop(0x0112, None)
        data = exif.tobytes() if exif else b""
    except Exception:  # as in _upright
        logger.warning("The EXIF data of %s are broken and are left out.", _name(source))
        data = b""
    return upright.convert("RGBA").getchannel("A") if upright.has_transparency_data else None, data


def to_tensor(image: Image.Image | np.ndarray | Tensor) -> Tensor:
    """Convert a PIL image, uint8 (H, W, 3), or floats in [0, 1] (3, H, W) to float32 (3, H, W) in [-1, 1]."""
    x = np.asarray(load_image(image)) if isinstance(image, Image.Image) else image
    if isinstance(x, np.ndarray) and (x.dtype == np.uint8 or x.dtype.kind == "f"):
        # A copy, because torch takes neither the strides of a flipped view nor the byte order of some TIFFs.
        x = torch.from_numpy(x.astype(np.uint8 if x.dtype == np.uint8 else np.float32))
    if isinstance(x, Tensor) and x.ndim == 3 and x.numel():
        if x.dtype == torch.uint8 and x.shape[2] == 3:
            return x.permute(2, 0, 1).float().div(127.5).sub(1).contiguous()
        if x.is_floating_point() and x.shape[0] == 3 and x.min() >= 0 and x.max() <= 1:
            return x.float() * 2 - 1
    raise InputError(f"Expected a PIL image, uint8 (H, W, 3) or floats in [0, 1] (3, H, W), got {_describe(image)}.")


def to_pil(x: Tensor) -> Image.Image:
    """Convert floats (3, H, W) in [-1, 1] to a PIL image, the inverse of `to_tensor`; values outside are clamped."""
    if not (x.ndim == 3 and x.shape[0] == 3 and x.is_floating_point()) or x.isnan().any():
        raise InputError(f"Expected floats in [-1, 1] (3, H, W), got {_describe(x)}.")
    levels = x.detach().float().clamp(-1, 1).add(1).mul(127.5).round()
    return Image.fromarray(levels.byte().permute(1, 2, 0).cpu().numpy())


def fit_image(
    image: Image.Image,
    resolution: int | tuple[int, int],
    fit: str = "crop",
    background: str = "white",
    interpolation: str = "lanczos",
    position: tuple[float, float] | None = None,
) -> Image.Image:
    """Fit an RGB image to a square of `resolution`, or to a (width, height).

    Args:
        fit: "crop" fills the target and cuts off the excess; "pad" keeps the whole image and adds `background`.
        interpolation: a name in `INTERPOLATIONS`.
        position: of the crop in x and y, from 0 to 1; None is torchvision's centre. With uniform numbers each crop is
            equally likely, as in torchvision's RandomCrop.
    """
    size = (resolution, resolution) if isinstance(resolution, int) else resolution
    if min(size) < 1:
        raise InputError(f"`resolution` must be at least 1 pixel, got {resolution}.")
    check_choice("fit", fit, ("crop", "pad"))
    check_choice("interpolation", interpolation, INTERPOLATIONS)
    colour, resample = _colour(background), INTERPOLATIONS[interpolation]
    if fit == "crop":
        return _cropped(image, size, resample, position)
    whole, part = _tightest(image.size, size)
    width, height = (max(1, round(side * whole / part)) for side in image.size)
    canvas = Image.new("RGB", size, colour)
    corner = ((size[0] - width) // 2, (size[1] - height) // 2)
    canvas.paste(image.resize((width, height), resample), corner)
    return canvas


def fit_key(fit: str) -> str:
    """Return a cache key that changes when the pixels that `fit_image` or a bucket produces change."""
    return fit if fit == "pad" else f"{fit}-2"


def _decode(source: Source) -> tuple[Image.Image, list[str]]:
    """Return the image as stored, and notes on it."""
    if isinstance(source, Image.Image):
        if 0 in source.size:
            raise ValueError("it has no pixels")
        source.load()
        return source, []
    data = _bytes(source)
    if not data:
        raise ValueError("the file is empty")
    try:
        return _open(data)
    except MemoryError:
        raise
    except Exception:
        if not data.startswith(PNG):
            raise
        image, notes = _open(_pixel_chunks(data))
        return image, [*notes, STRIPPED]


def _open(data: bytes) -> tuple[Image.Image, list[str]]:
    image, notes, limit = Image.open(io.BytesIO(data)), [], Image.MAX_IMAGE_PIXELS or float("inf")
    if image.width * image.height > limit:  # Pillow itself only warns below twice the limit
        image.draft(image.mode, (image.width // 2, image.height // 2))  # JPEGs only: decoded at half size
        if image.width * image.height > limit and (image.mode not in ("1", "L") or image.has_transparency_data):
            raise Image.DecompressionBombError
        notes.append(HALVED)
    if image.format not in ONE_PAGE and _has_pages(image):
        notes.append(PAGES)
    image.load()
    if image.width * image.height > limit:
        image = image.convert("L").reduce(2)
    return image, notes


def _has_pages(image: Image.Image) -> bool:
    try:
        return getattr(image, "is_animated", False)
    except Exception:  # the first page may be readable
        return False


def _pixel_chunks(data: bytes) -> bytes:
    """Drop a PNG's ancillary chunks, except valid EXIF, which may hold the orientation."""
    kept, start = [PNG], len(PNG)
    while start + 12 <= len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        kind, is_valid = data[start + 4 : start + 8], data[end - 4 : end] == _crc(data[start + 4 : end - 4])
        if kind in PNG_PIXELS or (kind == b"eXIf" and is_valid):
            kept.append(data[start:end])
        start = end
    return b"".join(kept)


def _crc(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(4, "big")


def unwrap(source: Source) -> Source:
    """Return the bytes, or else the path, in a dict from `datasets`; any other source as it is."""
    if isinstance(source, dict):
        return source["path"] if source["bytes"] is None else source["bytes"]
    return source


def _bytes(source: Source) -> bytes:
    source = unwrap(source)
    if isinstance(source, bytes):
        return source
    if isinstance(source, io.TextIOBase):
        raise ValueError("it is open as text: open it in mode rb")
    if hasattr(source, "read"):
        file: Any = source
        file.seek(0)  # as Pillow does
        return file.read()
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ValueError("it is not a regular file")  # reading a pipe would block forever
        return path.read_bytes()
    raise ValueError(
        f"expected a path, bytes, an open file, a PIL image or a dict of bytes and path, got {type(source).__name__}"
    )


def _upright(image: Image.Image) -> Image.Image:
    # Not ImageOps.exif_transpose: it also rewrites the EXIF block and fails if other entries are broken.
    try:
        orientation = image.getexif().get(0x0112)
    except Exception:  # broken EXIF raises nearly anything; the pixels are fine
        return image
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def _scale(image: Image.Image) -> tuple[int, bool]:
    """Return a TIFF's bits per level in mode I;16, and whether 0 is white in modes I and F."""
    tags = getattr(image, "tag_v2", {})
    bits = max(tags.get(258, (16,)))
    return bits if 8 < bits < 16 else 16, tags.get(262) == 0


def _eight_bit(image: Image.Image, bits: int, white_is_zero: bool) -> Image.Image:
    """Convert modes I;16, I and F to L, or to LA if a 16-bit level is marked transparent; keep other modes."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    low, high = values.min(), values.max()
    limit, expected = (255, "0 to 1 or 0 to 255") if image.mode == "F" else (65535, "0 to 65535")
    if not (low >= 0 and high <= limit):  # written so that NaN fails
        raise ValueError(f"its values run from {low} to {high}, expected {expected}")
    if image.mode == "F":
        levels = np.rint(values * 255 if high <= 1 else values)
    else:
        levels = values if image.mode == "I" and high <= 255 else values >> (bits - 8)
    grey = Image.fromarray((255 - levels if white_is_zero else levels).astype(np.uint8))
    if "transparency" not in image.info:
        return grey
    return Image.merge("LA", (grey, Image.fromarray(values != image.info["transparency"]).convert("L")))


def _flatten(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    canvas = Image.new("RGB", image.size, colour)
    canvas.paste(rgba, mask=rgba.getchannel("A"))
    return canvas


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, IsADirectoryError):
        return "it is a folder"
    if isinstance(error, UnidentifiedImageError):  # its message only shows the address of a buffer
        return "it is not an image that Pillow knows"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return (
            f"it has more than {Image.MAX_IMAGE_PIXELS} pixels, Pillow's limit against decompression bombs: make it"
            " smaller (grey images and JPEGs may have twice as many)"
        )
    return str(error) or type(error).__name__


def _name(source: Source) -> str:
    if isinstance(source, dict):
        source = source["path"] or source["bytes"]
    if isinstance(source, Image.Image):
        source = getattr(source, "filename", None)
    elif hasattr(source, "read"):
        source = getattr(source, "name", None)
    return shown(source) if isinstance(source, str | os.PathLike) and str(source) else "given in memory"


def _describe(x: Any) -> str:
    if not isinstance(x, np.ndarray | Tensor):
        return type(x).__name__
    values = f" from {x.min()} to {x.max()}" if 0 not in x.shape else ""
    return f"{x.dtype} {tuple(x.shape)}{values}"


@functools.cache
def bucket_size(size: tuple[int, int], resolution: int, multiple: int = 8) -> tuple[int, int]:
    """Return the training width and height for an image of this size, so that less than 5 % of it is cropped.

    Between three quarters of `resolution` squared pixels and all of them, in multiples of 64, or of the largest of 32,
    16, 8 and `multiple` that is possible; InputError if none is.
    """
    for step in (64, 32, 16, 8, multiple):
        widths = range(step, resolution**2 // step + 1, step) if step >= multiple else ()
        sizes = [
            (width, height)
            for width in widths
            for height in _heights(width, size, step)
            if 0.75 * resolution**2 <= width * height <= resolution**2 and _cut(size, (width, height)) < 0.05
        ]
        if sizes:
            return max(sizes, key=lambda target: (target[0] * target[1], -_cut(size, target)))
    raise InputError(
        f"`fit` bucket: no size near `resolution` {resolution} in multiples of {multiple} keeps 95 % of an image of"
        f" {size[0]} x {size[1]} pixels; use a larger `resolution`, or `fit` pad."
    )


def _heights(width: int, size: tuple[int, int], step: int) -> set[int]:
    """Return the multiples of `step` next to the height at which nothing is cropped."""
    below = int(width * size[1] / size[0]) // step * step
    return {below, below + step} - {0}


def _cut(size: tuple[int, int], target: tuple[int, int]) -> float:
    """Return the share of an image that is cropped when it fills the target."""
    one, other = target[0] * size[1], target[1] * size[0]
    return 1 - min(one, other) / max(one, other)


def _tightest(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """Return the side of the target that limits the size of an image inside it, and that side of the image."""
    across = target[0] * size[1] <= target[1] * size[0]
    return (target[0], size[0]) if across else (target[1], size[1])


def _cropped(
    image: Image.Image,
    target: tuple[int, int],
    resample: Image.Resampling,
    position: tuple[float, float] | None,
) -> Image.Image:
    """Resize to fill the target and crop, bit-exact with torchvision's Resize of the shorter side and crop."""
    part, whole = _tightest(target, image.size)  # the side of the image that is kept whole
    width, height = (max(wanted, int(whole * side / part)) for side, wanted in zip(image.size, target, strict=True))
    free = width - target[0], height - target[1]
    if position is None:
        x, y = (round(room / 2) for room in free)
    else:
        x, y = (min(room, int((room + 1) * fraction)) for room, fraction in zip(free, position, strict=True))
    box = x, y, x + target[0], y + target[1]
    if width * height <= LARGEST:
        return image.resize((width, height), resample).crop(box)
    across, down = image.width / width, image.height / height
    return image.resize(target, resample, box=(box[0] * across, box[1] * down, box[2] * across, box[3] * down))


def _colour(background: str) -> tuple[int, int, int]:
    try:
        return ImageColor.getrgb(background)[:3]
    except ValueError:
        raise InputError(f"`background`: {background!r} is not a colour; try white or #ff8800.") from None
