"""List a folder's images, and read its text files without following symlinks out of it."""

import codecs
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from PIL import Image

from ..errors import InputError, first_names, shown
from ..files import LOCK

logger = logging.getLogger(__name__)

METADATA = ("metadata.csv", "metadata.jsonl")
MASKS = "mask"  # a folder beside the images
# Files that OneTrainer keeps beside NAME.*: a mask and a condition image.
MASK_FILE, CONDITION_FILE = "{}-masklabel.png", "{}-condlabel.png"
TEXTS = set(".txt .caption .cap .tags .json .jsonl .ndjson .csv .tsv .parquet .xlsx .xls .ods .yaml .yml .xml".split())
# Left behind by file managers and network disks, as are names with a leading dot.
NOT_DATA = {
    *("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "$recycle.bin", "recycler", "lost+found"),
    *("system volume information", "network trash folder", "temporary items", "__pycache__"),
    *("@eadir", "@recycle", "@recently-snapshot", "@tmp", "#recycle", "#snapshot"),
}
# Pillow opens these but does not read them; of PSD it reads a preview, which may be blank.
NOT_READ = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF", "PSD"}
PICTURES = set(  # formats that Pillow cannot read, or only with a plugin
    """.svg .svgz .heic .heif .hif .avif .jxl .jxr .wdp .bpg .exr .hdr .dng .cr2 .cr3 .crw .nef .nrw .arw .orf .rw2
    .raf .pef .srw .psd .psb .kra .xcf .clip .lip .mdp .sai .sai2 .procreate .ora .afphoto .afdesign .ai .pdf .cdr .wmf
    .emf .odg .vsdx .djvu .djv .dwg .dxf .sketch .fig""".split()
)


def find_images(root: Path, argument: str = "") -> tuple[list[str], list[str]]:
    """Return all files and the images among them, as sorted paths below `root` with forward slashes.

    Hidden files and folders are left out. So are pipes, sockets, devices, pictures that Pillow cannot read, and masks
    and condition images of other images; these are logged. Symlinks are followed; images outside of `root` are logged.
    `argument` begins the message of an InputError.
    """
    before = f"{argument}: " if argument else ""
    files, others = walk(root, before)
    kinds = Image.registered_extensions().items()
    openable = {ending for ending, kind in kinds if kind in Image.OPEN and kind not in NOT_READ}
    images = [file for file in files if ending_of(file) in openable]
    if others:
        logger.warning("Skipped in %s, neither files nor folders: %s", root, first_names(others))
    unread = [file for file in files if ending_of(file) in PICTURES - openable]
    companions = {path for image in [*images, *unread] for path in _companions(PurePosixPath(image))} & set(images)
    images = [image for image in images if image not in companions]
    advice = f"{len(unread)} pictures, convert them to PNG: {first_names(unread)}"
    if not images:
        raise InputError(f"{before}there are no images in {root}." + (f" Not read: {advice}." if unread else ""))
    if unread:
        logger.warning("Not read in %s: %s", root, advice)
    if companions:
        logger.warning(
            "Not among the images of %s, %d masks or condition images of others: %s",
            root,
            len(companions),
            first_names(sorted(companions)),
        )
    warn_about_links(root, images)
    _warn_about_leftovers(root, files, [*images, *companions])
    return files, images


def is_mask(image: str) -> bool:
    """Return whether a path below the root is a mask: in a folder `mask` beside an image."""
    return PurePosixPath(image).parent.name == MASKS


def mask_beside(image: Path) -> Path | None:
    """Return the mask of an image: the first that exists of mask/NAME, mask/STEM.png and STEM-masklabel.png."""
    return next((path for path in map(Path, _masks(image)) if os.path.lexists(path)), None)


def is_inside(path: Path, root: Path) -> bool:
    """Return whether a path lies below a folder once all symlinks are resolved."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def read_text(path: Path, root: Path) -> str:
    """Return the text of a UTF-8 file below `root`; InputError, also for a symlink to a file outside of `root`."""
    name = shown(path)
    if os.path.islink(path) and not os.path.exists(path):
        raise InputError(f"{name} is a link to {shown(os.readlink(path))}, which does not exist or cannot be read.")
    if not is_inside(path, root):
        raise InputError(
            f"{name} is a link to a file outside of {root}, where only images are read: copy it into the folder."
        )
    try:
        with path.open("rb") as file:
            is_utf16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        return path.read_text(encoding="utf-16" if is_utf16 else "utf-8-sig")  # spreadsheets write byte order marks
    except UnicodeError as error:
        raise InputError(f"{name} is not UTF-8 text: save it as UTF-8.") from error
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}.") from error


def ending_of(file: str) -> str:
    return PurePosixPath(file).suffix.lower()


def warn_about_links(root: Path, images: Iterable[str]) -> None:
    """Log the images that lie outside of `root`."""
    if linked := [image for image in images if not is_inside(root / image, root)]:
        logger.warning("%d images of %s are links to files elsewhere: %s", len(linked), root, first_names(linked))


def is_visible(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in NOT_DATA


def _masks(image: PurePosixPath | Path) -> Iterator[PurePosixPath | Path]:
    """Yield the possible paths of an image's mask."""
    yield image.parent / MASKS / image.name
    yield image.parent / MASKS / f"{image.stem}.png"
    yield image.with_name(MASK_FILE.format(image.stem))


def _companions(image: PurePosixPath) -> Iterator[str]:
    """Yield the paths of files beside an image that belong to it."""
    yield from map(str, _masks(image))
    yield str(image.with_name(CONDITION_FILE.format(image.stem)))


def walk(root: Path, before: str = "") -> tuple[list[str], list[str]]:
    """Return files, and entries that are neither files nor folders, as sorted paths below `root`.

    InputError for a folder that cannot be read.
    """
    files, others, seen, todo = [], [], set(), [""]
    while todo:
        folder = todo.pop()
        real = os.path.realpath(root / folder)
        if real in seen:  # a loop of links would repeat its images some forty times
            raise InputError(f"{before}{shown(root / folder)} links to a folder that is already read: remove it.")
        seen.add(real)
        try:
            entries = [entry for entry in os.scandir(root / folder) if is_visible(entry.name)]
        except OSError as error:
            raise InputError(f"{before}cannot read the folder {shown(error.filename)}: {error.strerror}.") from error
        for entry in entries:
            name = folder + entry.name
            is_folder = _is_folder(entry)
            if is_folder and os.path.exists(root / name / LOCK):
                logger.warning("Not read, because a training or a generation writes there: %s", shown(root / name))
            elif is_folder:
                todo.append(f"{name}/")
            else:  # a broken link counts as a file; reading it raises the error
                (files if not os.path.exists(entry) or entry.is_file() else others).append(name)
    return sorted(files), sorted(others)


def folders_in(root: Path) -> list[str]:
    """Return the names of the visible folders in `root`; none if it cannot be read."""
    try:
        return sorted(entry.name for entry in os.scandir(root) if is_visible(entry.name) and _is_folder(entry))
    except OSError:
        return []


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link into a folder without permission
        return False


def _warn_about_leftovers(root: Path, files: list[str], images: list[str]) -> None:
    used = {image.split("/")[0] for image in images}
    for folder in folders_in(root):
        if folder not in used and not (root / folder / LOCK).exists():
            logger.warning("The folder %s holds no images.", shown(root / folder))
    stems = {PurePosixPath(image).stem for image in images}
    known = TEXTS | PICTURES  # reported elsewhere: unread pictures above, unread texts with the captions
    stray = [f for f in files if "/" not in f and PurePosixPath(f).stem not in stems and ending_of(f) not in known]
    if any("/" in image for image in images) and stray:
        logger.warning("Not used, beside the folders of %s: %s", root, first_names(stray))
