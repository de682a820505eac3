"""Class names and repeats (as in kohya's trainers) from the names of folders."""

import re
from collections.abc import Iterable
from pathlib import Path

from ..errors import first_names, shown
from .class_names import readable_class

LONG_NUMBER = re.compile(r"\d{6}")  # an id or a date
NUMBERED = re.compile(r"(\d{1,4})_(.+)", re.DOTALL)
# Words for parts of a data set and for pictures of any kind; "train2017" and "test_images" consist of them.
NO_CLASS = set(
    """train training test testing val valid validation dev eval holdout reg regularization regularisation image images
    img imgs picture pictures pic pics photo photos drawing drawings sketch sketches sample samples data dataset
    datasets set sets thumbs thumbnails png jpg jpeg webp tif tiff""".split()
)
DRAWN = {"train", "image", "picture", "photo"}  # class names if there are other classes


def folder_repeats(images: Iterable[str]) -> dict[str, int]:
    """Return the repeats in the names of folders that follow kohya's scheme: {"10_boat": 10}.

    Numbers that only count the folders (01_ and 02_, or 0_ to 9_) stand for 1.
    """
    folders = {part for image in images for part in image.split("/")[:-1]}
    numbers = {folder: match[1] for folder in folders if (match := NUMBERED.fullmatch(folder))}
    count = len(numbers) > 2 and sorted(map(int, numbers.values())) == list(range(1, len(numbers) + 1))
    count = count or any(number.startswith("0") for number in numbers.values())
    return {folder: 1 if count else int(numbers[folder]) for folder in sorted(numbers)}


def class_folders(images: Iterable[str], with_letters: bool = False) -> dict[str, str | None]:
    """Return the class of each top-level folder with images: "boat" for 10_boat, None if it is not a class name.

    Not class names: the words of `NO_CLASS`, a single folder whose images lie in several subfolders, and, with
    `with_letters`, numbers and ids like Sketchy's tx_000000000000 (except ImageNet's).
    """
    inside: dict[str, set[str]] = {}
    for folder, _, rest in (image.partition("/") for image in images):
        if rest:
            inside.setdefault(folder, set()).add(rest.rpartition("/")[0])
    names = {folder: match[2] if (match := NUMBERED.fullmatch(folder)) else folder for folder in sorted(inside)}
    classes = {name for name in names.values() if _can_be_class(name, with_letters)}
    if classes:
        classes |= {name for folder, name in names.items() if name.lower() in DRAWN and "" in inside[folder]}
    if len(inside) == 1 and all("" not in folders and len(folders) > 1 for folders in inside.values()):
        classes = set()
    return {folder: name if name in classes else None for folder, name in names.items()}


def describe_no_classes(root: Path, images: Iterable[str], folders: dict[str, str | None]) -> str:
    """Describe which of `class_folders` have no class name, and what to do; "" if all have one."""
    unnamed = [folder for folder, name in folders.items() if name is None]
    if not unnamed:
        return ""
    first = min(unnamed, key=lambda folder: not folder.lower().startswith("train"))
    advice = ""
    if len(unnamed) < len(folders):
        advice = ": rename or move them"
    elif any(image.startswith(f"{first}/") and image.count("/") > 1 for image in images):
        advice = f": pass {shown(root / first)}"
    return f"not class names: {first_names(unnamed)}{advice}"


def _can_be_class(name: str, with_letters: bool) -> bool:
    words = re.findall(r"[^\W\d_]+", name.lower())
    if with_letters and LONG_NUMBER.search(readable_class(name)):
        return False
    return not NO_CLASS.issuperset(words) if words else not with_letters
