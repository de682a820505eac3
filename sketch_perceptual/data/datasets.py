"""Datasets of images: plain, captioned, labelled."""

import copy
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image

from ..errors import InputError, check_choice, shown
from ..extras import optional
from ..seeds import generator
from .folders import mask_beside
from .images import INVERT, Source, bucket_size, fit_image, load_extras, load_image, to_tensor, unwrap
from .scan_cache import File, file_of, stat_file
from .tags import shuffled, with_trigger

Kind = TypeVar("Kind", bound="Images")


class Images(torch.utils.data.Dataset):
    """Images by index, read on access; `select` takes a subset.

    Args:
        sources: anything `load_image` takes: a list of paths or a column of a `datasets.Dataset`.
        names: the name of each image in messages.
        background, invert: see `load_image`.
    """

    fit = ""  # how images are made square, if they are
    scan_folder: Path | None = None  # where `scan` caches its results; None: not cached

    def __init__(
        self, sources: Sequence[Source], names: Sequence[str], background: str = "white", invert: str = "never"
    ):
        check_choice("invert", invert, INVERT)
        self.sources, self.names, self.background, self.invert = sources, names, background, invert
        self.rows: Sequence[int] = range(len(sources))  # a row is the item's identity and survives `select`

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, index: int) -> Image.Image:
        """Return the whole image as RGB; InputError naming it if it cannot be read."""
        return load_image(self.sources[self.rows[index]], self.background, self.name(index), self.invert)

    def file(self, index: int) -> File | None:
        """Return the identity of the image's file, or of its bytes; None if there is neither."""
        source = unwrap(self.sources[self.rows[index]])
        if isinstance(source, bytes):
            return file_of(source)
        return stat_file(source) if isinstance(source, str | os.PathLike) else None

    def name(self, index: int) -> str:
        """Return the image's name in messages, on one line."""
        return shown(self.names[self.rows[index]])

    def spread(self, most: int) -> range:
        """Return the indices of at most `most` items, evenly spaced."""
        return range(0, len(self), -(-len(self) // most))

    def select(self: Kind, indices: Iterable[int]) -> Kind:
        """Return the items at `indices`; each keeps its identity and so its random draws."""
        subset = copy.copy(self)
        subset.rows = [self.rows[index] for index in indices]
        return subset


class CaptionedImages(Images):
    """Images with captions, indexed by `(epoch, index)`; a sampler supplies the pairs.

    `data[epoch, index]` is `{"pixel_values": (3, H, W) in [-1, 1], "caption": str, "name": str}`.
    Crop, flip and changes of the caption depend only on the seed, the epoch and the item, so neither workers nor the
    number of processes nor a resumed run changes them.

    With `alpha_mask` there is also "mask", (1, H, W) in [0, 1], which is 1 where the image counts.

    If `moments` is set, to a function of index and flip, its result is added under this name; `with_pixels = False`
    then leaves the image unread.

    Args:
        sources, names, background, invert: see `Images`.
        captions: a caption or a list of captions for each image.
        center_crop: keep the centre of each image, instead of a random crop along the longer side.
        random_flip: mirror half of the images.
        alpha_mask: see `mask`.
        trigger_word: prepended to each caption that does not contain it.
        caption_dropout: fraction of the captions that are replaced by "".
        shuffle_tags: shuffle the comma-separated tags of a caption each time, except for the first `keep_tags` and a
            leading trigger word.
        resolution, fit, interpolation: see `fit_image`. `fit` may also be "bucket", see `bucket_size`; `sizes` must
            then be set to the width and height of the image of each row before `shape` is called.
    """

    multiple = 8  # bucket sides are multiples of this: the VAE's downscaling factor
    origin = ""  # description of where the captions come from

    def __init__(
        self,
        sources: Sequence[Source],
        names: Sequence[str],
        captions: Sequence[str | Sequence[str]],
        *,
        resolution: int = 512,
        fit: str = "crop",
        center_crop: bool = False,
        random_flip: bool = False,
        alpha_mask: bool = False,
        trigger_word: str | None = None,
        caption_dropout: float = 0.0,
        shuffle_tags: bool = False,
        keep_tags: int = 0,
        interpolation: str = "lanczos",
        background: str = "white",
        invert: str = "never",
        seed: int = 0,
    ):
        check_choice("fit", fit, ("crop", "pad", "bucket"))
        fit_image(Image.new("RGB", (1, 1)), resolution, "crop", background, interpolation)  # a wrong option fails here
        super().__init__(sources, names, background, invert)
        lists = ([c] if isinstance(c, str) else c for c in captions)
        self.captions = [[with_trigger(caption, trigger_word) for caption in several] for several in lists]
        self.trigger_word, self.caption_dropout = trigger_word, caption_dropout
        self.shuffle_tags, self.keep_tags = shuffle_tags, keep_tags
        self.resolution, self.fit, self.center_crop, self.random_flip = resolution, fit, center_crop, random_flip
        self.interpolation, self.seed, self.alpha_mask = interpolation, seed, alpha_mask
        self.repeats = [1] * len(self.captions)  # for `repeated`
        self.origins = [""] * len(self.captions)  # like `origin`, for each row
        self.sizes = [(0, 0)] * len(self.captions)
        self.moments: Callable[[int, bool], torch.Tensor] | None = None
        self.with_pixels = True

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        row = self.rows[index]
        # All three are drawn whatever the settings, so that switching one on leaves the others as they were.
        position, flip, choice = torch.rand(3, generator=generator(self.seed, int(epoch), row)).tolist()
        flipped = self.random_flip and flip < 0.5
        example: dict[str, Any] = {"caption": self._caption(int(epoch), row, choice), "name": self.name(index)}
        if self.moments is not None:
            example["moments"] = self.moments(index, flipped)
        crop = None if self.center_crop else position
        if self.with_pixels:
            example["pixel_values"] = self.pixels(index, flipped, crop)
        if self.alpha_mask:
            mask = self.mask(index)
            example["mask"] = (self._fitted(mask, "black", flipped, crop)[:1] + 1) / 2
        return example

    def repeated(self) -> tuple["CaptionedImages", list[int]]:
        """Return the data with each image `repeats` times, drawn independently, and each item's original index."""
        extra = [index for index, row in enumerate(self.rows) for _ in range(self.repeats[row] - 1)]
        rows = [self.rows[index] for index in extra]
        data, count = copy.copy(self), len(self.sources)
        for name in ("sources", "names", "captions", "repeats", "origins", "sizes"):
            values = getattr(self, name)
            setattr(data, name, [*values, *(values[row] for row in rows)] if rows else values)
        data.rows = [*self.rows, *range(count, count + len(rows))]
        return data, [*range(len(self)), *extra]

    def caption_origins(self) -> str:
        """Describe where the captions come from: "text files (12 images), the default 'a fox' (2 images)"."""
        counts = Counter({self.names[row]: self.origins[row] for row in self.rows}.values())
        return ", ".join(f"{origin} ({count} images)" for origin, count in counts.most_common())

    def _caption(self, epoch: int, row: int, choice: float) -> str:
        captions = self.captions[row]
        caption, keep = captions[int(choice * len(captions))], self.keep_tags
        rng = generator(self.seed, "caption", epoch, row)
        if torch.rand((), generator=rng) < self.caption_dropout:
            return ""
        if not self.shuffle_tags:
            return caption
        if self.trigger_word and caption.lower().startswith(self.trigger_word.lower()):
            keep = max(keep, len(self.trigger_word.split(",")))
        return shuffled(caption, keep, rng)

    def pixels(self, index: int, flipped: bool = False, position: float | None = None) -> torch.Tensor:
        """Return the model's input, cropped at `position` from 0 to 1 along the longer side, or at the centre."""
        return self._fitted(self.image(index), self.background, flipped, position)

    def mask(self, index: int) -> Image.Image:
        """Return the mask of an image as RGB of its size: white where the image counts, black elsewhere.

        It is the `mask_beside` the image, or else the image's opacity. InputError.
        """
        source = self.sources[self.rows[index]]
        if isinstance(source, Path) and (beside := mask_beside(source)):
            mask, image = load_image(beside), self.image(index)
            if mask.size != image.size:
                sizes = "{} x {} pixels, its image {} x {}".format(*mask.size, *image.size)
                raise InputError(f"{shown(beside)} has {sizes}: a mask must have the size of its image.")
            return mask
        if alpha := load_extras(source)[0]:
            return alpha.convert("RGB")
        size = self.sizes[self.rows[index]]
        return Image.new("RGB", size if all(size) else self.image(index).size, "white")

    def _fitted(self, image: Image.Image, background: str, flipped: bool, position: float | None) -> torch.Tensor:
        if self.fit == "bucket":
            size = bucket_size(image.size, self.resolution, self.multiple)
            image = fit_image(image, size, "crop", background, self.interpolation)
        else:
            both = None if position is None else (position, position)
            image = fit_image(image, self.resolution, self.fit, background, self.interpolation, both)
        return to_tensor(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else image)

    def shape(self, index: int) -> tuple[int, int]:
        """Return the width and height of `pixels`."""
        if self.fit != "bucket":
            return self.resolution, self.resolution
        try:
            return bucket_size(self.sizes[self.rows[index]], self.resolution, self.multiple)
        except InputError as error:
            raise InputError(f"{self.name(index)}: {error}") from error


class LabelledImages(Images):
    """Images with classes, indexed by `(epoch, index)`; a sampler supplies the pairs.

    `data[epoch, index]` is `{"pixel_values": (3, resolution, resolution) in [-1, 1], "label": int, "name": str}`.
    With `augment`: torchvision's RandomResizedCrop and a horizontal flip (Seo 2025, Algorithm 1), which depend only on
    the seed, the epoch and the item. Without: the central seven eighths, as 224 out of 256.

    Args:
        sources, names, background, invert: see `Images`.
        labels: the class of each image, an index into `classes`.
        classes: folder names or labels, all different.
        groups: the group of each image, e.g. its artist; a split does not divide groups.
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
        invert: str = "never",
        seed: int = 0,
    ):
        super().__init__(sources, names, background, invert)
        self.random_crop = optional("torchvision.transforms", "train").RandomResizedCrop
        self.classes, self.resolution, self.seed = list(classes), resolution, seed
        self._labels, self._groups = labels, groups

    @property
    def labels(self) -> list[int]:
        return [self._labels[row] for row in self.rows]

    @property
    def groups(self) -> list[str] | None:
        return None if self._groups is None else [self._groups[row] for row in self.rows]

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        image, row = self.image(index), self.rows[index]
        size = (self.resolution, self.resolution)
        if self.augment:
            rng = generator(self.seed, int(epoch), row)
            with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
                torch.random.default_generator.set_state(rng.get_state())
                top, left, height, width = self.random_crop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3))
                flip = torch.rand(()) < 0.5
            image = image.crop((left, top, left + width, top + height)).resize(size, Image.Resampling.BILINEAR)
            if flip:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        else:
            half, (x, y) = min(image.size) * 7 / 16, (side / 2 for side in image.size)
            image = image.resize(size, Image.Resampling.BILINEAR, box=(x - half, y - half, x + half, y + half))
        return {"pixel_values": to_tensor(image), "label": self._labels[row], "name": self.name(index)}
