"""Images from folders and `datasets`: found, captioned, checked before training."""

import copy
import csv
import functools
import hashlib
import io
import json
import logging
import os
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageStat
from tqdm import tqdm

from .errors import InputError
from .images import Source, check_choice, fit_image, load_image, to_tensor

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

CAPTION_TEMPLATE = "a sketch of a {class}"
METADATA = ("metadata.csv", "metadata.jsonl")
NOT_DATA = ("__MACOSX", "Thumbs.db", "desktop.ini")  # left by file managers, like all names with a leading dot


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by `key` alone: the same draws in any process, in any order, after any resume."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))


@functools.cache
def imagenet_classes() -> dict[str, str]:
    """The 1000 classes of ImageNet in their order: "n01440764" -> "tench, Tinca tinca" (WordNet 3.0's synonyms)."""
    lines = (Path(__file__).parent / "imagenet_synsets.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split(" ", 1) for line in lines)


def readable_class(name: str) -> str:
    """What people call a class: "n01440764" and "tench, Tinca tinca" -> "tench", "hot_dog" -> "hot dog".

    "t-shirt" stays as it is. Two classes may both read "crane", so the folder or label is what tells them apart.
    """
    name = imagenet_classes().get(name, name)
    return name.split(",")[0].replace("_", " ").strip() or name


class Images(torch.utils.data.Dataset):
    """Images by index, read when asked for; `select` keeps some.

    Args:
        sources: what `load_image` takes: a list of paths or a column of a `datasets.Dataset`.
        names: what messages call each image.
        background: see `load_image`.
    """

    fit: str | None = None

    def __init__(self, sources: Sequence[Source], names: Sequence[str], background: str = "white"):
        self.sources, self.names, self.background = sources, names, background
        self.rows: Sequence[int] = range(len(sources))  # a row is the item's identity and survives `select`

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, index: int) -> Image.Image:
        """The whole image as RGB; InputError naming it if it cannot be read."""
        return load_image(self.sources[self.rows[index]], self.background, self.name(index))

    def name(self, index: int) -> str:
        return self.names[self.rows[index]]

    def select(self, indices: Iterable[int]):
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
        sources, names, background: see `Images`.
        captions: a caption or a list of captions for each image.
        center_crop: keep the centre of each image; otherwise a random place along the longer side.
        random_flip: mirror half of the images.
        resolution, fit, interpolation: see `fit_image`.
    """

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
        seed: int = 0,
    ):
        fit_image(Image.new("RGB", (1, 1)), resolution, fit, background, interpolation)  # a wrong option fails here
        super().__init__(sources, names, background)
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
        example = {"caption": captions[int(choice * len(captions))], "name": self.name(index)}
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


def captioned_folder(
    root: str | os.PathLike,
    *,
    caption_column: str = "text",
    caption_template: str = CAPTION_TEMPLATE,
    default_caption: str | None = None,
    on_missing_caption: str = "error",
    **transform,
) -> CaptionedImages:
    """The images under `root`, in the order of their paths. The caption of each comes from, in this order:

    1. `caption_column` of a metadata.csv or metadata.jsonl in any folder, beside the column `file_name` (relative
       to the metadata file). In JSON it may be a list; an image on several lines has several captions.
    2. A .txt file of the same stem: one caption a line.
    3. The first-level folder through `caption_template`, if there is no metadata: the images/ beside a
       metadata.csv is no class.

    `default_caption` is the caption of every image if none has one. If only some lack one, `on_missing_caption`
    decides: "error", "skip" those images, or "default" to give them `default_caption`.
    `transform` are the keywords of `CaptionedImages`. Raises InputError.
    """
    _check_caption_options(caption_template, default_caption, on_missing_caption)
    root = Path(root)
    files, images = find_images(root)
    listed, found = _metadata_captions(root, files, images, caption_column)
    texts = {file for file in files if file.endswith(".txt")}
    origins, captions = Counter(), []
    for image in images:
        text = PurePosixPath(image).with_suffix(".txt").as_posix()
        if listed.get(image):
            origin, caption = "metadata", listed[image]
        elif text in texts:
            origin, caption = ".txt files", _lines(root / text)
        elif not found and "/" in image:
            origin, caption = "class folders", [_class_caption(caption_template, image.split("/")[0])]
        else:
            origin, caption = "nowhere", []
        origins[origin] += 1
        captions.append(caption)
    found += [f"captions from {origin}: {count}" for origin, count in origins.items()]
    logger.info("%s: %s; the first caption is %s", root, "; ".join(found), captions[0])
    names = [str(root / image) for image in images]
    data = CaptionedImages([root / image for image in images], names, captions, **transform)
    return _settle_missing(data, "; ".join(found), default_caption, on_missing_caption)


def captioned_dataset(
    dataset: "datasets.Dataset",
    *,
    name: str,
    image_column: str = "image",
    caption_column: str = "text",
    caption_template: str = CAPTION_TEMPLATE,
    default_caption: str | None = None,
    on_missing_caption: str = "error",
    **transform,
) -> CaptionedImages:
    """The rows of a `datasets.Dataset`, images decoded by `load_image` when asked for.

    `caption_column` holds strings, lists of strings, or a ClassLabel, which goes through `caption_template`. If
    there is no such column but exactly one ClassLabel, that one is taken, with a warning. `name` is what messages
    call the data set; the other arguments are those of `captioned_folder`. Raises InputError.
    """
    import datasets

    _check_caption_options(caption_template, default_caption, on_missing_caption)
    columns = ", ".join(dataset.column_names)
    sources, names = image_column_of(dataset, name, image_column)
    dataset = dataset.with_format(None)
    labels = [c for c, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)]
    if caption_column not in dataset.column_names and len(labels) == 1:
        logger.warning("%s has no column %r: its captions name the class in %r.", name, caption_column, labels[0])
        caption_column = labels[0]
    if caption_column in dataset.column_names:
        captions = _column_captions(dataset, caption_column, caption_template, names)
    elif dataset.column_names == [image_column]:
        captions = [[]] * len(dataset)
    else:
        raise InputError(f"{name} has no column {caption_column!r}, set --caption_column to one of: {columns}.")
    data = CaptionedImages(sources, names, captions, **transform)
    return _settle_missing(data, f"columns {columns}", default_caption, on_missing_caption)


def load_rows(
    name: str, config: str | None = None, data_dir: str | None = None, cache_dir: str | None = None
) -> "datasets.Dataset":
    """The "train" rows of a data set of the Hub or of a folder that `datasets` reads or has written. InputError."""
    import datasets

    try:
        if Path(name, "state.json").is_file() or Path(name, "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(name)
        else:
            rows = datasets.load_dataset(name, config, cache_dir=cache_dir, data_dir=data_dir)
    except (OSError, ValueError, RuntimeError) as error:
        advice = ""
        if "scripts are no longer supported" in str(error):
            advice = " Download its files and pass their folder: ImageNet-Sketch's zip unpacks to --train_data_dir."
        raise InputError(f"--dataset_name {name} cannot be loaded: {error}.{advice}") from error
    if isinstance(rows, datasets.Dataset):
        return rows
    if "train" not in rows:
        raise InputError(f'--dataset_name {name} has no split "train", only {", ".join(rows)}')
    if len(rows) > 1:
        logger.info('%s: only its split "train" is read, of %s', name, ", ".join(rows))
    return rows["train"]


def image_column_of(dataset: "datasets.Dataset", name: str, column: str) -> tuple[Sequence[Source], list[str]]:
    """The undecoded images of a column and what messages call them."""
    import datasets

    if column not in dataset.column_names:
        columns = ", ".join(dataset.column_names)
        raise InputError(f"{name} has no column {column!r}, set --image_column to one of: {columns}.")
    try:
        undecoded = dataset.with_format(None).cast_column(column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise InputError(f"The column {column!r} of {name} holds no images, set --image_column.") from error
    return undecoded[column], [f"row {row} of {name}" for row in range(len(dataset))]


def find_images(root: Path, option: str = "--train_data_dir") -> tuple[list[str], list[str]]:
    """All files and the images among them, as sorted paths below `root`; hidden ones are left out. InputError."""
    files = _visible_files(root, option)
    openable = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    images = [file for file in files if PurePosixPath(file).suffix.lower() in openable]
    if not images:
        raise InputError(f"{option}: there are no images in {root}.")
    _warn_about_leftovers(root, files, images)
    return files, images


@dataclass(frozen=True)
class Scan:
    """What `scan` found: positions in the scanned data, small enough to send to other processes.

    Args:
        bad: position and message of each image that cannot be read.
        blank: positions of near-constant images.
        cut: how many images lose more than a tenth of their area to cropping.
        summary: the same in two or three short phrases, with the first names.
    """

    bad: list[tuple[int, str]]
    blank: list[int]
    cut: int
    summary: str


def scan(data: Images, visit: Callable[[int, Image.Image], None] | None = None, workers: int = 8) -> Scan:
    """Reads every image once, in threads, so that a damaged file is found before training and not in step 9000.

    `visit` is called with the index and the RGB image of each that can be read.
    """
    with ThreadPoolExecutor(workers) as pool:
        checks = pool.map(lambda index: _check_image(data, index, visit), range(len(data)))
        checks = list(tqdm(checks, "Checking images", len(data), disable=None))
    bad = [(index, message) for index, (message, _, _) in enumerate(checks) if message]
    blank = [index for index, (_, is_blank, _) in enumerate(checks) if is_blank]
    cut = sum(is_cut for _, _, is_cut in checks)
    lines = [f"{len(data)} images"]
    if bad:
        lines.append(f"unreadable: {len(bad)}")
    if blank:
        names = _first([data.name(index) for index in blank])
        lines.append(f"near-constant: {len(blank)}, perhaps their transparency was lost ({names})")
    if cut:
        lines.append(f"losing more than a tenth of their area to cropping: {cut}, --fit pad keeps them whole")
    return Scan(bad, blank, cut, "; ".join(lines))


def drop_bad(data: Images, scan: Scan, on_bad_image: str) -> Images:
    """`data` without the unreadable images of its `scan`.

    `on_bad_image` is "error" (any of them raises one InputError that lists the first ten) or "skip" (they are
    logged). InputError too if no image is left.
    """
    check_choice("--on_bad_image", on_bad_image, ("error", "skip"))
    bad = {index for index, _ in scan.bad}
    good = [index for index in range(len(data)) if index not in bad]
    report = f"{len(bad)} of {len(data)} images cannot be read.\n" + _first([m for _, m in scan.bad], "\n")
    if not good:
        raise InputError(f"No image is left: {report}")
    if bad and on_bad_image == "error":
        raise InputError(f"{report}\n--on_bad_image skip goes on with the other {len(good)}.")
    if bad:
        logger.warning("Skipped: %s", report)
    return data.select(good)


def _check_image(data: Images, index: int, visit: Callable | None) -> tuple[str | None, bool, bool]:
    """(message if unreadable, near-constant?, loses more than a tenth to cropping?)"""
    try:
        image = data.image(index)
    except InputError as error:
        return str(error), False, False
    if visit is not None:
        visit(index, image)
    # A few specks or JPEG noise do not make a drawing: 0.01 % black ink on white already deviates by 2.5.
    is_blank = max(ImageStat.Stat(image).stddev) < 2
    return None, is_blank, data.fit == "crop" and min(image.size) < 0.9 * max(image.size)


def _visible_files(root: Path, option: str) -> list[str]:
    """Paths below `root` with forward slashes, sorted; an unreadable folder is an error."""

    def fail(error: OSError):
        raise InputError(f"{option}: cannot read the folder {error.filename}: {error.strerror}.")

    paths, seen = [], set()
    for folder, folders, files in os.walk(root, onerror=fail, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a loop of links would repeat its images some forty times
            raise InputError(f"{option}: {folder} links to a folder that is read already.")
        seen.add(real)
        folders[:] = filter(_is_visible, folders)
        paths += [Path(folder, file).relative_to(root).as_posix() for file in filter(_is_visible, files)]
    return sorted(paths)


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name not in NOT_DATA


def _warn_about_leftovers(root: Path, files: list[str], images: list[str]) -> None:
    used = {image.split("/")[0] for image in images}
    for folder in sorted(path.name for path in root.iterdir() if path.is_dir() and _is_visible(path.name)):
        if folder not in used:
            logger.warning("The folder %s holds no images.", root / folder)
    stems = {PurePosixPath(image).stem for image in images}
    stray = [f for f in files if "/" not in f and not (f in METADATA or PurePosixPath(f).stem in stems)]
    if any("/" in image for image in images) and stray:
        logger.warning("Not used, beside the folders of %s: %s", root, _first(stray))


def _metadata_captions(
    root: Path, files: list[str], images: list[str], column: str
) -> tuple[dict[str, list[str]], list[str]]:
    """Captions by image path, and a description of each metadata file found."""
    captions, found, known = {}, [], set(images)
    for file in (file for file in files if posixpath.basename(file) in METADATA):
        rows = list(_metadata_rows(root / file))
        columns = ", ".join(sorted({key for _, row in rows for key in row})) or "none"
        found.append(f"{file} has the columns {columns}")
        if not any(column in row for _, row in rows):
            raise InputError(f"{root / file} has no column {column!r}, set --caption_column to one of: {columns}.")
        for line, row in rows:
            where = f"{root / file} line {line}"
            listed = row.get("file_name")
            if not (isinstance(listed, str) and listed):
                raise InputError(f"{where} has no file_name; its columns are {columns}.")
            image = posixpath.normpath(posixpath.join(posixpath.dirname(file), listed))
            if image.startswith(("/", "../")):
                raise InputError(f"{where} leaves the folder: {listed}.")
            if image not in known:
                raise InputError(f"{where} lists {listed}, but there is no such image.")
            captions.setdefault(image, []).extend(_as_captions(row.get(column), where))
    return captions, found


def _metadata_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """(line, columns) of a .csv or .jsonl file."""
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(_read_text(path)), strict=True)
        try:
            for row in reader:
                if None in row:
                    raise InputError(f"{path} line {reader.line_num} has more cells than the header.")
                yield reader.line_num, row
        except csv.Error as error:
            raise InputError(f"{path} line {reader.reader.line_num} is not CSV: {error}.") from error
        return
    for line, text in enumerate(_read_text(path).split("\n"), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{path} line {line} is not JSON: {error.msg}.") from error
        if not isinstance(row, dict):
            raise InputError(f"{path} line {line} is not a JSON object.")
        yield line, row


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text.") from error


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in _read_text(path).split("\n") if line.strip()]


def _column_captions(dataset: "datasets.Dataset", column: str, template: str, names: list[str]) -> list[list[str]]:
    values, feature = dataset[column][:], dataset.features[column]
    if hasattr(feature, "names"):
        captions = [_class_caption(template, name) for name in feature.names]
        return [[] if label is None or label < 0 else [captions[label]] for label in values]  # -1: unlabelled
    return [_as_captions(value, name) for value, name in zip(values, names, strict=True)]


def _as_captions(value: Any, where: str) -> list[str]:
    values = value if isinstance(value, list) else [value]
    for caption in values:
        if not (caption is None or isinstance(caption, str)):
            raise InputError(f"{where}: a caption must be a string or a list of strings, got {caption!r}.")
    return [caption for caption in values if caption and caption.strip()]


def _class_caption(template: str, name: str) -> str:
    return template.replace("{class}", readable_class(name))


def _settle_missing(
    data: CaptionedImages, found: str, default_caption: str | None, on_missing_caption: str
) -> CaptionedImages:
    missing = [index for index, captions in enumerate(data.captions) if not captions]
    if not missing:
        return data
    names = _first([data.name(index) for index in missing])
    report = f"{len(missing)} of {len(data)} images have no caption: {names}. Found: {found}."
    if default_caption is not None and (on_missing_caption == "default" or len(missing) == len(data)):
        logger.warning("%s They get %r.", report, default_caption)
        data.captions = [captions or [default_caption] for captions in data.captions]
        return data
    if on_missing_caption == "error" or len(missing) == len(data):
        raise InputError(
            f"{report} Set --caption_column, --caption_template or --default_caption to caption them, or "
            "--on_missing_caption to skip or default."
        )
    logger.warning("%s They are skipped.", report)
    return data.select(index for index, captions in enumerate(data.captions) if captions)


def _check_caption_options(template: str, default_caption: str | None, on_missing_caption: str) -> None:
    check_choice("--on_missing_caption", on_missing_caption, ("error", "skip", "default"))
    if "{class}" not in template:
        raise InputError(f"--caption_template must contain {{class}}, got {template!r}.")
    if on_missing_caption == "default" and default_caption is None:
        raise InputError("--on_missing_caption default needs a --default_caption.")


def _first(names: list[str], separator: str = ", ", count: int = 10) -> str:
    more = f"{separator}and {len(names) - count} more" if len(names) > count else ""
    return separator.join(names[:count]) + more
