"""Cache of the facts that a scan collects about each image."""

import hashlib
import io
import json
import logging
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from PIL import Image

from ..errors import first_line
from . import image_stats, images, near_duplicates
from .near_duplicates import content_key, thumbnail

logger = logging.getLogger(__name__)

# Notes on images, besides those of `load_image`; in messages the number of images comes first.
BLANK = "near-constant: perhaps their transparency was lost"
FAINT = "nearly black all over: perhaps 10 to 14 bits stored in 16, whose levels must be stretched"
NEGATIVE = "white on black: `invert` auto makes them black on white"
TINTED = "on grey or coloured paper"


CONTENTS = "/contents"  # not a real folder: the one that `file_of` returns for bytes


class ImageInfo(NamedTuple):
    """Facts about one image.

    Args:
        stroke: its `stroke_width`.
        key: its `content_key`.
        notes: those of the constants above and in `images` that apply.
        thumbnail: bytes of its `thumbnail`, or empty.
    """

    width: int
    height: int
    stroke: float
    key: str
    notes: tuple[str, ...]
    thumbnail: bytes


class File(NamedTuple):
    """A file's identity from `stat`, without reading it; the times reveal an edit that keeps the size."""

    path: str
    size: int
    modified: int
    changed: int


def inspect(image: Image.Image, with_thumbnail: bool = False) -> ImageInfo:
    """Collect the facts about an RGB image from `load_image`."""
    shares, border = image_stats.study(image)
    traits = {
        BLANK: image_stats.is_blank(shares),
        FAINT: image_stats.is_faint(shares),
        NEGATIVE: image_stats.is_white_on_black(shares, border),
        TINTED: image_stats.is_tinted(border),
    }
    notes = (*image.info.get("notes", ()), *(note for note, is_true in traits.items() if is_true))
    small = thumbnail(image).tobytes() if with_thumbnail else b""
    return ImageInfo(image.width, image.height, image_stats.stroke_width(image), content_key(image), notes, small)


def stat_file(path: str | os.PathLike) -> File | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # reading the file will raise an error that says what is wrong
        return None
    return File(os.path.abspath(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def file_of(content: bytes) -> File:
    """Return the identity of an image that is not a file, but bytes in a row of a data set."""
    return File(f"{CONTENTS}/{hashlib.sha256(content).hexdigest()[:32]}", len(content), 0, 0)


class ScanCache:
    """Facts about image files, in one file that is replaced as a whole; damaged and edited images are not in it.

    Args:
        folder: created if missing; None keeps nothing.
        files: the images to be scanned; their common folder and `settings` determine the name of the cache.
        settings: anything else the facts depend on besides the file and this code.
    """

    def __init__(self, folder: Path | None, files: Sequence[File], settings: Sequence):
        self.path: Path | None = None
        self.infos: dict[File, ImageInfo] = {}
        if folder is None or not files:
            return
        common = os.path.commonpath([file.path for file in files])
        name = json.dumps([files[0].path if common == CONTENTS else common, *settings])
        self.path = folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.npz"
        if os.path.exists(self.path):
            try:
                self.infos = self._read(self.path)
            except Exception as error:  # a damaged archive raises nearly anything
                logger.warning("%s is damaged, all images are read again: %s", self.path, first_line(error))

    def save(self, new: dict[File, ImageInfo]) -> None:
        """Add these to the cache, replacing earlier entries of the same paths."""
        if self.path is None or not new:
            return
        paths = {file.path for file in new}
        infos = {file: info for file, info in self.infos.items() if file.path not in paths} | new
        rows = json.dumps([_version(), *([*file, *info[:-1]] for file, info in infos.items())])
        archive, partial = io.BytesIO(), self.path.with_name(f"{secrets.token_hex(8)}.partial")
        np.savez(archive, rows=_bytes(rows.encode()), thumbnails=_bytes(b"".join(info[-1] for info in infos.values())))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                partial.write_bytes(archive.getbuffer())
                os.replace(partial, self.path)
            finally:
                partial.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("%s: the results of the scan cannot be cached: %s", self.path, error.strerror)

    @staticmethod
    def _read(path: Path) -> dict[File, ImageInfo]:
        with np.load(path, allow_pickle=False) as archive:  # verifies checksums
            version, *rows = json.loads(archive["rows"].tobytes())
            if version != _version():
                return {}
            small = archive["thumbnails"].tobytes()
        size, infos = len(small) // max(1, len(rows)), {}
        for row, (*file, width, height, stroke, key, notes) in enumerate(rows):
            pixels = small[row * size : (row + 1) * size]
            infos[File(*file)] = ImageInfo(width, height, stroke, key, tuple(notes), pixels)
        return infos


def _bytes(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def _version() -> str:
    """Return a hash of the code that the facts depend on."""
    digest = hashlib.sha256(PIL.__version__.encode())
    for module in (images.__file__, image_stats.__file__, near_duplicates.__file__, __file__):
        digest.update(Path(module).read_bytes())
    return digest.hexdigest()[:16]
