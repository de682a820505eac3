"""Retrieval: ranking of a gallery by cosine similarity, and its scores."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError

CELLS = 2**22  # similarities in memory at a time
PART = 2**10  # embeddings in float64 at a time, few enough for the processor's cache
DECIMALS = 9  # further decimals depend on the size of the matrices that are multiplied


@dataclass(frozen=True)
class Ranking:
    """Result of ranking a gallery by cosine similarity to queries.

    Args:
        scores: means over queries with a match, a drawing of their class in the gallery. "top1" and "top5": a match is
            first, or among the first five. "map": mean average precision of the whole ranking. "recall@k": the share
            of the matches that are among the first k. Also the number of "queries" with a match, and "unmatched" ones.
        nearest: (Q, 5) positions in the gallery, best first, for each query; padded with -1.
    """

    scores: dict[str, float]
    nearest: Tensor


def rank(
    queries: Tensor,
    gallery: Tensor,
    query_labels: Sequence[int],
    gallery_labels: Sequence[int],
    query_ids: Sequence[int] | None = None,
    gallery_ids: Sequence[int] | None = None,
    recall_at: Sequence[int] = (10, 50),
) -> Ranking:
    """Rank the gallery (M, D) for each of the queries (Q, D); ties keep the order of the gallery.

    Args:
        query_ids, gallery_ids: drawings with the query's id, itself and its copies, are neither ranked nor matches.
    """
    labels, wanted = torch.as_tensor(gallery_labels), torch.as_tensor(query_labels)
    ranks = torch.arange(1, len(gallery) + 1)
    scores, nearest = [], []
    for rows, similarities in _similarities(queries, gallery):
        hidden = torch.zeros_like(similarities, dtype=torch.bool)
        if query_ids is not None:
            hidden = torch.as_tensor(query_ids)[rows, None] == torch.as_tensor(gallery_ids)
        similarities[hidden] = -torch.inf
        order = similarities.argsort(dim=1, descending=True, stable=True)
        hits = ((labels == wanted[rows, None]) & ~hidden).gather(1, order)
        counts = hits.cumsum(1, dtype=torch.float64)
        matches = counts[:, -1]
        precision = (counts / ranks * hits).sum(1) / matches
        first = {k: counts[:, min(k, len(gallery)) - 1] for k in (1, 5, *recall_at)}
        top = [(first[k] > 0).double() for k in (1, 5)]
        recalls = [first[k] / matches for k in recall_at]
        scores.append(torch.stack([*top, precision, *recalls])[:, matches > 0])
        best = order[:, :5].masked_fill(hidden.gather(1, order[:, :5]), -1)
        nearest.append(F.pad(best, (0, 5 - best.shape[1]), value=-1))
    scores = torch.cat(scores, 1)
    if not scores.numel():
        raise InputError("no query has a drawing of its class in the gallery")
    names = ["top1", "top5", "map", *(f"recall@{k}" for k in recall_at)]
    totals = {"queries": scores.shape[1], "unmatched": len(queries) - scores.shape[1]}
    return Ranking(dict(zip(names, scores.mean(1).tolist(), strict=True)) | totals, torch.cat(nearest))


def search(query: Tensor, gallery: Tensor, count: int) -> tuple[list[float], list[int]]:
    """Return similarities and positions of the `count` drawings in the gallery (M, D) nearest to a query (D,)."""
    ((_, similarities),) = _similarities(query[None], gallery)
    values, order = similarities[0].sort(descending=True, stable=True)
    return values[:count].tolist(), order[:count].tolist()


def most_alike(queries: Tensor, gallery: Tensor) -> list[int]:
    """Return the position of the nearest of the gallery (M, D) for each of the queries (Q, D), the first of ties."""
    return [index for _, rows in _similarities(queries, gallery) for index in rows.argmax(1).tolist()]


def _similarities(queries: Tensor, gallery: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield the cosines of a few queries at a time with the whole gallery, float64."""
    query_lengths, lengths = _lengths(queries, "queries"), _lengths(gallery, "gallery")
    step = max(1, CELLS // len(gallery))
    for start in range(0, len(queries), step):
        rows = slice(start, start + step)
        units = queries[rows].double() / query_lengths[rows, None]
        products = torch.cat([units @ part.double().T for part in gallery.split(PART)], 1)
        yield rows, (products / lengths).round(decimals=DECIMALS)


def _lengths(embeddings: Tensor, name: str) -> Tensor:
    if embeddings.ndim == 2 and len(embeddings):
        lengths = torch.cat([part.double().norm(dim=1) for part in embeddings.split(PART)])
        if lengths.isfinite().all():
            return lengths.clamp(min=1e-12)
    raise InputError(f"the {name} must be finite embeddings (N, D), got {tuple(embeddings.shape)}")
