"""Every image read once, before training: damaged ones are found, and copies, and what looks wrong is reported.

Nothing here knows of processes; a script calls these functions on its main process and shares what they return.
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
from .scan_cache import File, KeptLooks, Look, look_at
from .summary import data_report

logger = logging.getLogger(__name__)

Visit = Callable[[int, Image.Image], None]
PART = 1024  # images that wait for a thread at a time


@dataclass(frozen=True)
class Scan:
    """What `scan` found, by position in the scanned data.

    Args:
        looks: of each image that can be read, in order.
        bad: message of each that cannot.
    """

    looks: dict[int, Look]
    bad: dict[int, str]

    def noted(self, note: str) -> list[int]:
        """Positions of the images of which this is noted."""
        return [index for index, look in self.looks.items() if note in look.notes]


class Contents(NamedTuple):
    """What can be read of a data set, small enough to send to other processes.

    Args:
        positions: in the data set.
        keys: `content_key` of each image at these.
        sizes: width and height of each.
        copies: what `near_duplicates` says of them, if it was asked.
    """

    positions: list[int]
    keys: list[str]
    sizes: list[tuple[int, int]]
    copies: list[int]


def scan(data: Images, visit: Visit | None = None, *, thumbnails: bool = False, workers: int = 8) -> Scan:
    """Looks at every image once, in threads, so that a damaged file is found before training and not in step 9000.

    What is known of a file from the time before (`data.scan_folder`) is not read again, unless `visit` is to be called
    with the index and the RGB image of each that can be read. InputError if memory runs out, which says nothing about
    an image.
    """
    files = [None if data.scan_folder is None else data.file(index) for index in range(len(data))]
    settings = (data.background, data.invert, thumbnails)
    kept = KeptLooks(data.scan_folder, [file for file in files if file], settings)
    known = {} if visit else kept.looks
    looks: dict[int, Look] = {index: known[file] for index, file in enumerate(files) if file in known}
    bad: dict[int, str] = {}
    new: dict[File, Look] = {}
    left = [index for index in range(len(data)) if index not in looks]
    pool = ThreadPoolExecutor(workers)
    progress = tqdm(desc="Checking images", total=len(left), disable=None if left else True)
    try:
        for part in (left[start : start + PART] for start in range(0, len(left), PART)):
            seen = pool.map(lambda index: _look(data, index, visit, thumbnails), part)
            for index, look in zip(part, seen, strict=True):
                progress.update()
                if isinstance(look, str):
                    bad[index] = look
                    continue
                looks[index] = look
                if file := files[index]:
                    new[file] = look
    finally:
        progress.close()
        pool.shutdown(cancel_futures=True)  # an interrupted scan does not read the rest
        kept.save(new)
    return Scan(dict(sorted(looks.items())), bad)


def readable(data: Images, bad: Mapping[int, str], on_bad_image: str) -> list[int]:
    """Positions of the images of `data` but those that its scan could not read, `bad` with their messages.

    `on_bad_image` is "error" (any other image raises one InputError that lists the first ten) or "skip" (they are
    logged). InputError too if no image is left.
    """
    check_choice("on_bad_image", on_bad_image, ("error", "skip"))
    good = [index for index in range(len(data)) if index not in bad]
    report = f"{len(bad)} of {len(data)} images cannot be read.\n" + first_names(list(bad.values()), "\n")
    if not good:
        raise InputError(f"No image is left: {report}")
    if bad and on_bad_image == "error":
        complain(f"{report}\n`on_bad_image` skip goes on with the other {len(good)}.")
    elif bad:
        logger.warning("Skipped: %s", report)
    return good


def report_scan(data: Images, found: Scan, what: str = "drawings") -> None:
    if len(data):
        logger.info("the data\n%s", data_report(data, found.looks, list(found.bad), what))


def read_once(data: Images, on_bad_image: str, visit: Visit | None = None, copies: bool = False) -> Contents:
    """Looks at every image, logs the report, and tells the contents of those that can be read.

    `visit` is called with the index and the RGB image of each. InputError: see `readable` and `scan`.
    """
    found = scan(data, visit, thumbnails=copies)
    report_scan(data, found)
    positions = readable(data, found.bad, on_bad_image)
    looks = [found.looks[index] for index in positions]
    keys, same = [look.key for look in looks], []
    if copies:
        small = np.frombuffer(b"".join(look.thumbnail for look in looks), np.uint8)
        same = near_duplicates(keys, small.reshape(-1, THUMBNAIL, THUMBNAIL)).tolist()
    return Contents(positions, keys, [(look.width, look.height) for look in looks], same)


def check_masks(data: CaptionedImages) -> list[str]:
    """A key to the contents of each mask; InputError for masks that cannot be used, or if all count everything."""
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
        complain(f"`alpha_mask`: nothing counts of {first_names(empty)}: leave them out, or mend their masks")
    if not masked and not bad:
        complain(
            "`alpha_mask`: no image has transparent parts, a mask in a folder `mask` beside it or a NAME-masklabel.png"
        )
    logger.info("`alpha_mask`: %d of %d images have parts that do not count", masked, len(data))
    return keys


def check_shapes(data: CaptionedImages) -> None:
    """Log how many images have each shape, by `fit` "bucket"; InputError for those that have none."""
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


def _look(data: Images, index: int, visit: Visit | None, thumbnails: bool) -> Look | str:
    """A look at an image, or a message if it cannot be read."""
    try:
        image = data.image(index)
        if visit is not None:
            visit(index, image)
        return look_at(image, thumbnails)
    except (TooLittleMemory, MemoryError) as error:
        raise TooLittleMemory(f"there is too little memory to read {data.name(index)}") from error
    except InputError as error:
        return str(error)
