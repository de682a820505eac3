"""Images with captions: from metadata files, text files beside them, folders and columns."""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from posixpath import basename, splitext
from typing import TYPE_CHECKING

from ..errors import InputError, check_choice, complain, first_names, shown
from .class_folders import class_folders, describe_no_classes, folder_repeats
from .class_names import readable_class
from .datasets import CaptionedImages
from .filenames import by_spelling, check_unicode, match_name
from .folders import METADATA, PICTURES, TEXTS, ending_of, find_images, is_mask, read_text
from .hf_dataset import check_column, image_column_of, lone_label
from .metadata import as_captions, is_caption, read_metadata

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

CAPTION_TEMPLATE = "a sketch of a {class}"
SIDE_CARS = (".txt", ".caption")


def captioned_folder(
    root: str | os.PathLike,
    *,
    caption_column: str = "text",
    caption_template: str = CAPTION_TEMPLATE,
    default_caption: str | None = None,
    on_missing_caption: str = "error",
    **transform,
) -> CaptionedImages:
    """The images under `root`, in the order of their paths. The caption of each comes from, in this order:

    1. `caption_column` of a metadata.csv or metadata.jsonl in any folder, beside the column `file_name` (relative
       to the metadata file). In JSON it may be a list; an image on several lines has several captions.
    2. A .txt or .caption file of the same name or stem: one caption a line, or one list of tags if all lines end with
       commas.
    3. The first-level folder through `caption_template`, if there is no metadata and its name can be a class: the
       images/ beside a metadata.csv is none. The class of kohya's 10_boat is "boat".

    Images without one get `default_caption`. If some lack one, `on_missing_caption` decides: "error" unless there is a
    default, "skip" those images, or "default". Without metadata, `repeats` of images in a folder 10_boat are 10.
    `transform` are the keywords of `CaptionedImages`. Raises InputError.
    """
    _check_caption_options(caption_template, default_caption, on_missing_caption)
    root = Path(root)
    files, images = find_images(root)
    if transform.get("alpha_mask"):
        images = [image for image in images if not is_mask(image)]
    listed, descriptions = read_metadata(root, files, images, caption_column)
    side_cars = _side_cars(files, [image for image in images if not listed.get(image)])
    classes = class_folders(images, with_letters=True)
    repeats = {} if descriptions else folder_repeats(images)
    read = {image: beside[0] for image, beside in side_cars.items()}
    sources = {"metadata": listed, "text files": _read_side_cars(root, read)}
    if not descriptions:
        sources["class folders"] = _class_captions(root, images, classes, caption_template)
    origins = [next((name for name, found in sources.items() if found.get(image)), None) for image in images]
    captions = [sources[origin][image] if origin else [] for origin, image in zip(origins, images, strict=True)]
    counts = Counter(origins)
    descriptions += [f"captions from {origin}: {counts[origin]}" for origin in sources if origin in counts]
    if repeats:
        descriptions.append("repeats: " + first_names([f"{folder} {count}" for folder, count in repeats.items()]))
    used = set(read.values())
    second = {file: beside[0] for beside in side_cars.values() for file in beside[1:] if file not in used}
    _warn_of_second(root, second)
    _warn_of_unread(root, files, used | set(second))
    unnamed = [folder for folder, name in classes.items() if name is None]
    if unnamed and None in origins:
        descriptions.append(describe_no_classes(root, images, classes))
        descriptions.append(f"a caption would be {_class_caption(caption_template, unnamed[0])!r}")
    elif len(unnamed) > 1:
        logger.warning(
            "All of %s in %s are read: pass one of these folders to leave out the others.", first_names(unnamed), root
        )
    names = [str(root / image) for image in images]
    found = "; ".join(descriptions) or "no metadata, text files or class folders"
    captions, kept = _settle_missing(captions, names, found, default_caption, on_missing_caption)
    if None in origins and len(kept) == len(images) and default_caption is not None:
        descriptions.append(f"the default caption: {counts[None]}")
    data = CaptionedImages([root / image for image in images], names, captions, **transform)
    data.repeats = [next((repeats[part] for part in image.split("/")[:-1] if part in repeats), 1) for image in images]
    data.origin = "; ".join(descriptions)
    data.origins = [_origin(origin, caption_template, default_caption) for origin in origins]
    return data.select(kept)


