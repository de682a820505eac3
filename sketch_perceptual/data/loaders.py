"""Samplers and data loaders."""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from operator import itemgetter
from typing import Any

import torch

from ..seeds import generator
from .datasets import CaptionedImages, Images


class EpochSampler(torch.utils.data.Sampler):
    """Yield (epoch, index) in an order that depends only on (seed, epoch); set `epoch` before each pass."""

    def __init__(self, length: int, seed: int):
        self.length, self.seed, self.epoch = length, seed, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self):
        order = torch.randperm(self.length, generator=generator(self.seed, "order", self.epoch))
        return iter([(self.epoch, index) for index in order.tolist()])


class ShapeSampler(EpochSampler):
    """Yield batches of (epoch, index) whose images have one shape, in an order that depends only on (seed, epoch).

    All batches are full except the last one of each shape.
    """

    def __init__(self, shapes: Sequence[Hashable], batch_size: int, seed: int):
        super().__init__(sum(-(-count // batch_size) for count in Counter(shapes).values()), seed)
        self.shapes, self.batch_size = shapes, batch_size

    def __iter__(self):
        rng = generator(self.seed, "order", self.epoch)
        batches: list[list[tuple[int, int]]] = []
        filling: dict[Hashable, list[tuple[int, int]]] = {}
        for index in torch.randperm(len(self.shapes), generator=rng).tolist():
            batch = filling.setdefault(self.shapes[index], [])
            batch.append((self.epoch, index))
            if len(batch) == self.batch_size:
                batches.append(filling.pop(self.shapes[index]))
        batches += filling.values()
        return iter([batches[number] for number in torch.randperm(len(batches), generator=rng).tolist()])


class Batches(torch.utils.data.Dataset):
    """Collated batches by lists of keys, for a DataLoader that takes one at a time.

    accelerate can only split batches of equal size over processes, and these differ.
    """

    def __init__(self, data: Images, collate: Callable):
        self.data, self.collate = data, collate

    def __getitem__(self, keys: Sequence[tuple[int, int]]) -> Any:
        return self.collate([self.data[key] for key in keys])


def make_loader(
    data: Images, batch_size: int, seed: int, collate: Callable, num_workers: int = 0, **options
) -> tuple[torch.utils.data.DataLoader, EpochSampler]:
    """Return a loader of `data`, which is indexed by (epoch, index), and its sampler.

    With `fit` "bucket", all images of a batch have one shape.
    """
    options |= {"num_workers": num_workers, "persistent_workers": num_workers > 0}
    sampler: EpochSampler
    if isinstance(data, CaptionedImages) and data.fit == "bucket":
        sampler = ShapeSampler(list(map(data.shape, range(len(data)))), batch_size, seed)
        batches = Batches(data, collate)
        return torch.utils.data.DataLoader(batches, 1, sampler=sampler, collate_fn=itemgetter(0), **options), sampler
    sampler = EpochSampler(len(data), seed)
    return torch.utils.data.DataLoader(data, batch_size, sampler=sampler, collate_fn=collate, **options), sampler


def pk_batches(
    labels: Sequence[int], classes_per_batch: int, images_per_class: int, rng: torch.Generator
) -> list[list[int]]:
    """Split positions in `labels` into batches of up to P different classes and up to K drawings of each.

    If K does not divide the size of a class, one of its groups is smaller. Classes are drawn in proportion to their
    remaining groups; when few remain, batches are smaller.
    """
    groups: dict[int, list[list[int]]] = {}
    order = torch.randperm(len(labels), generator=rng).tolist()
    for index in order:
        class_groups = groups.setdefault(labels[index], [[]])
        if len(class_groups[-1]) == images_per_class:
            class_groups.append([])
        class_groups[-1].append(index)
    classes, batches = sorted(groups), []
    left = torch.tensor([len(groups[label]) for label in classes], dtype=torch.float64)
    while left.any():
        count = min(classes_per_batch, int(left.count_nonzero()))
        chosen = torch.multinomial(left, count, generator=rng)
        left[chosen] -= 1
        batches.append([index for c in chosen.tolist() for index in groups[classes[c]].pop()])
    return [batches[index] for index in torch.randperm(len(batches), generator=rng).tolist()]
