"""Images by index: plain, captioned, labelled."""

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
    """Images by index, read when asked for; `select` keeps some.

    Args:
        sources: what `load_image` takes: a list of paths or a column of a `datasets.Dataset`.
        names: what messages call each image.
        background, invert: see `load_image`.
    """

    fit = ""  # how images become squares, where they do
    scan_folder: Path | None = None  # where `scan` keeps what it has seen of files; None: nowhere

    def __init__(
        self, sources: Sequence[Source], names: Sequence[str], background: str = "white", invert: str = "never"
    ):
        check_choice("invert", invert, INVERT)
        self.sources, self.names, self.background, self.invert = sources, names, background, invert
        self.rows: Sequence[int] = range(len(sources))  # a row is the item's identity and survives `select`

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, index: int) -> Image.Image:
        """The whole image as RGB; InputError naming it if it cannot be read."""
        return load_image(self.sources[self.rows[index]], self.background, self.name(index), self.invert)

    def file(self, index: int) -> File | None:
        """The file that the image is in, or what stands for its bytes."""
        source = unwrap(self.sources[self.rows[index]])
        if isinstance(source, bytes):
            return file_of(source)
        return stat_file(source) if isinstance(source, str | os.PathLike) else None

    def name(self, index: int) -> str:
        """What messages call it, on one line."""
        return shown(self.names[self.rows[index]])

    def select(self: Kind, indices: Iterable[int]) -> Kind:
        """The items at `indices`; each keeps its identity and so its random draws."""
        subset = copy.copy(self)
        subset.rows = [self.rows[index] for index in indices]
        return subset


