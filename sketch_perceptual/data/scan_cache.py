"""What is remembered of an image once it has been read, in memory and on disk."""

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

# What is noted of an image, after a number of them; `load_image` notes more.
BLANK = "near-constant: perhaps their transparency was lost"
FAINT = "nearly black all over: perhaps 10 to 14 bits stored in 16, whose levels must be stretched"
NEGATIVE = "white on black: `invert` auto makes them black on white"
TINTED = "on grey or coloured paper"


CONTENTS = "/contents"  # no folder: where `file_of` says that bytes are


class Look(NamedTuple):
    """Of one image.

    Args:
        stroke: its `stroke_width`.
        key: its `content_key`.
        notes: what there is to say of it.
        thumbnail: bytes of its `thumbnail`, or none.
    """

    width: int
    height: int
    stroke: float
    key: str
    notes: tuple[str, ...]
    thumbnail: bytes


class File(NamedTuple):
    """A file as it is on disk, told without reading it. Of an edit that keeps its size, the times tell."""

    path: str
    size: int
    modified: int
    changed: int


def look_at(image: Image.Image, with_thumbnail: bool = False) -> Look:
    """An RGB image of `load_image`."""
    shares, border = image_stats.study(image)
    traits = {
        BLANK: image_stats.is_blank(shares),
        FAINT: image_stats.is_faint(shares),
        NEGATIVE: image_stats.is_white_on_black(shares, border),
        TINTED: image_stats.is_tinted(border),
    }
    notes = (*image.info.get("notes", ()), *(note for note, is_true in traits.items() if is_true))
    small = thumbnail(image).tobytes() if with_thumbnail else b""
    return Look(image.width, image.height, image_stats.stroke_width(image), content_key(image), notes, small)


def stat_file(path: str | os.PathLike) -> File | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # whoever reads it says what is wrong
        return None
    return File(os.path.abspath(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def file_of(content: bytes) -> File:
    """What stands for an image that is in no file of its own, as in a row of a data set."""
    return File(f"{CONTENTS}/{hashlib.sha256(content).hexdigest()[:32]}", len(content), 0, 0)


class KeptLooks:
    """What was seen of files, in one file that is replaced as a whole; what was damaged or edited is not here.

    Args:
        folder: made if need be; None keeps nothing.
        files: what is asked for; their common folder and `settings` name the file.
        settings: what a look depends on beside the file and this code.
    """

    def __init__(self, folder: Path | None, files: Sequence[File], settings: Sequence):
        self.path: Path | None = None
        self.looks: dict[File, Look] = {}
        if folder is None or not files:
            return
        place = os.path.commonpath([file.path for file in files])
        name = json.dumps([files[0].path if place == CONTENTS else place, *settings])
        self.path = folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.npz"
        if os.path.exists(self.path):
            try:
                self.looks = self._read(self.path)
            except Exception as error:  # a damaged archive raises nearly anything
                logger.warning("%s is damaged, all images are read again: %s", self.path, first_line(error))

    def save(self, new: dict[File, Look]) -> None:
        """Keep these too, in the place of what was known of the same paths."""
        if self.path is None or not new:
            return
        paths = {file.path for file in new}
        looks = {file: look for file, look in self.looks.items() if file.path not in paths} | new
        rows = json.dumps([_version(), *([*file, *look[:-1]] for file, look in looks.items())])
        archive, partial = io.BytesIO(), self.path.with_name(f"{secrets.token_hex(8)}.partial")
        np.savez(archive, rows=_bytes(rows.encode()), thumbnails=_bytes(b"".join(look[-1] for look in looks.values())))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                partial.write_bytes(archive.getbuffer())
                os.replace(partial, self.path)
            finally:
                partial.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("%s: what was seen of the images cannot be kept: %s", self.path, error.strerror)

    @staticmethod
    def _read(path: Path) -> dict[File, Look]:
        with np.load(path, allow_pickle=False) as archive:  # which verifies checksums
            version, *rows = json.loads(archive["rows"].tobytes())
            if version != _version():
                return {}
            small = archive["thumbnails"].tobytes()
        size, looks = len(small) // max(1, len(rows)), {}
        for start, (*file, width, height, stroke, key, notes) in enumerate(rows):
            own = small[start * size : (start + 1) * size]
            looks[File(*file)] = Look(width, height, stroke, key, tuple(notes), own)
        return looks


def _bytes(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def _version() -> str:
    """Changes with the code that makes a look."""
    digest = hashlib.sha256(PIL.__version__.encode())
    for module in (images.__file__, image_stats.__file__, near_duplicates.__file__, __file__):
        digest.update(Path(module).read_bytes())
    return digest.hexdigest()[:16]