def captioned_dataset(
    dataset: "datasets.Dataset",
    *,
    name: str,
    image_column: str = "image",
    caption_column: str = "text",
    caption_template: str = CAPTION_TEMPLATE,
    default_caption: str | None = None,
    on_missing_caption: str = "error",
    **transform,
) -> CaptionedImages:
    """The rows of a `datasets.Dataset`, images decoded by `load_image` when asked for.

    `caption_column` holds strings, lists of strings, or a ClassLabel, which goes through `caption_template`. If
    there is no such column but exactly one ClassLabel, that one is taken, with a warning. `name` is what messages
    call the data set; the other arguments are those of `captioned_folder`. Raises InputError.
    """
    _check_caption_options(caption_template, default_caption, on_missing_caption)
    columns = ", ".join(dataset.column_names)
    sources, names = image_column_of(dataset, name, image_column)
    dataset = dataset.with_format(None)
    if caption_column not in dataset.column_names and (alone := lone_label(dataset)):
        logger.warning("%s has no column %r: its captions name the class in %r.", name, caption_column, alone)
        caption_column = alone
    if dataset.column_names == [image_column] != [caption_column]:
        captions = [[]] * len(dataset)
    else:
        check_column(dataset, name, "caption_column", caption_column)
        captions = _column_captions(dataset, caption_column, caption_template, names)
    given = captions
    captions, kept = _settle_missing(captions, names, f"columns {columns}", default_caption, on_missing_caption)
    origin = f"the column {caption_column!r}"
    if hasattr(dataset.features.get(caption_column), "names"):
        origin += f" as {caption_template!r}"
    data = CaptionedImages(sources, names, captions, **transform).select(kept)
    data.origin = f"columns {columns}"
    data.origins = [origin if texts else _origin(None, caption_template, default_caption) for texts in given]
    return data


def _origin(source: str | None, template: str, default_caption: str | None) -> str:
    """Where a caption comes from, for the card of what is trained on it."""
    if source is None:
        return f"the default {default_caption!r}"
    return f"{source} as {template!r}" if source == "class folders" else source


def _side_cars(files: Iterable[str], images: Iterable[str]) -> dict[str, list[str]]:
    """The text files beside each image that has any: 1.png.txt, 1.png.caption, 1.txt, 1.caption of 1.png.

    The first of them is read.
    """
    texts = by_spelling(file for file in files if ending_of(file) in SIDE_CARS)
    found = {}
    for image in images:
        places = (base + ending for base in (image, splitext(image)[0]) for ending in SIDE_CARS)
        if beside := list(filter(None, (match_name(place, texts) for place in places))):
            found[image] = beside
    return found


def _read_side_cars(root: Path, side_cars: dict[str, str]) -> dict[str, list[str]]:
    captions, bad = {}, []
    for image, file in side_cars.items():
        try:
            captions[image] = _lines(read_text(root / file, root))
        except InputError as error:
            captions[image] = [""]
            bad.append(f"the caption of {shown(image)}: {error}")
    if bad:
        complain(first_names(bad, "\n"))
    if several := [side_cars[image] for image, lines in captions.items() if len(lines) > 1]:
        logger.warning(
            "%d text files of %s have several lines, which are captions of their own, one at a time; lines of one list"
            " of tags must end with commas: %s",
            len(several),
            root,
            first_names(several),
        )
    return captions


