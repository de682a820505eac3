"""Rows of `datasets`: loaded, with their columns of images and classes."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from .image_sets import LabelledImages
from .images import Source

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)


def load_rows(
    name: str, config: str | None = None, data_dir: str | None = None, cache_dir: str | None = None
) -> "datasets.Dataset":
    """The "train" rows of a data set of the Hub or of a folder that `datasets` reads or has written. InputError."""
    import datasets

    try:
        if Path(name, "state.json").is_file() or Path(name, "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(name)
        else:
            rows = datasets.load_dataset(name, config, cache_dir=cache_dir, data_dir=data_dir)
    except (OSError, ValueError, RuntimeError) as error:
        advice = ""
        if "scripts are no longer supported" in str(error):
            advice = " Download its files and pass their folder: ImageNet-Sketch's zip unpacks to --train_data_dir."
        raise InputError(f"--dataset_name {name} cannot be loaded: {error}.{advice}") from error
    if isinstance(rows, datasets.Dataset):
        return rows
    if "train" not in rows:
        raise InputError(f'--dataset_name {name} has no split "train", only {", ".join(rows)}')
    if len(rows) > 1:
        logger.info('%s: only its split "train" is read, of %s', name, ", ".join(rows))
    return rows["train"]


def image_column_of(dataset: "datasets.Dataset", name: str, column: str) -> tuple[Sequence[Source], list[str]]:
    """The undecoded images of a column and what messages call them."""
    import datasets

    if column not in dataset.column_names:
        columns = ", ".join(dataset.column_names)
        raise InputError(f"{name} has no column {column!r}, set --image_column to one of: {columns}.")
    try:
        undecoded = dataset.with_format(None).cast_column(column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise InputError(f"The column {column!r} of {name} holds no images, set --image_column.") from error
    return undecoded[column], [f"row {row} of {name}" for row in range(len(dataset))]


def labelled_dataset(
    dataset: "datasets.Dataset",
    *,
    name: str,
    image_column: str = "image",
    label_column: str = "label",
    group_column: str | None = None,
    **options,
) -> LabelledImages:
    """The rows of a `datasets.Dataset` with an image and a class; rows without a class are left out, and counted.

    `label_column` is a ClassLabel or holds names. If there is no such column but exactly one ClassLabel, that one is
    taken, with a warning. `options` are the keywords of `LabelledImages`. Raises InputError.
    """
    import datasets

    columns = ", ".join(dataset.column_names)
    sources, names = image_column_of(dataset, name, image_column)
    dataset = dataset.with_format(None)
    labelled = [c for c, f in dataset.features.items() if isinstance(f, datasets.ClassLabel) and c != group_column]
    if label_column not in dataset.column_names and len(labelled) == 1:
        logger.warning("%s has no column %r: the class is taken from %r.", name, label_column, labelled[0])
        label_column = labelled[0]
    for option, column in (("--label_column", label_column), ("--group_column", group_column)):
        if column is not None and column not in dataset.column_names:
            raise InputError(f"{name} has no column {column!r}, set {option} to one of: {columns}.")
    values, feature = dataset[label_column][:], dataset.features[label_column]
    if isinstance(feature, datasets.ClassLabel):
        classes, labels = feature.names, [-1 if value is None else value for value in values]
    elif all(value is None or isinstance(value, str) for value in values):
        classes = sorted({value for value in values if value})
        index = {value: number for number, value in enumerate(classes)}
        labels = [index.get(value, -1) for value in values]
    else:
        raise InputError(f"The column {label_column!r} of {name} holds {feature}, not classes: set --label_column.")
    if len(set(labels) - {-1}) < 2:
        raise InputError(f"{name} must have two classes or more in the column {label_column!r}.")
    groups = None
    if group_column is not None:
        groups = ["" if group is None else str(group) for group in dataset[group_column][:]]
    data = LabelledImages(sources, names, labels, classes, groups, **options)
    if missing := labels.count(-1):
        logger.warning("%d of %d rows of %s have no class and are not used.", missing, len(data), name)
        data = data.select(index for index, label in enumerate(labels) if label != -1)
    return data
