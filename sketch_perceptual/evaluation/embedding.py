"""Embed drawings with one model after another, for `distance`, `retrieval` and `search`."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from ..data.datasets import LabelledImages
from ..data.images import fit_image
from ..data.scan import read_once
from ..networks.backbone import is_vgg16_weights
from ..networks.embedder import SketchEmbedder, load_embedder
from ..networks.hub_model import fingerprint, read_config
from ..training.distributed import on_main
from ..training.feature_cache import FeatureCache

SETTINGS = ("embedding", "resolution", "fit", "background")
Extract = Callable[..., FeatureCache]  # (extractor, data, keys), as `extract_features` after its first two arguments


class Drawings:
    """The readable drawings of a data set, on any background.

    Args:
        background: the one on which `copies`, the ids of equal drawings, are found.
    """

    def __init__(self, accelerator: Accelerator, data: LabelledImages, on_bad_image: str, background: str):
        self.accelerator, self.on_bad_image = accelerator, on_bad_image
        fit_image(Image.new("RGB", (1, 1)), 1, "pad", background)  # an unknown colour fails here, once
        data = on_background(data, background)
        contents = on_main(accelerator, partial(read_once, copies=True), data, on_bad_image)
        self.copies = contents.copies
        self.data, self.keys_on = data.select(contents.positions), {background: contents.keys}

    @property
    def keys(self) -> list[str]:
        return self.keys_on[self.data.background]

    def keep(self, positions: list[int]) -> None:
        """Keep only the drawings at these positions."""
        self.data = self.data.select(positions)
        self.copies = [self.copies[index] for index in positions]
        self.keys_on = {paper: [keys[index] for index in positions] for paper, keys in self.keys_on.items()}

    def on(self, background: str) -> tuple[LabelledImages, list[str]]:
        """Return the drawings on another background, and the keys of their contents there."""
        data = on_background(self.data, background)
        if background not in self.keys_on:  # ink in the colour of one background shows on another
            self.keys_on[background] = on_main(self.accelerator, read_once, data, self.on_bad_image).keys
        return data, self.keys_on[background]


def on_background(data: LabelledImages, background: str) -> LabelledImages:
    data = data.select(range(len(data)))
    data.background = background
    return data


def saved_background(source: str) -> str:
    """Return the background that an embedder was saved with; white for a backbone, which has none."""
    if is_vgg16_weights(source):
        return "white"
    config = read_config(source, SketchEmbedder)[1]
    background = config.get("background") if isinstance(config, dict) else None
    return background if isinstance(background, str) else "white"


def embed_models(
    accelerator: Accelerator, models: list[tuple[str, str]], drawings: Drawings, extract: Extract, options: dict
) -> Iterator[tuple[dict, SketchEmbedder, FeatureCache, list[str]]]:
    """Yield the description, embedder, features and keys of each model, on the main process only."""
    for name, source in models:
        embedder = load_embedder(source, **options)
        data, keys = drawings.on(embedder.background)
        cache = extract(embedder, data, keys)
        if not accelerator.is_main_process:
            continue
        settings = {setting: getattr(embedder, setting) for setting in SETTINGS}
        model = {"name": name, "model": Path(source).name, "weights": fingerprint(embedder)} | settings
        yield model, embedder.to(accelerator.device), cache, keys


@torch.no_grad()
def embed_cached(embedder: SketchEmbedder, cache: FeatureCache, keys: list[str], device: torch.device) -> Tensor:
    """Return embeddings (N, D) of length 1, on the CPU, in the order of the keys."""
    embeddings = torch.empty(0)
    for positions, features in cache.parts(keys):
        part = embedder.project(features.to(device)).cpu()
        if not len(embeddings):
            embeddings = part.new_empty(len(keys), part.shape[1])
        embeddings[positions] = part
    return embeddings