def _lines(text: str) -> list[str]:
    """The captions of a text file."""
    lines = [line.strip() for line in text.split("\n") if is_caption(line)]
    if len(lines) > 1 and all(line.endswith(",") for line in lines[:-1]):
        return [" ".join(lines).rstrip(",")]
    return lines


def _warn_of_second(root: Path, second: dict[str, str]) -> None:
    """Name the text files that say otherwise than the one that is read for the same image."""
    conflicts = [f"{file}, where {read} is" for file, read in second.items() if not _say_the_same(root, file, read)]
    if conflicts:
        logger.warning("Not read in %s, since another caption of the image is: %s", root, first_names(conflicts, "; "))


def _say_the_same(root: Path, *files: str) -> bool:
    try:
        one, other = (_lines(read_text(root / file, root)) for file in files)
    except InputError:
        return False
    return one == other


def _warn_of_unread(root: Path, files: Iterable[str], used: Iterable[str]) -> None:
    """Name the texts that may hold captions, except those of pictures that are named as unread themselves."""
    files, used = list(files), set(used)
    pictures = {splitext(file)[0] for file in files if ending_of(file) in PICTURES}
    unread = [file for file in files if ending_of(file) in TEXTS and file not in used]
    unread = [file for file in unread if basename(file) not in METADATA and splitext(file)[0] not in pictures]
    if unread:
        logger.warning(
            "Not read in %s: %s. Captions are read from %s, with the columns file_name and text, or from a .txt or"
            " .caption file beside each image.",
            root,
            first_names(unread),
            " or ".join(METADATA),
        )


def _class_captions(
    root: Path, images: Iterable[str], classes: dict[str, str | None], template: str
) -> dict[str, list[str]]:
    captions = {}
    for image in images:
        if name := classes.get(image.partition("/")[0]):
            captions[image] = [_class_caption(template, check_unicode(name, f"a folder of {root}"))]
    return captions


def _column_captions(dataset: "datasets.Dataset", column: str, template: str, names: Sequence[str]) -> list[list[str]]:
    values, feature = dataset[column][:], dataset.features[column]
    if hasattr(feature, "names"):
        captions = [_class_caption(template, name) for name in feature.names]
        return [[] if label is None or label < 0 else [captions[label]] for label in values]  # -1: unlabelled
    return [as_captions(value, name) for value, name in zip(values, names, strict=True)]


def _class_caption(template: str, name: str) -> str:
    return template.replace("{class}", readable_class(name))


def _settle_missing(
    captions: list[list[str]], names: Sequence[str], sources: str, default_caption: str | None, on_missing_caption: str
) -> tuple[list[list[str]], list[int]]:
    """Captions with the default where it is due, and the positions of images to keep."""
    missing = [index for index, texts in enumerate(captions) if not texts]
    everything = list(range(len(captions)))
    if not missing:
        return captions, everything
    first = first_names([names[index] for index in missing])
    report = f"{len(missing)} of {len(captions)} images have no caption: {first}. Found: {sources}."
    if default_caption is not None and (on_missing_caption != "skip" or len(missing) == len(captions)):
        logger.warning("%s They get %r.", report, default_caption)
        return [texts or [default_caption] for texts in captions], everything
    if on_missing_caption == "error" or len(missing) == len(captions):
        complain(
            f"{report} `caption_column`, `caption_template` or `default_caption` can give them one;"
            " `on_missing_caption` skip leaves them out."
        )
        return [texts or [""] for texts in captions], everything
    logger.warning("%s They are skipped.", report)
    return captions, [index for index in everything if captions[index]]


def _check_caption_options(template: str, default_caption: str | None, on_missing_caption: str) -> None:
    check_choice("on_missing_caption", on_missing_caption, ("error", "skip", "default"))
    if "{class}" not in template:
        raise InputError(f"`caption_template` must contain {{class}}, got {template!r}.")
    if on_missing_caption == "default" and default_caption is None:
        raise InputError("`on_missing_caption` default needs a `default_caption`.")
