"""Every image read once, before training."""

import argparse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from PIL import Image, ImageStat
from tqdm import tqdm

from ..errors import InputError, check_choice
from .folders import _first
from .image_sets import Images, LabelledImages
from .splits import content_key, find_copies, thumbnail

logger = get_logger(__name__, log_level="INFO")


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


def scan(data: Images, visit: Callable[[int, Image.Image], None] | None = None, workers: int = 8) -> Scan:
    """Reads every image once, in threads, so that a damaged file is found before training and not in step 9000.

    `visit` is called with the index and the RGB image of each that can be read.
    """
    with ThreadPoolExecutor(workers) as pool:
        checks = pool.map(lambda index: _check_image(data, index, visit), range(len(data)))
        checks = list(tqdm(checks, "Checking images", len(data), disable=None))
    bad = [(index, message) for index, (message, _, _) in enumerate(checks) if message]
    blank = [index for index, (_, is_blank, _) in enumerate(checks) if is_blank]
    cut = sum(is_cut for _, _, is_cut in checks)
    lines = [f"{len(data)} images"]
    if bad:
        lines.append(f"unreadable: {len(bad)}")
    if blank:
        names = _first([data.name(index) for index in blank])
        lines.append(f"near-constant: {len(blank)}, perhaps their transparency was lost ({names})")
    if cut:
        lines.append(f"losing more than a tenth of their area to cropping: {cut}, --fit pad keeps them whole")
    return Scan(bad, blank, cut, "; ".join(lines))


def drop_bad(data: Images, scan: Scan, on_bad_image: str) -> Images:
    """`data` without the unreadable images of its `scan`.

    `on_bad_image` is "error" (any of them raises one InputError that lists the first ten) or "skip" (they are
    logged). InputError too if no image is left.
    """
    check_choice("--on_bad_image", on_bad_image, ("error", "skip"))
    bad = {index for index, _ in scan.bad}
    good = [index for index in range(len(data)) if index not in bad]
    report = f"{len(bad)} of {len(data)} images cannot be read.\n" + _first([m for _, m in scan.bad], "\n")
    if not good:
        raise InputError(f"No image is left: {report}")
    if bad and on_bad_image == "error":
        raise InputError(f"{report}\n--on_bad_image skip goes on with the other {len(good)}.")
    if bad:
        logger.warning("Skipped: %s", report)
    return data.select(good)


def _check_image(data: Images, index: int, visit: Callable | None) -> tuple[str | None, bool, bool]:
    """(message if unreadable, near-constant?, loses more than a tenth to cropping?)"""
    try:
        image = data.image(index)
    except InputError as error:
        return str(error), False, False
    if visit is not None:
        visit(index, image)
    # A few specks or JPEG noise do not make a drawing: 0.01 % black ink on white already deviates by 2.5.
    is_blank = max(ImageStat.Stat(image).stddev) < 2
    return None, is_blank, data.fit == "crop" and min(image.size) < 0.9 * max(image.size)


def scan_images(accelerator: Accelerator, data: Images, visit: Callable | None = None) -> Scan:
    """`scan` on the main process; its result on all."""
    return broadcast_object_list([scan(data, visit) if accelerator.is_main_process else None])[0]


def read_keys(
    args: argparse.Namespace, accelerator: Accelerator, data: Images, visit: Callable | None = None
) -> tuple[Images, list[str]]:
    """Each image is read: those that can be, and the `content_key` of each.

    The main process calls `visit` with the index and the RGB image of each.
    """
    keys = {}

    def note(index: int, image: Image.Image) -> None:
        keys[index] = content_key(image)
        if visit:
            visit(index, image)

    found = scan_images(accelerator, data, note)
    logger.info(found.summary)
    good = drop_bad(data, found, args.on_bad_image)
    (ordered,) = broadcast_object_list([[keys[index] for index in sorted(keys)]])
    return good, ordered


def read_once(
    args: argparse.Namespace, accelerator: Accelerator, data: LabelledImages
) -> tuple[LabelledImages, list[str], list[int]]:
    """`read_keys`, and what `find_copies` says of the images."""
    thumbnails = {}
    data, keys = read_keys(args, accelerator, data, lambda index, image: thumbnails.update({index: thumbnail(image)}))
    copies = None
    if accelerator.is_main_process:
        copies = find_copies(keys, np.stack([thumbnails[index] for index in sorted(thumbnails)])).tolist()
    (copies,) = broadcast_object_list([copies])
    return data, keys, copies
