"""Images by index: plain, captioned, labelled."""

import copy
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from ..errors import check_choice
from ..seeds import generator
from .images import INVERT, Source, fit_image, load_image, to_tensor
from .look import File, stat_file

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
        """The file that the image is in, if it is one of its own."""
        source = self.sources[self.rows[index]]
        if isinstance(source, dict) and source["bytes"] is None:
            source = source["path"]
        return stat_file(source) if isinstance(source, str | os.PathLike) else None

    def name(self, index: int) -> str:
        return self.names[self.rows[index]]

    def select(self: Kind, indices: Iterable[int]) -> Kind:
        """The items at `indices`; each keeps its identity and so its random draws."""
        subset = copy.copy(self)
        subset.rows = [self.rows[index] for index in indices]
        return subset


class CaptionedImages(Images):
    """Images with captions, indexed by `(epoch, index)`; a sampler supplies the pairs.

    `data[epoch, index]` is `{"pixel_values": (3, resolution, resolution) in [-1, 1], "caption": str, "name": str}`.
    The crop, the flip and the choice among several captions depend on the seed, the epoch and the item alone, so
    neither workers nor the number of processes nor a resumed run changes them.

    Where `moments` is set, to a function of index and flip, its result is there under this name; `with_pixels = False`
    then leaves the image unread.

    Args:
        sources, names, background, invert: see `Images`.
        captions: a caption or a list of captions for each image.
        center_crop: keep the centre of each image; otherwise a random place along the longer side.
        random_flip: mirror half of the images.
        resolution, fit, interpolation: see `fit_image`.
    """

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
        interpolation: str = "lanczos",
        background: str = "white",
        invert: str = "never",
        seed: int = 0,
    ):
        fit_image(Image.new("RGB", (1, 1)), resolution, fit, background, interpolation)  # a wrong option fails here
        super().__init__(sources, names, background, invert)
        self.captions = [[c] if isinstance(c, str) else list(c) for c in captions]
        self.resolution, self.fit, self.center_crop, self.random_flip = resolution, fit, center_crop, random_flip
        self.interpolation, self.seed = interpolation, seed
        self.moments: Callable[[int, bool], torch.Tensor] | None = None
        self.with_pixels = True

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        row = self.rows[index]
        # All three are drawn whatever the settings, so that switching one on leaves the others as they were.
        place, flip, choice = torch.rand(3, generator=generator(self.seed, int(epoch), row)).tolist()
        flipped = self.random_flip and flip < 0.5
        captions = self.captions[row]
        example: dict[str, Any] = {"caption": captions[int(choice * len(captions))], "name": self.name(index)}
        if self.moments is not None:
            example["moments"] = self.moments(index, flipped)
        if self.with_pixels:
            example["pixel_values"] = self.pixels(index, flipped, 0.5 if self.center_crop else place)
        return example

    def pixels(self, index: int, flipped: bool = False, place: float = 0.5) -> torch.Tensor:
        """The image as the model takes it; `place` is where a crop lies, from 0 to 1 along the longer side."""
        image = self.image(index)
        image = fit_image(image, self.resolution, self.fit, self.background, self.interpolation, (place, place))
        return to_tensor(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else image)


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
                top, left, height, width = RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3))
                flip = torch.rand(()) < 0.5
            image = image.crop((left, top, left + width, top + height)).resize(size, Image.Resampling.BILINEAR)
            if flip:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        else:
            half, (x, y) = min(image.size) * 7 / 16, (side / 2 for side in image.size)
            image = image.resize(size, Image.Resampling.BILINEAR, box=(x - half, y - half, x + half, y + half))
        return {"pixel_values": to_tensor(image), "label": self._labels[row], "name": self.name(index)}
