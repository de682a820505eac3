"""Every image read once, before training: damaged ones are found, and copies.

Nothing here knows of processes; a script calls these functions on its main process and shares what they return.
"""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageStat
from tqdm import tqdm

from ..errors import InputError, check_choice, first_names
from .image_sets import Images
from .near_duplicates import content_key, near_duplicates, thumbnail

logger = logging.getLogger(__name__)

Visit = Callable[[int, Image.Image], None]


@dataclass(frozen=True)
class Scan:
    """What `scan` found: positions in the scanned data, small enough to send to other processes.

    Args:
        bad: position and message of each image that cannot be read.
        blank: positions of near-constant images.
        cut: how many images lose more than a tenth of their area to cropping.
        summary: the same in two or three short phrases, with the first names.
    """

    bad: list[tuple[int, str]]
    blank: list[int]
    cut: int
    summary: str


def scan(data: Images, visit: Visit | None = None, workers: int = 8) -> Scan:
    """Reads every image once, in threads, so that a damaged file is found before training and not in step 9000.

    `visit` is called with the index and the RGB image of each that can be read. InputError if memory runs out, which
    says nothing about an image.
    """
    pool = ThreadPoolExecutor(workers)
    try:
        checks = pool.map(lambda index: _check_image(data, index, visit), range(len(data)))
        checks = list(tqdm(checks, "Checking images", len(data), disable=None))
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupted scan does not read the rest
    bad = [(index, message) for index, (message, _, _) in enumerate(checks) if message]
    blank = [index for index, (_, is_blank, _) in enumerate(checks) if is_blank]
    cut = sum(is_cut for _, _, is_cut in checks)
    lines = [f"{len(data)} images"]
    if bad:
        lines.append(f"unreadable: {len(bad)}")
    if blank:
        names = first_names([data.name(index) for index in blank])
        lines.append(f"near-constant: {len(blank)}, perhaps their transparency was lost ({names})")
    if cut:
        lines.append(f"losing more than a tenth of their area to cropping: {cut}, `fit` pad keeps them whole")
    return Scan(bad, blank, cut, "; ".join(lines))


def readable(data: Images, scan: Scan, on_bad_image: str) -> list[int]:
    """Positions of the images of `data` that its `scan` could read.

    `on_bad_image` is "error" (any other image raises one InputError that lists the first ten) or "skip" (they are
    logged). InputError too if no image is left.
    """
    check_choice("on_bad_image", on_bad_image, ("error", "skip"))
    bad = {index for index, _ in scan.bad}
    good = [index for index in range(len(data)) if index not in bad]
    report = f"{len(bad)} of {len(data)} images cannot be read.\n" + first_names([m for _, m in scan.bad], "\n")
    if not good:
        raise InputError(f"No image is left: {report}")
    if bad and on_bad_image == "error":
        raise InputError(f"{report}\n`on_bad_image` skip goes on with the other {len(good)}.")
    if bad:
        logger.warning("Skipped: %s", report)
    return good


def drop_bad(data: Images, scan: Scan, on_bad_image: str) -> Images:
    """`data` without the images that its `scan` could not read; see `readable`."""
    return data.select(readable(data, scan, on_bad_image))


def read_keys(data: Images, on_bad_image: str, visit: Visit | None = None) -> tuple[list[int], list[str]]:
    """Reads every image: positions of those that can be read, and the `content_key` of each.

    `visit` is called with the index and the RGB image of each. InputError: see `readable` and `scan`.
    """
    keys = {}

    def note(index: int, image: Image.Image) -> None:
        keys[index] = content_key(image)
        if visit:
            visit(index, image)

    result = scan(data, note)
    logger.info(result.summary)
    positions = readable(data, result, on_bad_image)
    return positions, [keys[index] for index in positions]


def read_once(data: Images, on_bad_image: str, visit: Visit | None = None) -> tuple[list[int], list[str], list[int]]:
    """`read_keys`, and what `near_duplicates` says of the images."""
    thumbnails = {}

    def note(index: int, image: Image.Image) -> None:
        thumbnails[index] = thumbnail(image)
        if visit:
            visit(index, image)

    positions, keys = read_keys(data, on_bad_image, note)
    return positions, keys, near_duplicates(keys, np.stack([thumbnails[index] for index in positions])).tolist()


def _check_image(data: Images, index: int, visit: Visit | None) -> tuple[str | None, bool, bool]:
    """(message if unreadable, near-constant?, loses more than a tenth to cropping?)"""
    try:
        image = data.image(index)
        if visit is not None:
            visit(index, image)
        # A few specks or JPEG noise do not make a drawing: 0.01 % black ink on white already deviates by 2.5.
        is_blank = max(ImageStat.Stat(image).stddev) < 2
    except (InputError, MemoryError) as error:
        if isinstance(error, MemoryError) or isinstance(error.__cause__, MemoryError):
            raise InputError(f"there is too little memory to read {data.name(index)}") from error
        return str(error), False, False
    return None, is_blank, data.fit == "crop" and min(image.size) < 0.9 * max(image.size)
