"""Intra- and inter-class distances of embeddings, over all pairs (Seo 2025, section 4.3)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError


@dataclass(frozen=True)
class Distances:
    """Mean cosine distances, 0 to 2. NaN if there are no pairs.

    Args:
        intra: over all pairs of drawings of one class.
        inter: over all pairs of drawings of two classes.
        ratio: inter / intra; infinite if intra is 0.
        class_intra: for each class, over its pairs; NaN for a class of one drawing.
        class_inter: for each class, over its drawings with all others.
        counts: drawings of each class.
        zero_vectors: number of embeddings without a direction, at distance 1 from everything.
    """

    intra: float
    inter: float
    ratio: float
    class_intra: list[float]
    class_inter: list[float]
    counts: list[int]
    zero_vectors: int


class ClassDistances:
    """Intra- and inter-class cosine distances over all pairs, from batches: O(N D) time, one sum per class in memory.

    The cosines within a class of unit vectors add up to the squared length of their sum, so no pairs are formed.

    Args:
        num_classes: all labels are below it.
    """

    def __init__(self, num_classes: int):
        self.sums: Tensor | None = None
        self.counts = torch.zeros(num_classes, dtype=torch.long)
        self.directed = torch.zeros(num_classes, dtype=torch.long)  # without zero vectors

    def update(self, embeddings: Tensor, labels: Tensor) -> None:
        """Add floating-point embeddings (B, D) of any length and their labels (B,). InputError."""
        if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1]:
            raise InputError(
                f"expected embeddings (B, D) and labels (B,), got {tuple(embeddings.shape)}, {tuple(labels.shape)}"
            )
        vectors, labels = embeddings.detach().double().cpu(), labels.detach().long().cpu()
        if not vectors.isfinite().all():
            raise InputError("embeddings must be finite")
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.counts):
            low, high = labels.aminmax()
            raise InputError(f"labels must lie between 0 and {len(self.counts) - 1}, got {low} to {high}")
        lengths = vectors.norm(dim=1)
        vectors = vectors / lengths.where(lengths > 0, 1)[:, None]
        if self.sums is None:
            self.sums = vectors.new_zeros(len(self.counts), vectors.shape[1])
        self.sums.index_add_(0, labels, vectors)
        self.counts += labels.bincount(minlength=len(self.counts))
        self.directed += labels[lengths > 0].bincount(minlength=len(self.counts))

    def compute(self) -> Distances:
        if self.sums is None or not self.counts.any():
            raise InputError("there are no embeddings to measure")
        counts, total = self.counts.double(), self.sums.sum(0)
        inside = self.sums.square().sum(1)  # all cosines within a class, including those of a drawing with itself
        across = self.sums @ total - inside
        inside_pairs, across_pairs = counts * (counts - 1), counts * (counts.sum() - counts)
        intra = _distance(inside.sum() - self.directed.sum(), inside_pairs.sum())
        inter = _distance(across.sum(), across_pairs.sum())
        return Distances(
            intra=float(intra),
            inter=float(inter),
            ratio=float(inter / intra),
            class_intra=_distance(inside - self.directed, inside_pairs).tolist(),
            class_inter=_distance(across, across_pairs).tolist(),
            counts=self.counts.tolist(),
            zero_vectors=int(self.counts.sum() - self.directed.sum()),
        )


def class_distances(embeddings: Tensor, labels: Tensor | Sequence[int]) -> Distances:
    """Return the `Distances` of floating-point embeddings (N, D) with labels (N,), integers from 0."""
    labels = torch.as_tensor(labels)
    measure = ClassDistances(int(labels.max()) + 1 if len(labels) else 0)
    measure.update(embeddings, labels)
    return measure.compute()


def _distance(cosines: Tensor, pairs: Tensor) -> Tensor:
    return torch.where(pairs > 0, (1 - cosines / pairs).clamp(min=0), math.nan)
