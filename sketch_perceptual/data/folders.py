"""Folders of images, and folders of classes."""

import logging
import os
from pathlib import Path, PurePosixPath

from PIL import Image

from ..errors import InputError
from .image_sets import LabelledImages

logger = logging.getLogger(__name__)

METADATA = ("metadata.csv", "metadata.jsonl")
NOT_DATA = ("__MACOSX", "Thumbs.db", "desktop.ini")  # left by file managers, like all names with a leading dot


def find_images(root: Path, option: str = "--train_data_dir") -> tuple[list[str], list[str]]:
    """All files and the images among them, as sorted paths below `root`; hidden ones are left out. InputError."""
    files = _visible_files(root, option)
    openable = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    images = [file for file in files if PurePosixPath(file).suffix.lower() in openable]
    if not images:
        raise InputError(f"{option}: there are no images in {root}.")
    _warn_about_leftovers(root, files, images)
    return files, images


def _visible_files(root: Path, option: str) -> list[str]:
    """Paths below `root` with forward slashes, sorted; an unreadable folder is an error."""

    def fail(error: OSError):
        raise InputError(f"{option}: cannot read the folder {error.filename}: {error.strerror}.")

    paths, seen = [], set()
    for folder, folders, files in os.walk(root, onerror=fail, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a loop of links would repeat its images some forty times
            raise InputError(f"{option}: {folder} links to a folder that is read already.")
        seen.add(real)
        folders[:] = filter(_is_visible, folders)
        paths += [Path(folder, file).relative_to(root).as_posix() for file in filter(_is_visible, files)]
    return sorted(paths)


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name not in NOT_DATA


def _warn_about_leftovers(root: Path, files: list[str], images: list[str]) -> None:
    used = {image.split("/")[0] for image in images}
    for folder in sorted(path.name for path in root.iterdir() if path.is_dir() and _is_visible(path.name)):
        if folder not in used:
            logger.warning("The folder %s holds no images.", root / folder)
    stems = {PurePosixPath(image).stem for image in images}
    stray = [f for f in files if "/" not in f and not (f in METADATA or PurePosixPath(f).stem in stems)]
    if any("/" in image for image in images) and stray:
        logger.warning("Not used, beside the folders of %s: %s", root, _first(stray))


def _first(names: list[str], separator: str = ", ", count: int = 10) -> str:
    more = f"{separator}and {len(names) - count} more" if len(names) > count else ""
    return separator.join(names[:count]) + more


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text.") from error


SPLITS = {"train", "training", "val", "valid", "validation", "test"}


def labelled_folder(root: str | os.PathLike, **options) -> LabelledImages:
    """The images under `root`, which holds one folder a class, as ImageNet-Sketch's zip does; hidden ones left out.

    Classes are numbered in the order of the folders' names. `options` are the keywords of `LabelledImages`. Raises
    InputError.
    """
    root = Path(root)
    _, images = find_images(root)
    inside = [image for image in images if "/" in image]
    if stray := sorted(set(images) - set(inside)):
        logger.warning("%d images lie beside the class folders of %s and are not used: %s", len(stray), root, stray[0])
    parts = [PurePosixPath(image).parts for image in inside]
    classes = sorted({part[0] for part in parts})
    if classes and {name.lower() for name in classes} <= SPLITS:
        first = min(classes, key=lambda name: not name.lower().startswith("train"))
        raise InputError(
            f"--train_data_dir: {root} holds {', '.join(classes)}, which are splits, not classes: pass {root / first}."
        )
    if len(classes) < 2:
        nested = len({part[:2] for part in parts if len(part) > 2}) > 1
        advice = f" Pass {root / classes[0]}?" if classes and nested else ""
        raise InputError(
            f"--train_data_dir: {root} must hold a folder for each of two classes or more, found"
            f" {', '.join(classes) or 'none'}.{advice}"
        )
    number = {name: index for index, name in enumerate(classes)}
    labels = [number[part[0]] for part in parts]
    paths = [root / image for image in inside]
    return LabelledImages(paths, [str(path) for path in paths], labels, classes, **options)
