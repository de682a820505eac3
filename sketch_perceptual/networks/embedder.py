"""Embedding of drawings as unit vectors that are close within a class (Seo 2025, section 4.2)."""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from PIL import Image, ImageColor
from torch import Tensor, nn

from ..data.images import Source, fit_image, fit_key, load_image, to_tensor
from ..errors import InputError
from .backbone import BUNDLED, AttentionVGG16, is_vgg16_weights, load_backbone, tuned_resolution
from .hub_model import HubModel, fingerprint, read_config
from .settings import TEXT, check_settings, integer, one_of

EMBEDDINGS = ("pooled", "flat", "logits", "head")


class SketchEmbedder(
    nn.Module,
    HubModel,
    library_name="sketch-perceptual",
    tags=["sketch", "image-feature-extraction", "image-retrieval", "vgg16", "attention"],
):
    """Maps drawings to unit vectors, whose dot products are cosine similarities. Frozen, in eval mode.

    Args:
        backbone: keywords of the `AttentionVGG16` inside.
        embedding: the vector that is normalised: "pooled", the mean of the backbone's last map; "flat", that map as
            7x7; "logits", its classifier's; "head", those of a classifier that was trained to embed.
        resolution: drawings are fitted to (resolution, resolution) pixels.
        fit: "pad" keeps them whole, "crop" cuts the longer side; see `fit_image`.
        background: colour behind transparent drawings and beside padded ones.
    """

    noun = "network"
    usage = """from PIL import Image

from sketch_perceptual import load_embedder

embedder = load_embedder("{source}")
vectors = embedder.embed([Image.new("RGB", (64, 64), colour) for colour in ("black", "white")])
print(vectors @ vectors.T)  # cosine similarities"""
    sources = AttentionVGG16.sources
    bundled = BUNDLED
    rules: ClassVar = {
        "backbone": AttentionVGG16.rules,
        "embedding": one_of(*EMBEDDINGS),
        "resolution": integer(1),
        "fit": one_of("pad", "crop"),
        "background": TEXT,
    }

    def __init__(
        self,
        backbone: dict,
        embedding: str = "pooled",
        resolution: int = 224,
        fit: str = "pad",
        background: str = "white",
    ):
        super().__init__()
        check_settings(self.rules, {name: value for name, value in locals().items() if name in self.rules})
        fit_image(Image.new("RGB", (1, 1)), 1, fit, background)  # an invalid colour fails here
        self.embedding, self.resolution, self.fit, self.background = embedding, resolution, fit, background
        self.backbone = AttentionVGG16(**backbone)
        self.classifies = embedding in ("logits", "head")
        if self.classifies and not self.backbone.num_classes:
            raise InputError(
                f"`embedding` {embedding} needs a backbone with a classifier, which this one does not have"
            )
        pooled = self.backbone.head == "linear" if self.classifies else embedding == "pooled"
        self.pool = nn.AdaptiveAvgPool2d(1 if pooled else 7)
        self.requires_grad_(False).eval()

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, F), the input of `project`: F is the channels, or 49 times as many."""
        return self.pool(self.backbone.last_map(images)).flatten(1)

    def project(self, features: Tensor) -> Tensor:
        """(B, F) -> (B, D) of length 1 in float32; a zero vector stays zero."""
        return F.normalize((self.backbone.classifier(features) if self.classifies else features).float())

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, D) of length 1 in float32."""
        return self.project(self.features(images))

    def prepare(self, source: Source) -> Tensor:
        """Load a picture, anything `load_image` takes, as (3, resolution, resolution) in [-1, 1]."""
        image = load_image(source, self.background)
        return to_tensor(fit_image(image, self.resolution, self.fit, self.background))

    @torch.inference_mode()
    def embed(self, images: Source | Iterable[Source], batch_size: int = 32) -> Tensor:
        """Embed one picture or several, anything `load_image` takes, as (N, D) of length 1, float32 on the CPU."""
        if not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"`batch_size` must be an integer of at least 1, got {batch_size!r}")
        try:
            sources = iter([images] if isinstance(images, Source) or hasattr(images, "read") else images)
        except TypeError:
            sources = iter([images])  # `load_image` raises
        weight = next(self.parameters())
        vectors = []
        while batch := [self.prepare(source) for source in islice(sources, batch_size)]:
            vectors.append(self(torch.stack(batch).to(weight)).cpu())
        if not vectors:
            raise InputError("there are no images to embed")
        return torch.cat(vectors)

    @property
    def feature_key(self) -> str:
        """Cache key of everything that changes the `features` of a picture: weights, pooling and preprocessing."""
        pooling = "pooled" if self.pool.output_size == 1 else "flat"
        paper = "".join(f"{level:02x}" for level in ImageColor.getrgb(self.background)[:3])
        return f"{fingerprint(self.backbone.features)}-{pooling}-{self.resolution}-{fit_key(self.fit)}-{paper}"


def make_embedder(backbone: AttentionVGG16, **options) -> SketchEmbedder:
    """Return a `SketchEmbedder` with the weights of `backbone`; `options` are its other keywords."""
    embedder = SketchEmbedder(backbone.settings, **options)
    embedder.backbone.load_state_dict(backbone.state_dict())
    return embedder


def load_embedder(source: str | Path = BUNDLED, **options) -> SketchEmbedder:
    """Load an embedder from a saved `SketchEmbedder` or `AttentionVGG16`, or from VGG-16 weights.

    Args:
        source: a folder or Hub id, or anything else `load_backbone` takes; VGG-16 weights have no attention.
        options: keywords of `SketchEmbedder` that replace the saved ones, unless None. The default resolution of a
            backbone is the one it was tuned at, see `tuned_resolution`.
    """
    options = {name: value for name, value in options.items() if value is not None}
    if is_vgg16_weights(source) or "backbone" not in read_config(source, SketchEmbedder)[1]:
        if options.get("embedding") == "head":
            raise InputError(f"`embedding` head: {source} is a backbone without a head that was trained to embed")
        return make_embedder(
            load_backbone(source, attention="none"), **({"resolution": tuned_resolution(source)} | options)
        )
    saved = SketchEmbedder.from_pretrained(source)
    settings = {name: getattr(saved, name) for name in ("embedding", "resolution", "fit", "background")}
    if settings["embedding"] == "head" and options.get("embedding") == "logits":
        raise InputError(f"`embedding` logits: {source} has a head that was trained to embed, not a classifier")
    return make_embedder(saved.backbone, **(settings | options)) if options else saved
