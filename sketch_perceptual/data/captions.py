"""Images with captions: from metadata files, text files beside them, folders and columns."""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from ..errors import InputError, check_choice, first_names
from .class_names import readable_class
from .folders import find_images, read_text
from .image_sets import CaptionedImages
from .metadata import as_captions, read_metadata
from .rows import check_column, image_column_of, lone_label

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
    listed, descriptions = read_metadata(root, files, images, caption_column)
    texts = {file for file in files if file.endswith(".txt")}
    origins, captions = Counter(), []
    for image in images:
        text = PurePosixPath(image).with_suffix(".txt").as_posix()
        if listed.get(image):
            origin, caption = "metadata", listed[image]
        elif text in texts:
            origin, caption = ".txt files", _lines(read_text(root / text, root))
        elif not descriptions and "/" in image:
            origin, caption = "class folders", [_class_caption(caption_template, image.split("/")[0])]
        else:
            origin, caption = "nowhere", []
        origins[origin] += 1
        captions.append(caption)
    descriptions += [f"captions from {origin}: {count}" for origin, count in origins.items()]
    sources = "; ".join(descriptions)
    logger.info("%s: %s; the first caption is %s", root, sources, captions[0])
    paths = [root / image for image in images]
    data = CaptionedImages(paths, list(map(str, paths)), captions, **transform)
    return _settle_missing(data, sources, default_caption, on_missing_caption)


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
    data = CaptionedImages(sources, names, captions, **transform)
    return _settle_missing(data, f"columns {columns}", default_caption, on_missing_caption)


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.split("\n") if line.strip()]


def _column_captions(dataset: "datasets.Dataset", column: str, template: str, names: Sequence[str]) -> list[list[str]]:
    values, feature = dataset[column][:], dataset.features[column]
    if hasattr(feature, "names"):
        captions = [_class_caption(template, name) for name in feature.names]
        return [[] if label is None or label < 0 else [captions[label]] for label in values]  # -1: unlabelled
    return [as_captions(value, name) for value, name in zip(values, names, strict=True)]


def _class_caption(template: str, name: str) -> str:
    return template.replace("{class}", readable_class(name))


def _settle_missing(
    data: CaptionedImages, sources: str, default_caption: str | None, on_missing_caption: str
) -> CaptionedImages:
    data.origin = sources
    missing = [index for index, captions in enumerate(data.captions) if not captions]
    if not missing:
        return data
    names = first_names([data.name(index) for index in missing])
    report = f"{len(missing)} of {len(data)} images have no caption: {names}. Found: {sources}."
    if default_caption is not None and (on_missing_caption == "default" or len(missing) == len(data)):
        logger.warning("%s They get %r.", report, default_caption)
        data.captions = [captions or [default_caption] for captions in data.captions]
        return data
    if on_missing_caption == "error" or len(missing) == len(data):
        raise InputError(
            f"{report} `caption_column`, `caption_template` or `default_caption` can give them one;"
            " `on_missing_caption` can be skip or default."
        )
    logger.warning("%s They are skipped.", report)
    return data.select(index for index, captions in enumerate(data.captions) if captions)


def _check_caption_options(template: str, default_caption: str | None, on_missing_caption: str) -> None:
    check_choice("on_missing_caption", on_missing_caption, ("error", "skip", "default"))
    if "{class}" not in template:
        raise InputError(f"`caption_template` must contain {{class}}, got {template!r}.")
    if on_missing_caption == "default" and default_caption is None:
        raise InputError("`on_missing_caption` default needs a `default_caption`.")
