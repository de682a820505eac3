"""Drawings as unit vectors that are near for one class: embedder, triplet loss, ranking (Seo 2025, section 4.2)."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from PIL import Image, ImageColor
from torch import Tensor, nn

from .backbone import BUNDLED, AttentionVGG16, fingerprint, is_vgg16_weights, load_backbone
from .errors import InputError, first_line
from .hub import HubModel
from .images import Source, check_choice, fit_image, load_image, to_tensor

EMBEDDINGS = ("pooled", "flat", "logits", "head")
MINING = ("batch_hard", "batch_all")
CELLS = 2**22  # similarities in memory at a time
PART = 2**10  # embeddings in float64 at a time, which stay in the processor's cache
DECIMALS = 9  # beyond them a sum differs with the size of the matrix that it is part of


class SketchEmbedder(
    nn.Module,
    HubModel,
    library_name="sketch-perceptual",
    tags=["sketch", "image-feature-extraction", "image-retrieval", "vgg16", "attention"],
    license="apache-2.0",
):
    """Drawings to vectors of length 1, whose products are cosine similarities. Frozen, in eval mode.

    Args:
        backbone: the keywords of the `AttentionVGG16` inside.
        embedding: what is brought to length 1: "pooled", the mean of the backbone's last map; "flat", that map as
            7x7; "logits", its classifier's; "head", those of a classifier that was trained to embed.
        resolution: drawings become (resolution, resolution) pixels.
        fit: "pad" keeps them whole, "crop" cuts the longer side; see `fit_image`.
        background: colour behind transparent drawings and beside padded ones.
    """

    noun = "embedder"

    def __init__(
        self,
        backbone: dict,
        embedding: str = "pooled",
        resolution: int = 224,
        fit: str = "pad",
        background: str = "white",
    ):
        super().__init__()
        check_choice("--embedding", embedding, EMBEDDINGS)
        fit_image(Image.new("RGB", (1, 1)), resolution, fit, background)  # a wrong option fails here
        self.embedding, self.resolution, self.fit, self.background = embedding, resolution, fit, background
        self.backbone = AttentionVGG16(**backbone)
        self.classifies = embedding in ("logits", "head")
        if self.classifies and not self.backbone.num_classes:
            raise InputError(f"--embedding {embedding} needs a backbone with a classifier, this one has none")
        pooled = self.backbone.head == "linear" if self.classifies else embedding == "pooled"
        self.pool = nn.AdaptiveAvgPool2d(1 if pooled else 7)
        self.requires_grad_(False).eval()

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, F), what `project` takes: F is the channels, or 49 times as many."""
        return self.pool(self.backbone.last_map(images)).flatten(1)

    def project(self, features: Tensor) -> Tensor:
        """(B, F) -> (B, D) of length 1 in float32; a zero vector stays zero."""
        return F.normalize((self.backbone.classifier(features) if self.classifies else features).float())

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, D) of length 1 in float32."""
        return self.project(self.features(images))

    def prepare(self, source: Source) -> Tensor:
        """A picture, as `load_image` takes it, -> (3, resolution, resolution) in [-1, 1]."""
        image = load_image(source, self.background)
        return to_tensor(fit_image(image, self.resolution, self.fit, self.background))

    @torch.inference_mode()
    def embed(self, images: Sequence[Source], batch_size: int = 32) -> Tensor:
        """Pictures, as `load_image` takes them, -> (N, D) of length 1, float32 on the CPU."""
        if not len(images):
            raise InputError("there are no images to embed")
        device = next(self.parameters()).device
        batches = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
        return torch.cat([self(torch.stack(list(map(self.prepare, b))).to(device)).cpu() for b in batches])

    @property
    def feature_key(self) -> str:
        """Changes with whatever changes `features` of a picture: weights, pooling, resolution, fit and background."""
        pooling = "pooled" if self.pool.output_size == 1 else "flat"
        paper = "".join(f"{level:02x}" for level in ImageColor.getrgb(self.background)[:3])
        return f"{fingerprint(self.backbone.features)}-{pooling}-{self.resolution}-{self.fit}-{paper}"


def make_embedder(backbone: AttentionVGG16, **options) -> SketchEmbedder:
    """A `SketchEmbedder` with the weights of `backbone`; `options` are its other keywords."""
    embedder = SketchEmbedder(backbone._hub_mixin_config, **options)
    embedder.backbone.load_state_dict(backbone.state_dict())
    return embedder


def load_embedder(source: str | Path = BUNDLED, **options) -> SketchEmbedder:
    """An embedder from where a `SketchEmbedder` or an `AttentionVGG16` was saved, or from VGG-16 weights.

    Args:
        source: a folder or Hub id, or what else `load_backbone` takes; weights make a network without attention.
        options: keywords of `SketchEmbedder` instead of what was saved; those that are None are left alone.
    """
    options = {name: value for name, value in options.items() if value is not None}
    if is_vgg16_weights(source) or "backbone" not in _config(source):
        if options.get("embedding") == "head":
            raise InputError(f"--embedding head: {source} is a backbone, without a head that was trained to embed")
        return make_embedder(load_backbone(source, attention="none"), **options)
    saved = SketchEmbedder.from_pretrained(str(source))
    own = {name: getattr(saved, name) for name in ("embedding", "resolution", "fit", "background")}
    if own["embedding"] == "head" and options.get("embedding") == "logits":
        raise InputError(f"--embedding logits: {source} has a head that was trained to embed, no classifier")
    return make_embedder(saved.backbone, **(own | options)) if options else saved


def triplet_loss(
    embeddings: Tensor, labels: Tensor, margin: float = 0.2, mining: str = "batch_hard"
) -> tuple[Tensor, float]:
    """max(0, d(anchor, positive) - d(anchor, negative) + margin), d the cosine distance, over triplets of a batch.

    Args:
        embeddings: (B, D) of length 1.
        labels: (B,).
        mining: "batch_hard" takes for each anchor the farthest positive and the nearest negative and averages over
            anchors; "batch_all" averages over all triplets with a loss (Hermans et al. 2017, section 2).

    Returns the loss, which is 0 with a gradient where no triplet can be formed, and the share of triplets with a loss.
    """
    check_choice("--mining", mining, MINING)
    with torch.autocast(embeddings.device.type, enabled=False):
        distances = 1 - embeddings.float() @ embeddings.float().T
    same = labels[:, None] == labels
    positive, negative = same & ~torch.eye(len(labels), dtype=torch.bool, device=same.device), ~same
    if mining == "batch_hard":
        farthest = distances.where(positive, -torch.inf).amax(1)
        nearest = distances.where(negative, torch.inf).amin(1)
        losses = (farthest - nearest + margin)[positive.any(1) & negative.any(1)].relu()
    else:
        losses = (distances[:, :, None] - distances[:, None] + margin)[positive[:, :, None] & negative[:, None]].relu()
    active = int((losses > 0).sum())
    total = losses.sum() + 0 * embeddings.float().sum()
    count = len(losses) if mining == "batch_hard" else active
    return total / max(count, 1), active / max(len(losses), 1)


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


@dataclass(frozen=True)
class Ranking:
    """How a gallery was ranked for queries by cosine similarity.

    Args:
        scores: means over queries with a match, a drawing of their class in the gallery. "top1" and "top5": a match is
            first, or among the first five. "map": mean average precision of the whole ranking. "recall@k": the share
            of the matches that are among the first k. Also "queries", how many have a match, and "unmatched".
        nearest: (Q, 5) positions in the gallery, best first, for each query; -1 where the gallery ends.
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
    """Rank the gallery (M, D) for each of the queries (Q, D); of equals the first comes first.

    Args:
        query_ids, gallery_ids: what has a query's own id is neither ranked nor a match: the query itself, its copies.
    """
    labels, own = torch.as_tensor(gallery_labels), torch.as_tensor(query_labels)
    places = torch.arange(1, len(gallery) + 1)
    scores, nearest = [], []
    for rows, similarities in _similarities(queries, gallery):
        hidden = torch.zeros_like(similarities, dtype=torch.bool)
        if query_ids is not None:
            hidden = torch.as_tensor(query_ids)[rows, None] == torch.as_tensor(gallery_ids)
        similarities[hidden] = -torch.inf
        order = similarities.argsort(dim=1, descending=True, stable=True)
        hits = ((labels == own[rows, None]) & ~hidden).gather(1, order)
        found = hits.cumsum(1, dtype=torch.float64)
        matches = found[:, -1]
        precision = (found / places * hits).sum(1) / matches
        first = {k: found[:, min(k, len(gallery)) - 1] for k in (1, 5, *recall_at)}
        top = [(first[k] > 0).double() for k in (1, 5)]
        recalls = [first[k] / matches for k in recall_at]
        scores.append(torch.stack([*top, precision, *recalls])[:, matches > 0])
        best = order[:, :5].masked_fill(hidden.gather(1, order[:, :5]), -1)
        nearest.append(F.pad(best, (0, 5 - best.shape[1]), value=-1))
    scores = torch.cat(scores, 1)
    if not scores.numel():
        raise InputError("no query has a drawing of its class in the gallery")
    names = ["top1", "top5", "map", *(f"recall@{k}" for k in recall_at)]
    counts = {"queries": scores.shape[1], "unmatched": len(queries) - scores.shape[1]}
    return Ranking(dict(zip(names, scores.mean(1).tolist(), strict=True)) | counts, torch.cat(nearest))


