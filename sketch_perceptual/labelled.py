"""Images with classes, from class folders and `datasets`, as a classifier trains on them."""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from .data import Images, find_images, generator, image_column_of, imagenet_classes, readable_class
from .errors import InputError
from .images import Source, to_tensor

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

SPLITS = {"train", "training", "val", "valid", "validation", "test"}


class LabelledImages(Images):
    """Images with classes, indexed by `(epoch, index)`; a sampler supplies the pairs.

    `data[epoch, index]` is `{"pixel_values": (3, resolution, resolution) in [-1, 1], "label": int, "name": str}`.
    With `augment`: torchvision's RandomResizedCrop and a horizontal flip (Seo 2025, Algorithm 1), which depend on the
    seed, the epoch and the item alone. Without: the middle seven eighths, as 224 out of 256.

    Args:
        sources, names, background: see `Images`.
        labels: the class of each image, an index into `classes`.
        classes: folder names or labels, all different.
        groups: for each image what must stay together in a split, such as the hand that drew it.
    """

    augment = True

    def __init__(
        self,
        sources: Sequence[Source],
        names: Sequence[str],
        labels: Sequence[int],
        classes: Sequence[str],
        groups: Sequence[str] | None = None,
        *,
        resolution: int = 224,
        background: str = "white",
        seed: int = 0,
    ):
        super().__init__(sources, names, background)
        self.classes, self.resolution, self.seed = list(classes), resolution, seed
        self._labels, self._groups = labels, groups

    @property
    def labels(self) -> list[int]:
        return [self._labels[row] for row in self.rows]

    @property
    def groups(self) -> list[str] | None:
        return self._groups and [self._groups[row] for row in self.rows]

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        image, row = self.image(index), self.rows[index]
        size = (self.resolution, self.resolution)
        if self.augment:
            draw = generator(self.seed, int(epoch), row)
            with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
                torch.random.default_generator.set_state(draw.get_state())
                top, left, height, width = RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3))
                flip = torch.rand(()) < 0.5
            image = image.crop((left, top, left + width, top + height)).resize(size, Image.Resampling.BILINEAR)
            if flip:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        else:
            half, (x, y) = min(image.size) * 7 / 16, (side / 2 for side in image.size)
            image = image.resize(size, Image.Resampling.BILINEAR, box=(x - half, y - half, x + half, y + half))
        return {"pixel_values": to_tensor(image), "label": self._labels[row], "name": self.name(index)}


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


def class_names(classes: Sequence[str]) -> list[str]:
    """What people call the classes; of two that would read alike each keeps its id: "crane (n02012849)"."""
    readable = [readable_class(name) for name in classes]
    twice = {name for name, count in Counter(readable).items() if count > 1}
    return [f"{name} ({id})" if name in twice else name for name, id in zip(readable, classes, strict=True)]


def are_imagenets(classes: Sequence[str]) -> bool:
    """Whether these are ImageNet's 1000 classes in its order, as ids or as names."""
    ids = imagenet_classes()
    exact = {*ids, *ids.values()}
    return len(classes) == len(ids) and all(
        name in (id, ids[id], readable_class(id)) or (name not in exact and readable_class(name) == readable_class(id))
        for name, id in zip(classes, ids, strict=True)
    )
