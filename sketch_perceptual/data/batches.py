"""The order of a training's images."""

from collections.abc import Callable, Sequence

import torch

from ..seeds import generator
from .image_sets import Images


class EpochSampler(torch.utils.data.Sampler):
    """Yields (epoch, index) in an order drawn from (seed, epoch) alone; set `epoch` before each pass."""

    def __init__(self, length: int, seed: int):
        self.length, self.seed, self.epoch = length, seed, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self):
        order = torch.randperm(self.length, generator=generator(self.seed, "order", self.epoch))
        return iter([(self.epoch, index) for index in order.tolist()])


def make_loader(
    data: Images, batch_size: int, seed: int, collate: Callable, num_workers: int = 0, **options
) -> tuple[torch.utils.data.DataLoader, EpochSampler]:
    """Batches of `data`, which is indexed by (epoch, index), and the sampler that orders them."""
    sampler = EpochSampler(len(data), seed)
    loader = torch.utils.data.DataLoader(
        data,
        batch_size,
        sampler=sampler,
        collate_fn=collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        **options,
    )
    return loader, sampler


def pk_batches(
    labels: Sequence[int], classes_per_batch: int, images_per_class: int, draw: torch.Generator
) -> list[list[int]]:
    """Positions in `labels`, each once, in batches of up to P different classes and up to K drawings of each.

    A class that K does not divide has a smaller group. Classes come up in proportion to the groups they have left;
    where few are left, batches are smaller.
    """
    groups: dict[int, list[list[int]]] = {}
    order = torch.randperm(len(labels), generator=draw).tolist()
    for index in order:
        own = groups.setdefault(labels[index], [[]])
        if len(own[-1]) == images_per_class:
            own.append([])
        own[-1].append(index)
    classes, batches = sorted(groups), []
    left = torch.tensor([len(groups[label]) for label in classes], dtype=torch.float64)
    while left.any():
        count = min(classes_per_batch, int(left.count_nonzero()))
        chosen = torch.multinomial(left, count, generator=draw)
        left[chosen] -= 1
        batches.append([index for c in chosen.tolist() for index in groups[classes[c]].pop()])
    return [batches[index] for index in torch.randperm(len(batches), generator=draw).tolist()]