def search(query: Tensor, gallery: Tensor, count: int) -> tuple[list[float], list[int]]:
    """The `count` drawings of the gallery (M, D) that are nearest to a query (D,): similarities and positions."""
    ((_, similarities),) = _similarities(query[None], gallery)
    values, order = similarities[0].sort(descending=True, stable=True)
    return values[:count].tolist(), order[:count].tolist()


def most_alike(queries: Tensor, gallery: Tensor) -> list[int]:
    """For each of the queries (Q, D) the position of the most alike in the gallery (M, D), of equals the first."""
    return [index for _, rows in _similarities(queries, gallery) for index in rows.argmax(1).tolist()]


def _similarities(queries: Tensor, gallery: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Cosines of a few queries after the other with the whole gallery, float64."""
    own, lengths = _lengths(queries, "queries"), _lengths(gallery, "gallery")
    step = max(1, CELLS // len(gallery))
    for start in range(0, len(queries), step):
        rows = slice(start, start + step)
        few = queries[rows].double() / own[rows, None]
        products = torch.cat([few @ part.double().T for part in gallery.split(PART)], 1)
        yield rows, (products / lengths).round(decimals=DECIMALS)


def _lengths(embeddings: Tensor, name: str) -> Tensor:
    if embeddings.ndim == 2 and len(embeddings):
        lengths = torch.cat([part.double().norm(dim=1) for part in embeddings.split(PART)])
        if lengths.isfinite().all():
            return lengths.clamp(min=1e-12)
    raise InputError(f"the {name} must be finite embeddings (N, D), got {tuple(embeddings.shape)}")


def _config(source: str | Path) -> dict:
    folder = Path(source)
    try:
        path = folder / "config.json" if folder.is_dir() else hf_hub_download(str(source), "config.json")
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"no network at {source}: it must be a folder or a Hub id written by save_pretrained, a .safetensors with"
            f' VGG-16 weights, or "imagenet" ({first_line(error)})'
        ) from error
