"""Captioned images: captions from metadata files, sidecar text files, class folders or dataset columns."""

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
    """Return the images under `root`, sorted by path. The caption of each comes from the first of:

    1. `caption_column` of a metadata.csv or metadata.jsonl in any folder, beside the column `file_name` (relative
       to the metadata file). In JSON it may be a list; an image on several lines has several captions.
    2. A .txt or .caption file of the same name or stem: one caption a line, or one list of tags if all lines end with
       commas.
    3. The first-level folder through `caption_template`, if there is no metadata and the name is a class name, which
       "images" is not. The class of kohya's 10_boat is "boat".

    Images without any get `default_caption`. If some lack one, `on_missing_caption` decides: "error" unless there is a
    default, "skip" those images, or "default". Without metadata, `repeats` of images in a folder 10_boat is 10.
    `transform` are keywords of `CaptionedImages`. Raises InputError.
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
    origins = [next((name for name, captions in sources.items() if captions.get(image)), None) for image in images]
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
    summary = "; ".join(descriptions) or "no metadata, text files or class folders"
    captions, kept = _settle_missing(captions, names, summary, default_caption, on_missing_caption)
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
    """Return the rows of a `datasets.Dataset`, with images decoded by `load_image` on access.

    `caption_column` holds strings, lists of strings, or a ClassLabel, which goes through `caption_template`. If
    there is no such column but exactly one ClassLabel, that one is used, with a warning. `name` is the name of the
    data set in messages; the other arguments are those of `captioned_folder`. Raises InputError.
    """
    _check_caption_options(caption_template, default_caption, on_missing_caption)
    columns = ", ".join(dataset.column_names)
    sources, names = image_column_of(dataset, name, image_column)
    dataset = dataset.with_format(None)
    if caption_column not in dataset.column_names and (class_column := lone_label(dataset)):
        logger.warning("%s has no column %r: captions name the class in %r.", name, caption_column, class_column)
        caption_column = class_column
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
    """Describe where a caption comes from, for the model card."""
    if source is None:
        return f"the default {default_caption!r}"
    return f"{source} as {template!r}" if source == "class folders" else source


def _side_cars(files: Iterable[str], images: Iterable[str]) -> dict[str, list[str]]:
    """Return the sidecar files of each image that has any: 1.png.txt, 1.png.caption, 1.txt, 1.caption of 1.png.

    Only the first of them is read.
    """
    texts = by_spelling(file for file in files if ending_of(file) in SIDE_CARS)
    side_cars = {}
    for image in images:
        candidates = (base + ending for base in (image, splitext(image)[0]) for ending in SIDE_CARS)
        if beside := list(filter(None, (match_name(candidate, texts) for candidate in candidates))):
            side_cars[image] = beside
    return side_cars


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
            "%d text files of %s have several lines, and each line is a separate caption; if they are one list of"
            " tags, end the lines with commas: %s",
            len(several),
            root,
            first_names(several),
        )
    return captions


def _lines(text: str) -> list[str]:
    """Return the captions in the text of a sidecar file."""
    lines = [line.strip() for line in text.split("\n") if is_caption(line)]
    if len(lines) > 1 and all(line.endswith(",") for line in lines[:-1]):
        return [" ".join(lines).rstrip(",")]
    return lines


def _warn_of_second(root: Path, second: dict[str, str]) -> None:
    """Log the text files that contradict the one that is read for the same image."""
    conflicts = [f"{file} (read: {read})" for file, read in second.items() if not _are_equal(root, file, read)]
    if conflicts:
        logger.warning("Not read in %s: %s. The image has another caption file.", root, first_names(conflicts, "; "))


def _are_equal(root: Path, *files: str) -> bool:
    try:
        one, other = (_lines(read_text(root / file, root)) for file in files)
    except InputError:
        return False
    return one == other


def _warn_of_unread(root: Path, files: Iterable[str], used: Iterable[str]) -> None:
    """Log unread files that may contain captions, except those of pictures that are reported as unread themselves."""
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
    """Fill in the default caption; return the captions, and the positions of the images to keep."""
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
