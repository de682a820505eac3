"""Captions: from metadata files, side-cars, folders and columns."""

import csv
import io
import json
import logging
import os
import posixpath
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ..errors import InputError, check_choice
from .class_names import readable_class
from .folders import METADATA, _first, _read_text, find_images
from .image_sets import CaptionedImages
from .rows import image_column_of

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

CAPTION_TEMPLATE = "a sketch of a {class}"


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
    2. A .txt file of the same stem: one caption a line.
    3. The first-level folder through `caption_template`, if there is no metadata: the images/ beside a
       metadata.csv is no class.

    `default_caption` is the caption of every image if none has one. If only some lack one, `on_missing_caption`
    decides: "error", "skip" those images, or "default" to give them `default_caption`.
    `transform` are the keywords of `CaptionedImages`. Raises InputError.
    """
    _check_caption_options(caption_template, default_caption, on_missing_caption)
    root = Path(root)
    files, images = find_images(root)
    listed, found = _metadata_captions(root, files, images, caption_column)
    texts = {file for file in files if file.endswith(".txt")}
    origins, captions = Counter(), []
    for image in images:
        text = PurePosixPath(image).with_suffix(".txt").as_posix()
        if listed.get(image):
            origin, caption = "metadata", listed[image]
        elif text in texts:
            origin, caption = ".txt files", _lines(root / text)
        elif not found and "/" in image:
            origin, caption = "class folders", [_class_caption(caption_template, image.split("/")[0])]
        else:
            origin, caption = "nowhere", []
        origins[origin] += 1
        captions.append(caption)
    found += [f"captions from {origin}: {count}" for origin, count in origins.items()]
    logger.info("%s: %s; the first caption is %s", root, "; ".join(found), captions[0])
    names = [str(root / image) for image in images]
    data = CaptionedImages([root / image for image in images], names, captions, **transform)
    return _settle_missing(data, "; ".join(found), default_caption, on_missing_caption)


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
    import datasets

    _check_caption_options(caption_template, default_caption, on_missing_caption)
    columns = ", ".join(dataset.column_names)
    sources, names = image_column_of(dataset, name, image_column)
    dataset = dataset.with_format(None)
    labels = [c for c, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)]
    if caption_column not in dataset.column_names and len(labels) == 1:
        logger.warning("%s has no column %r: its captions name the class in %r.", name, caption_column, labels[0])
        caption_column = labels[0]
    if caption_column in dataset.column_names:
        captions = _column_captions(dataset, caption_column, caption_template, names)
    elif dataset.column_names == [image_column]:
        captions = [[]] * len(dataset)
    else:
        raise InputError(f"{name} has no column {caption_column!r}, set --caption_column to one of: {columns}.")
    data = CaptionedImages(sources, names, captions, **transform)
    return _settle_missing(data, f"columns {columns}", default_caption, on_missing_caption)


def _metadata_captions(
    root: Path, files: list[str], images: list[str], column: str
) -> tuple[dict[str, list[str]], list[str]]:
    """Captions by image path, and a description of each metadata file found."""
    captions, found, known = {}, [], set(images)
    for file in (file for file in files if posixpath.basename(file) in METADATA):
        rows = list(_metadata_rows(root / file))
        columns = ", ".join(sorted({key for _, row in rows for key in row})) or "none"
        found.append(f"{file} has the columns {columns}")
        if not any(column in row for _, row in rows):
            raise InputError(f"{root / file} has no column {column!r}, set --caption_column to one of: {columns}.")
        for line, row in rows:
            where = f"{root / file} line {line}"
            listed = row.get("file_name")
            if not (isinstance(listed, str) and listed):
                raise InputError(f"{where} has no file_name; its columns are {columns}.")
            image = posixpath.normpath(posixpath.join(posixpath.dirname(file), listed))
            if image.startswith(("/", "../")):
                raise InputError(f"{where} leaves the folder: {listed}.")
            if image not in known:
                raise InputError(f"{where} lists {listed}, but there is no such image.")
            captions.setdefault(image, []).extend(_as_captions(row.get(column), where))
    return captions, found


def _metadata_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """(line, columns) of a .csv or .jsonl file."""
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(_read_text(path)), strict=True)
        try:
            for row in reader:
                if None in row:
                    raise InputError(f"{path} line {reader.line_num} has more cells than the header.")
                yield reader.line_num, row
        except csv.Error as error:
            raise InputError(f"{path} line {reader.reader.line_num} is not CSV: {error}.") from error
        return
    for line, text in enumerate(_read_text(path).split("\n"), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{path} line {line} is not JSON: {error.msg}.") from error
        if not isinstance(row, dict):
            raise InputError(f"{path} line {line} is not a JSON object.")
        yield line, row


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in _read_text(path).split("\n") if line.strip()]


def _column_captions(dataset: "datasets.Dataset", column: str, template: str, names: list[str]) -> list[list[str]]:
    values, feature = dataset[column][:], dataset.features[column]
    if hasattr(feature, "names"):
        captions = [_class_caption(template, name) for name in feature.names]
        return [[] if label is None or label < 0 else [captions[label]] for label in values]  # -1: unlabelled
    return [_as_captions(value, name) for value, name in zip(values, names, strict=True)]


def _as_captions(value: Any, where: str) -> list[str]:
    values = value if isinstance(value, list) else [value]
    for caption in values:
        if not (caption is None or isinstance(caption, str)):
            raise InputError(f"{where}: a caption must be a string or a list of strings, got {caption!r}.")
    return [caption for caption in values if caption and caption.strip()]


def _class_caption(template: str, name: str) -> str:
    return template.replace("{class}", readable_class(name))


def _settle_missing(
    data: CaptionedImages, found: str, default_caption: str | None, on_missing_caption: str
) -> CaptionedImages:
    missing = [index for index, captions in enumerate(data.captions) if not captions]
    if not missing:
        return data
    names = _first([data.name(index) for index in missing])
    report = f"{len(missing)} of {len(data)} images have no caption: {names}. Found: {found}."
    if default_caption is not None and (on_missing_caption == "default" or len(missing) == len(data)):
        logger.warning("%s They get %r.", report, default_caption)
        data.captions = [captions or [default_caption] for captions in data.captions]
        return data
    if on_missing_caption == "error" or len(missing) == len(data):
        raise InputError(
            f"{report} Set --caption_column, --caption_template or --default_caption to caption them, or "
            "--on_missing_caption to skip or default."
        )
    logger.warning("%s They are skipped.", report)
    return data.select(index for index, captions in enumerate(data.captions) if captions)


def _check_caption_options(template: str, default_caption: str | None, on_missing_caption: str) -> None:
    check_choice("--on_missing_caption", on_missing_caption, ("error", "skip", "default"))
    if "{class}" not in template:
        raise InputError(f"--caption_template must contain {{class}}, got {template!r}.")
    if on_missing_caption == "default" and default_caption is None:
        raise InputError("--on_missing_caption default needs a --default_caption.")
