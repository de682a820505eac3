"""Scan of all images before training: finds damaged files and copies, and reports what looks wrong.

Not aware of processes: scripts call these functions on the main process and broadcast the results.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..errors import InputError, TooLittleMemory, check_choice, complain, first_names
from .datasets import CaptionedImages, Images
from .near_duplicates import THUMBNAIL, content_key, near_duplicates
from .scan_cache import File, ImageInfo, ScanCache, inspect
from .summary import data_report

logger = logging.getLogger(__name__)

Visit = Callable[[int, Image.Image], None]
PART = 1024  # images that are queued for the threads at a time


@dataclass(frozen=True)
class Scan:
    """Result of `scan`, by position in the scanned data.

    Args:
        infos: facts about each image that can be read, in order.
        bad: the error message for each that cannot.
    """

    infos: dict[int, ImageInfo]
    bad: dict[int, str]

    def noted(self, note: str) -> list[int]:
        """Return the positions of the images with this note."""
        return [index for index, info in self.infos.items() if note in info.notes]


class Contents(NamedTuple):
    """The readable images of a data set, small enough to send to other processes.

    Args:
        positions: in the data set.
        keys: `content_key` of each image at these positions.
        sizes: width and height of each.
        copies: the result of `near_duplicates` for them, or empty.
    """

    positions: list[int]
    keys: list[str]
    sizes: list[tuple[int, int]]
    copies: list[int]


def scan(data: Images, visit: Visit | None = None, *, thumbnails: bool = False, workers: int = 8) -> Scan:
    """Read every image once, in threads, so that a damaged file is found before training and not in step 9000.

    Files in the cache (in `data.scan_folder`) are not read again, unless there is a `visit`, which is called with the
    index and the RGB image of each that can be read. InputError if memory runs out, whatever the image.
    """
    files = [None if data.scan_folder is None else data.file(index) for index in range(len(data))]
    settings = (data.background, data.invert, thumbnails)
    cache = ScanCache(data.scan_folder, [file for file in files if file], settings)
    known = {} if visit else cache.infos
    infos: dict[int, ImageInfo] = {index: known[file] for index, file in enumerate(files) if file in known}
    bad: dict[int, str] = {}
    new: dict[File, ImageInfo] = {}
    left = [index for index in range(len(data)) if index not in infos]
    pool = ThreadPoolExecutor(workers)
    progress = tqdm(desc="Checking images", total=len(left), disable=None if left else True)
    try:
        for part in (left[start : start + PART] for start in range(0, len(left), PART)):
            results = pool.map(lambda index: _read(data, index, visit, thumbnails), part)
            for index, result in zip(part, results, strict=True):
                progress.update()
                if isinstance(result, str):
                    bad[index] = result
                    continue
                infos[index] = result
                if file := files[index]:
                    new[file] = result
    finally:
        progress.close()
        pool.shutdown(cancel_futures=True)  # an interrupted scan does not read the rest
        cache.save(new)
    return Scan(dict(sorted(infos.items())), bad)


def readable(data: Images, bad: Mapping[int, str], on_bad_image: str) -> list[int]:
    """Return the positions of the readable images of `data`; `bad` are the error messages of the others.

    `on_bad_image` is "error" (one InputError lists the first ten others) or "skip" (they are logged). InputError also
    if no image is left.
    """
    check_choice("on_bad_image", on_bad_image, ("error", "skip"))
    good = [index for index in range(len(data)) if index not in bad]
    report = f"{len(bad)} of {len(data)} images cannot be read.\n" + first_names(list(bad.values()), "\n")
    if not good:
        raise InputError(f"No image is left: {report}")
    if bad and on_bad_image == "error":
        complain(f"{report}\nUse `on_bad_image` skip to go on with the other {len(good)}.")
    elif bad:
        logger.warning("Skipped: %s", report)
    return good


def report_scan(data: Images, result: Scan, kind: str = "drawings") -> None:
    if len(data):
        logger.info("the data\n%s", data_report(data, result.infos, list(result.bad), kind))


def read_once(data: Images, on_bad_image: str, visit: Visit | None = None, copies: bool = False) -> Contents:
    """Scan all images, log the report, and return the contents of the readable ones.

    `visit` is called with the index and the RGB image of each. InputError: see `readable` and `scan`.
    """
    result = scan(data, visit, thumbnails=copies)
    report_scan(data, result)
    positions = readable(data, result.bad, on_bad_image)
    infos = [result.infos[index] for index in positions]
    keys, same = [info.key for info in infos], []
    if copies:
        small = np.frombuffer(b"".join(info.thumbnail for info in infos), np.uint8)
        same = near_duplicates(keys, small.reshape(-1, THUMBNAIL, THUMBNAIL)).tolist()
    return Contents(positions, keys, [(info.width, info.height) for info in infos], same)


def check_masks(data: CaptionedImages) -> list[str]:
    """Return the content key of each mask; InputError for unusable masks, or if none masks anything."""
    keys, masked, bad, empty = [], 0, [], []
    for index in range(len(data)):
        try:
            mask = data.mask(index)
        except InputError as error:
            bad.append(str(error))
            keys.append("")
            continue
        levels = mask.getchannel(0).histogram()
        keys.append(content_key(mask))
        masked += any(levels[:-1])
        if not any(levels[1:]):
            empty.append(data.name(index))
    if bad:
        complain(f"`alpha_mask`: {len(bad)} masks cannot be used.\n{first_names(bad, chr(10))}")
    if empty:
        complain(f"`alpha_mask`: empty masks: {first_names(empty)}. Remove these images or fix their masks.")
    if not masked and not bad:
        complain(
            "`alpha_mask`: no image has transparent parts, a mask in a folder `mask` beside it or a NAME-masklabel.png"
        )
    logger.info("`alpha_mask`: %d of %d images are partly masked", masked, len(data))
    return keys


def check_shapes(data: CaptionedImages) -> None:
    """Log how many images have each shape with `fit` "bucket"; InputError for those that fit none."""
    shapes: Counter[str] = Counter()
    bad = []
    for index in range(len(data)):
        try:
            shapes["{} x {}".format(*data.shape(index))] += 1
        except InputError as error:
            bad.append(str(error))
    if bad:
        complain(first_names(bad, "\n"))
    logger.info("images by shape: %s", ", ".join(f"{count} of {shape}" for shape, count in shapes.most_common()))


def _read(data: Images, index: int, visit: Visit | None, thumbnails: bool) -> ImageInfo | str:
    """Return facts about an image, or the error message if it cannot be read."""
    try:
        image = data.image(index)
        if visit is not None:
            visit(index, image)
        return inspect(image, thumbnails)
    except (TooLittleMemory, MemoryError) as error:
        raise TooLittleMemory(f"there is not enough memory to read {data.name(index)}") from error
    except InputError as error:
        return str(error)
