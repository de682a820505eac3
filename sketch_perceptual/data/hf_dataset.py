"""Load Hugging Face datasets, and find their images and classes."""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub.constants import HF_HUB_CACHE

from ..errors import HUB_ERRORS, InputError, first_names, hub_reason, shown
from ..extras import optional
from .folders import walk
from .images import Source

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)


def load_rows(
    dataset_name: str, config: str | None = None, data_dir: str | None = None, cache_dir: str | None = None
) -> "datasets.Dataset":
    """Load the "train" rows of a data set on the Hub, or of a folder that `datasets` can read or has written.

    Safe to call from all processes at once: `datasets` locks its cache. Images are stored in the rows, or are files in
    the folder or the caches of `datasets`; InputError for a row that names any other file.
    """
    datasets = optional("datasets", "train")
    if os.path.isdir(dataset_name) and (others := walk(Path(dataset_name))[1]):
        raise InputError(f"{dataset_name} contains entries that are neither files nor folders: {first_names(others)}.")
    try:
        if any(os.path.isfile(Path(dataset_name, file)) for file in ("state.json", "dataset_dict.json")):
            rows = datasets.load_from_disk(dataset_name)
        else:
            rows = datasets.load_dataset(dataset_name, config, cache_dir=cache_dir, data_dir=data_dir)
    except (*HUB_ERRORS, datasets.exceptions.DatasetsError) as error:
        advice = ""
        if "scripts are no longer supported" in str(error):
            advice = " Download its files and pass their folder; ImageNet-Sketch's zip is for `train_data_dir`."
        reason = hub_reason(error.__cause__ or error).rstrip(".")
        raise InputError(f"`dataset_name` {dataset_name} cannot be loaded: {reason}.{advice}") from error
    if not isinstance(rows, datasets.Dataset):
        if "train" not in rows:
            raise InputError(f'`dataset_name` {dataset_name} has no split "train", only {", ".join(rows)}')
        if len(rows) > 1:
            logger.info('%s: only its split "train" is read, of %s', dataset_name, ", ".join(rows))
        rows = rows["train"]
    folders = [Path(folder) for folder in (dataset_name, data_dir) if folder and os.path.isdir(folder)]
    caches = [cache_dir, datasets.config.HF_DATASETS_CACHE, HF_HUB_CACHE]
    _check_paths(rows, dataset_name, [*folders, *filter(None, caches)])
    return rows


def image_column_of(dataset: "datasets.Dataset", name: str, column: str) -> tuple[Sequence[Source], list[str]]:
    """Return the undecoded images of a column and their names in messages; InputError.

    Strings are paths below `name`, which must then be a folder.
    """
    import datasets

    check_column(dataset, name, "image_column", column)
    names = [f"row {row} of {name}" for row in range(len(dataset))]
    dataset = dataset.with_format(None)
    try:
        undecoded = dataset.cast_column(column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise InputError(f"The column {column!r} of {name} holds no images: choose another `image_column`.") from error
    if dataset.features[column] not in (datasets.Value("string"), datasets.Value("large_string")):
        return undecoded[column], names
    if not os.path.isdir(name):
        raise InputError(f"The column {column!r} of {name} holds strings: choose another `image_column`.")
    paths = [path and os.path.join(name, path) for path in dataset[column][:]]
    _check_inside(zip(names, paths, strict=True), [name])
    return paths, names


def check_column(dataset: "datasets.Dataset", name: str, argument: str, column: str) -> None:
    if column not in dataset.column_names:
        columns = ", ".join(dataset.column_names)
        raise InputError(f"{name} has no column {column!r}, `{argument}` can be one of: {columns}.")


def lone_label(dataset: "datasets.Dataset", ignored: str | None = None) -> str | None:
    """Return the only column of class labels, or None."""
    labels = [name for name, feature in dataset.features.items() if hasattr(feature, "names") and name != ignored]
    return labels[0] if len(labels) == 1 else None


def _check_paths(rows: "datasets.Dataset", name: str, folders: Iterable[str | os.PathLike]) -> None:
    """InputError if an image is a file outside of `folders`. All columns are checked, since any may be chosen."""
    for field in rows.data.schema:
        if str(field.type).startswith("struct<") and {"bytes", "path"} <= {part.name for part in field.type}:
            _check_inside(_paths(rows, name, field.name), folders)


def _paths(rows: "datasets.Dataset", name: str, column: str) -> Iterator[tuple[str, str | None]]:
    """Yield (row, path) of the images whose bytes are not in the row."""
    number = 0
    for chunk in rows.data.column(column).chunks:
        for absent, path in zip(chunk.field("bytes").is_null().tolist(), chunk.field("path").tolist(), strict=True):
            if absent:
                yield f"row {number} of {name}", path
            number += 1


def _check_inside(paths: Iterable[tuple[str, str | None]], folders: Iterable[str | os.PathLike]) -> None:
    prefixes = tuple(os.path.join(os.path.abspath(folder), "") for folder in folders)
    for row, path in paths:
        if path and not os.path.abspath(path).startswith(prefixes):
            raise InputError(f"{row}: the image {shown(path)} lies outside of the data set: copy it into the folder.")