class CaptionedImages(Images):
    """Images with captions, indexed by `(epoch, index)`; a sampler supplies the pairs.

    `data[epoch, index]` is `{"pixel_values": (3, H, W) in [-1, 1], "caption": str, "name": str}`.
    The crop, the flip and what becomes of the caption depend on the seed, the epoch and the item alone, so neither
    workers nor the number of processes nor a resumed run changes them.

    With `alpha_mask` there is also "mask", (1, H, W) in [0, 1]: what counts of the image.

    Where `moments` is set, to a function of index and flip, its result is there under this name; `with_pixels = False`
    then leaves the image unread.

    Args:
        sources, names, background, invert: see `Images`.
        captions: a caption or a list of captions for each image.
        center_crop: keep the centre of each image; otherwise a random place along the longer side.
        random_flip: mirror half of the images.
        alpha_mask: see `mask`.
        trigger_word: what each caption begins with, unless the word is in it.
        caption_dropout: share of the captions that are left empty.
        shuffle_tags: put what stands between the commas of a caption in another order each time, except for the first
            `keep_tags` and the trigger word at its beginning.
        resolution, fit, interpolation: see `fit_image`; or fit "bucket", see `bucket_size`, for which `sizes` must be
            set, to width and height of the image of each row, before a `shape` is asked for.
    """

    multiple = 8  # of which the sides of a bucket must be: what the VAE makes one latent of
    origin = ""  # where the captions come from, in words

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
        own = ([c] if isinstance(c, str) else c for c in captions)
        self.captions = [[with_trigger(caption, trigger_word) for caption in several] for several in own]
        self.trigger_word, self.caption_dropout = trigger_word, caption_dropout
        self.shuffle_tags, self.keep_tags = shuffle_tags, keep_tags
        self.resolution, self.fit, self.center_crop, self.random_flip = resolution, fit, center_crop, random_flip
        self.interpolation, self.seed, self.alpha_mask = interpolation, seed, alpha_mask
        self.repeats = [1] * len(self.captions)  # what `repeated` makes of each
        self.origins = [""] * len(self.captions)  # where the captions of each come from, in words
        self.sizes = [(0, 0)] * len(self.captions)
        self.moments: Callable[[int, bool], torch.Tensor] | None = None
        self.with_pixels = True

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        row = self.rows[index]
        # All three are drawn whatever the settings, so that switching one on leaves the others as they were.
        place, flip, choice = torch.rand(3, generator=generator(self.seed, int(epoch), row)).tolist()
        flipped = self.random_flip and flip < 0.5
        example: dict[str, Any] = {"caption": self._caption(int(epoch), row, choice), "name": self.name(index)}
        if self.moments is not None:
            example["moments"] = self.moments(index, flipped)
        crop = None if self.center_crop else place
        if self.with_pixels:
            example["pixel_values"] = self.pixels(index, flipped, crop)
        if self.alpha_mask:
            mask = self.mask(index)
            example["mask"] = (self._fitted(mask, "black", flipped, crop)[:1] + 1) / 2
        return example

    def repeated(self) -> tuple["CaptionedImages", list[int]]:
        """Each image as often as `repeats` says, each time with draws of its own; and the index that each item had."""
        extra = [index for index, row in enumerate(self.rows) for _ in range(self.repeats[row] - 1)]
        rows = [self.rows[index] for index in extra]
        data, count = copy.copy(self), len(self.sources)
        for name in ("sources", "names", "captions", "repeats", "origins", "sizes"):
            values = getattr(self, name)
            setattr(data, name, [*values, *(values[row] for row in rows)] if rows else values)
        data.rows = [*self.rows, *range(count, count + len(rows))]
        return data, [*range(len(self)), *extra]

    def caption_origins(self) -> str:
        """Where the captions come from: "text files (12 images), the default 'a fox' (2 images)"."""
        counts = Counter({self.names[row]: self.origins[row] for row in self.rows}.values())
        return ", ".join(f"{origin} ({count} images)" for origin, count in counts.most_common())

    def _caption(self, epoch: int, row: int, choice: float) -> str:
        captions = self.captions[row]
        caption, keep = captions[int(choice * len(captions))], self.keep_tags
        draw = generator(self.seed, "caption", epoch, row)
        if torch.rand((), generator=draw) < self.caption_dropout:
            return ""
        if not self.shuffle_tags:
            return caption
        if self.trigger_word and caption.lower().startswith(self.trigger_word.lower()):
            keep = max(keep, len(self.trigger_word.split(",")))
        return shuffled(caption, keep, draw)

    def pixels(self, index: int, flipped: bool = False, place: float | None = None) -> torch.Tensor:
        """The image as the model takes it, cropped at `place` from 0 to 1 along the longer side, or at the centre."""
        return self._fitted(self.image(index), self.background, flipped, place)

    def mask(self, index: int) -> Image.Image:
        """What counts of an image, white, and what does not, black, as RGB of its size.

        That is its `mask_beside`, or else the image's own opacity. InputError.
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

    def _fitted(self, image: Image.Image, background: str, flipped: bool, place: float | None) -> torch.Tensor:
        if self.fit == "bucket":
            size = bucket_size(image.size, self.resolution, self.multiple)
            image = fit_image(image, size, "crop", background, self.interpolation)
        else:
            position = None if place is None else (place, place)
            image = fit_image(image, self.resolution, self.fit, background, self.interpolation, position)
        return to_tensor(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else image)

    def shape(self, index: int) -> tuple[int, int]:
        """Width and height of `pixels`."""
        if self.fit != "bucket":
            return self.resolution, self.resolution
        try:
            return bucket_size(self.sizes[self.rows[index]], self.resolution, self.multiple)
        except InputError as error:
            raise InputError(f"{self.name(index)}: {error}") from error


class LabelledImages(Images):
    """Images with classes, indexed by `(epoch, index)`; a sampler supplies the pairs.

    `data[epoch, index]` is `{"pixel_values": (3, resolution, resolution) in [-1, 1], "label": int, "name": str}`.
    With `augment`: torchvision's RandomResizedCrop and a horizontal flip (Seo 2025, Algorithm 1), which depend on the
    seed, the epoch and the item alone. Without: the middle seven eighths, as 224 out of 256.

    Args:
        sources, names, background, invert: see `Images`.
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
            draw = generator(self.seed, int(epoch), row)
            with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
                torch.random.default_generator.set_state(draw.get_state())
                top, left, height, width = self.random_crop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3))
                flip = torch.rand(()) < 0.5
            image = image.crop((left, top, left + width, top + height)).resize(size, Image.Resampling.BILINEAR)
            if flip:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        else:
            half, (x, y) = min(image.size) * 7 / 16, (side / 2 for side in image.size)
            image = image.resize(size, Image.Resampling.BILINEAR, box=(x - half, y - half, x + half, y + half))
        return {"pixel_values": to_tensor(image), "label": self._labels[row], "name": self.name(index)}
