"""Images with classes: from folders, or from a column."""

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError, first_names, shown
from .class_folders import class_folders, describe_no_classes, folder_repeats
from .datasets import LabelledImages
from .filenames import check_unicode
from .folders import find_images
from .hf_dataset import check_column, image_column_of, lone_label

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)


def labelled_folder(root: str | os.PathLike, **options) -> LabelledImages:
    """Return the images under `root`, which has one folder per class, like ImageNet-Sketch's zip; no hidden files.

    Classes are named after their folders (kohya's 10_boat is "boat") and numbered in the order of the names.
    `options` are keywords of `LabelledImages`. Raises InputError.
    """
    root = Path(root)
    _, images = find_images(root)
    inside = [image for image in images if "/" in image]
    if stray := sorted(set(images) - set(inside)):
        logger.warning(
            "%d images lie beside the class folders of %s and are not used: %s", len(stray), root, shown(stray[0])
        )
    folders = class_folders(images)
    names = {folder: check_unicode(name, f"a folder of {root}") for folder, name in folders.items() if name}
    classes = sorted(set(names.values()))
    if len(names) < len(folders) or len(classes) < 2:
        summary = first_names(classes) or "none"
        summary = "; ".join(filter(None, [summary, describe_no_classes(root, images, folders)]))
        raise InputError(f"{root} must hold one folder for each of two or more classes, found {summary}.")
    if repeats := [folder for folder, count in folder_repeats(images).items() if count > 1]:
        logger.warning(
            "%s: images with classes are shown once an epoch; repeats are ignored: %s", root, first_names(repeats)
        )
    number = {folder: classes.index(name) for folder, name in names.items()}
    labels = [number[image.partition("/")[0]] for image in inside]
    paths = [root / image for image in inside]
    return LabelledImages(paths, list(map(str, paths)), labels, classes, **options)


def labelled_dataset(
    dataset: "datasets.Dataset",
    *,
    name: str,
    image_column: str = "image",
    label_column: str = "label",
    group_column: str | None = None,
    **options,
) -> LabelledImages:
    """Return the rows of a `datasets.Dataset` with an image and a class; logs how many rows have no class.

    `label_column` is a ClassLabel or holds names or integers. If there is no such column but exactly one ClassLabel,
    that one is used, with a warning. `options` are keywords of `LabelledImages`. Raises InputError.
    """
    sources, names = image_column_of(dataset, name, image_column)
    dataset = dataset.with_format(None)
    if label_column not in dataset.column_names and (only_label := lone_label(dataset, ignored=group_column)):
        logger.warning("%s has no column %r: the class is taken from %r.", name, label_column, only_label)
        label_column = only_label
    check_column(dataset, name, "label_column", label_column)
    if group_column is not None:
        check_column(dataset, name, "group_column", group_column)
    classes, labels = _numbered(dataset, name, label_column)
    groups = None
    if group_column is not None:
        groups = ["" if group is None else str(group) for group in dataset[group_column][:]]
    data = LabelledImages(sources, names, labels, classes, groups, **options)
    if missing := labels.count(-1):
        logger.warning("%d of %d rows of %s have no class and are not used.", missing, len(data), name)
        data = data.select(index for index, label in enumerate(labels) if label != -1)
    return data


def _numbered(dataset: "datasets.Dataset", name: str, column: str) -> tuple[list[str], list[int]]:
    """Return the classes of a column and the class index of each row, -1 if it has none."""
    values, feature = dataset[column][:], dataset.features[column]
    if hasattr(feature, "names"):
        classes, labels = feature.names, [-1 if value is None else value for value in values]
    elif all(value is None or isinstance(value, (str, int)) for value in values):
        distinct = sorted(set(values) - {None, "", -1})  # -1: unlabelled
        index = {value: number for number, value in enumerate(distinct)}
        classes, labels = list(map(str, distinct)), [index.get(value, -1) for value in values]
    else:
        raise InputError(
            f"The column {column!r} of {name} holds {feature}, not classes: choose another `label_column`."
        )
    if len(set(labels) - {-1}) < 2:
        raise InputError(f"{name} must have two or more classes in the column {column!r}.")
    return classes, labels
