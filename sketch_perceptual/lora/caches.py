"""Caches of prompt embeddings and latents."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import Tensor
from tqdm.auto import tqdm

from ..data.datasets import CaptionedImages
from ..data.images import fit_key
from ..diffusion import Latents
from ..errors import InputError
from ..networks.hub_model import fingerprint
from ..training.feature_cache import FeatureCache, cache_folder, fill_cache
from ..training.run import Run
from .pictures import Pictures

logger = get_logger(__name__, log_level="INFO")

RANDOM_CROPS = "images that are not square are cropped at random: add --fit pad or --center_crop"


class PromptCache:
    """Embeddings of captions, (B, 77, C) for SD-1.5, some kept in memory.

    Args:
        encode: captions -> embeddings.
    """

    encode: Any  # None, once all captions are kept

    def __init__(self, encode: Callable[[list[str]], Tensor], device: torch.device):
        self.encode, self.device = encode, device
        self.kept: dict[str, Tensor] = {}

    def keep(self, captions: Iterable[str]) -> None:
        """Embed captions and keep the results on the CPU."""
        with torch.no_grad():
            for caption in tqdm(sorted(captions), "Captions", leave=False, disable=None):
                self.kept[caption] = self.encode([caption]).cpu()

    def __call__(self, captions: list[str]) -> Tensor:
        if all(caption in self.kept for caption in captions):
            return torch.cat([self.kept[caption] for caption in captions]).to(self.device)
        return self.encode(captions)


def should_cache_latents(wanted: bool | None, pictures: Pictures, run: Run, seen: int) -> bool:
    """Return whether to encode each image once: `wanted`, or if the run sees all of them, or as before a resume.

    Args:
        seen: number of images that the whole run sees, repetitions included.
    """
    if wanted is None:
        copies = len(pictures.train) * (2 if pictures.train.random_flip else 1)
        if pictures.random_crops:
            logger.info(f"--no-cache_latents, because {RANDOM_CROPS}")
        return run.state.setdefault("cache_latents", seen >= copies and not pictures.random_crops)
    if wanted and pictures.random_crops:
        raise InputError(f"`cache_latents` cannot be used: {RANDOM_CROPS}")
    return wanted


def cache_latents(
    accelerator: Accelerator,
    latents: Latents,
    pictures: Pictures,
    *,
    folder: str | None,
    num_workers: int,
    with_images: bool,
) -> None:
    """Encode the training pictures, which then return moments, and images only with `with_images`.

    Images are encoded one by one, so that latents do not depend on the other images of a batch. The VAE stays loaded.

    Args:
        folder: of the cache; None is the user's.
        with_images: keep the images in the batches too.
    """
    data, keys = pictures.train, pictures.keys
    settings = [data.resolution, fit_key(data.fit), data.interpolation, data.background, accelerator.mixed_precision]
    kind = "-".join(map(str, ["latents", fingerprint(latents.vae), *settings]))
    cache = FeatureCache(Path(folder or cache_folder(), kind))
    shapes = [data.shape(index) for index in range(len(data))]
    flips = (False, True) if data.random_flip else (False,)
    in_shapes = sorted(range(len(data)), key=shapes.__getitem__)  # a file of the cache has one
    images = [(index, flipped) for index in in_shapes for flipped in flips]
    fill_cache(
        accelerator,
        cache,
        [_key(keys[index], flipped) for index, flipped in images],
        partial(_read_image, data, images),
        lambda batch: latents.encode(batch).flatten(1),
        lambda position: data.name(images[position][0]),
        batch_size=1,
        num_workers=num_workers,
        kind="latents",
    )
    data.moments = partial(_read_moments, cache, shapes, keys, 2 * latents.channels)
    data.with_pixels = with_images


def _key(key: str, flipped: bool) -> str:
    return f"{key}-flipped" if flipped else key


def _read_image(data: CaptionedImages, images: list[tuple[int, bool]], position: int) -> Tensor:
    return data.pixels(*images[position])


def _read_moments(
    cache: FeatureCache, shapes: list[tuple[int, int]], keys: list[str], channels: int, index: int, flipped: bool
) -> Tensor:
    width, height = shapes[index]
    row = cache.row(_key(keys[index], flipped))
    pixels = round((width * height * channels / len(row)) ** 0.5)  # of a latent's side
    return row.view(channels, height // pixels, width // pixels)
