"""Pairs of photos and sketches: FS2K, CUFS, folders and lists."""

import csv
import json
import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath

from ..errors import InputError, first_line, first_names, shown
from .filenames import by_spelling, hint, match_name
from .folders import find_images, folders_in, read_text, walk, warn_about_links
from .metadata import csv_reader

logger = logging.getLogger(__name__)

ANNOTATIONS = {"train": "anno_train.json", "test": "anno_test.json"}
LIST = "pairs.csv"
EXPECTED = (
    f"Expected one of: FS2K ({', '.join(ANNOTATIONS.values())}, photo/, sketch/); CUFS (CUHK_student/, AR/ or"
    f" XM2VTS/ with photos/ and sketches/); photos/ and sketches/, or train/ and test/ with both; a {LIST} with the"
    " columns photo,sketch."
)
HOW_TO_PART = f"Add a {LIST} with a column part, or train/ and test/ folders with photos/ and sketches/ in each."
NO_PARTS = "%s is not divided into train and test: all of its pairs are used for training"
# CUHK_student/train/photos/1.jpg, AR/train_photos/1.jpg, CUFS/test_sketches/1.jpg, testing_sketch/1.jpg, photo/1.jpg
PAIRED_PATH = re.compile(
    r"(?:(?P<collection>CUHK[ _-]?student|CUHK|student|AR|XM2VTS|CUFS)/)?"
    r"(?:(?P<part>train|test)(?:ing)?[/ _-])?(?P<side>photo|sketch)(?:s|es)?/(?P<file>.+)",
    re.IGNORECASE | re.DOTALL,
)


@dataclass(frozen=True)
class Pairs:
    """Photos and their sketches, in lists of one length, sorted by name.

    Args:
        names: the photos' paths below the data's folder, with forward slashes, all different.
        layout: "FS2K", "CUFS", "folders" or "CSV".
        summary: one short phrase: "FS2K, test, style 3: 46 pairs".
    """

    photos: list[Path]
    sketches: list[Path]
    names: list[str]
    layout: str
    summary: str


def find_pairs(root: str | Path, part: str | None = None, style: int | None = None) -> Pairs:
    """Find the pairs in `root`, or in its only folder, as unzipping may leave it; hidden files are ignored.

    The layout is the first that matches:

    1. pairs.csv: columns photo and sketch, with paths below its folder, and optionally part.
    2. FS2K (Fan et al. 2022): its two annotation files define part and style, whatever the folder's number.
    3. CUFS (Wang and Tang 2009): a folder for each collection, or those of Face-Sketch-Wild (Chen et al. 2018).
    4. Photo and sketch folders, optionally in train and test folders.

    In 3 and 4 a sketch has its photo's folder and stem, or CUHK's: F2-005-01-sz1 is drawn after f-005-01.

    Args:
        part: "train" (everything, if the data is not divided) or "test"; None is both.
        style: 1, 2 or 3, for FS2K only; None is all.

    Raises InputError.
    """
    root = Path(root)
    inside = [root / name for name in folders_in(root)]
    folders = [root, *(inside if len(inside) == 1 else [])]
    if folder := _holding(folders, LIST):
        layout, pairs = "CSV", _listed(folder, part, root)
    elif folder := _holding(folders, *ANNOTATIONS.values()):
        layout, pairs = "FS2K", _annotated(folder, part, style, root)
    else:
        folder, layout, pairs = _twins(folders, part)
    if style is not None and layout != "FS2K":
        raise InputError(f"{folder} is not FS2K ({layout}) and has no styles: do not ask for one.")
    selection = ", ".join(filter(None, [layout, part, f"style {style}" if style else None]))
    if not pairs:
        raise InputError(f"there are no such pairs in {folder}: {selection}.")
    names = sorted(pairs)
    photos, sketches = [folder / name for name in names], [folder / pairs[name] for name in names]
    return Pairs(photos, sketches, names, layout, f"{selection}: {len(names)} pairs")


def _holding(folders: list[Path], *names: str) -> Path | None:
    return next((folder for folder in folders if any(os.path.isfile(folder / name) for name in names)), None)


def _listed(folder: Path, part: str | None, root: Path) -> dict[str, str]:
    pairs, path = {}, folder / LIST
    columns, rows = _read_list(path, root)
    known = by_spelling(walk(folder)[0])
    if part == "train" and "part" not in columns:
        logger.warning(NO_PARTS, shown(path))
        part = None
    if part and "part" not in columns:
        raise InputError(f"{shown(path)} does not say which pairs are for {part}. {HOW_TO_PART}")
    for line, row in rows:
        where = f"{shown(path)} line {line}"
        if None in row or None in row.values():
            raise InputError(f"{where} must have {len(columns)} cells, like the header.")
        if "part" in columns and row["part"] not in ANNOTATIONS:
            raise InputError(f"{where}: the part must be train or test, got {row['part']!r}.")
        photo, sketch = (_below(folder, row[side], where, known) for side in ("photo", "sketch"))
        if photo in pairs:
            raise InputError(f"{where} lists {shown(photo)} again: each photo must have one sketch.")
        pairs[photo] = sketch, row.get("part")
    warn_about_links(folder, [path for photo, (sketch, _) in pairs.items() for path in (photo, sketch)])
    return {photo: sketch for photo, (sketch, its_part) in pairs.items() if part in (None, its_part)}


def _read_list(path: Path, root: Path) -> tuple[list[str], list[tuple[int, dict]]]:
    """Return the columns, and (line number, row) of each pair."""
    reader = csv_reader(read_text(path, root), "photo")
    try:
        columns, rows = reader.fieldnames or [], [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise InputError(f"{path} line {reader.reader.line_num} is not CSV: {error}.") from error
    if not {"photo", "sketch"} <= set(columns):
        raise InputError(f"{path} must have the columns photo,sketch, found {', '.join(columns) or 'none'}.")
    return list(columns), rows


def _below(folder: Path, listed: str, where: str, known: dict[str, list[str]]) -> str:
    path = PurePath(listed)
    if path.anchor or ".." in path.parts:
        raise InputError(f"{where} must have paths below {folder}, got {listed!r}.")
    if match := match_name(path.as_posix(), known):
        return match
    suggestion = hint(path.as_posix(), known)
    raise InputError(f"{where} lists {listed!r}, but there is no such file in {folder}{suggestion}.")


def _annotated(folder: Path, part: str | None, style: int | None, root: Path) -> dict[str, str]:
    listed = {}
    for path in (folder / name for key, name in ANNOTATIONS.items() if part in (None, key)):
        for number, entry in enumerate(_entries(path, root), 1):
            if not (isinstance(entry, dict) and "image_name" in entry and entry.get("style") in (0, 1, 2)):
                raise InputError(
                    f"{path} entry {number} must have an image_name like photo1/image0110 and a style of 0, 1 or 2,"
                    f" got {str(entry)[:200]}."
                )
            if style in (None, entry["style"] + 1):
                photo = f"photo/{entry['image_name']}"
                listed[photo] = photo.replace("photo", "sketch").replace("image", "sketch")
    images = [f"{side}/{image}" for side in ("photo", "sketch") for image in find_images(folder / side)[1]]
    files = _index((PurePosixPath(image).with_suffix("").as_posix(), image) for image in images)
    if missing := [path for pair in listed.items() for path in pair if path not in files]:
        raise InputError(f"{_some(missing, 'listed images')} are not in {folder}: unpack the whole zip.")
    return {files[photo]: files[sketch] for photo, sketch in listed.items()}


def _entries(path: Path, root: Path) -> list:
    text = read_text(path, root)
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {first_line(error)}.") from error
    if not isinstance(entries, list):
        raise InputError(f"{path} must hold a list, like FS2K's.")
    return entries


def _twins(folders: list[Path], part: str | None) -> tuple[Path, str, dict[str, str]]:
    folder, matches = _photos_and_sketches(folders)
    if part == "train" and not any(match["part"] for match in matches):
        logger.warning(NO_PARTS, shown(folder))
        part = None
    if part and (unknown := [match.string for match in matches if not match["part"]]):
        raise InputError(f"{shown(unknown[0])} in {folder} is neither in train nor in test. {HOW_TO_PART}")
    matches = [match for match in matches if part in (None, (match["part"] or "").lower())]
    photos, sketches = (
        _index((_key(match), match.string) for match in matches if match["side"].lower() == side)
        for side in ("photo", "sketch")
    )
    if photos.keys() != sketches.keys():
        lone = _some([photos[key] for key in photos if key not in sketches], "photos without a sketch")
        lone += "; " + _some([sketches[key] for key in sketches if key not in photos], "sketches without a photo")
        raise InputError(f"{folder} has {lone}. Give both the same name, or list the pairs in a {LIST}.")
    layout = "CUFS" if any(match["collection"] for match in matches) else "folders"
    return folder, layout, {photos[key]: sketches[key] for key in photos}


def _photos_and_sketches(folders: list[Path]) -> tuple[Path, list[re.Match]]:
    """Return the first of the folders with photos and sketches, and a match of `PAIRED_PATH` for each of these."""
    root = folders[0]
    try:
        images = find_images(root)[1]
    except InputError as error:
        raise InputError(f"{error} {EXPECTED}") from error
    for folder in folders:
        prefix = folder.relative_to(root).as_posix() + "/"
        files = [image.removeprefix(prefix) for image in images]
        matches = [match for match in map(PAIRED_PATH.fullmatch, files) if match]
        if {match["side"].lower() for match in matches} != {"photo", "sketch"}:
            continue
        if stray := sorted(set(files) - {match.string for match in matches}):
            logger.warning("Not used, outside the photo and sketch folders of %s: %s", folder, _some(stray, "images"))
        return folder, matches
    parents = sorted({str(PurePosixPath(image).parent) for image in images})
    raise InputError(f"{root} has no known layout, found {_some(parents, 'folders with images')}. {EXPECTED}")


def _key(match: re.Match) -> tuple:
    """Return a key that a photo and its sketch share."""
    file = PurePosixPath(match["file"])
    stem = re.sub(r"[-_]sz\d+$", "", file.stem.lower())
    stem = re.sub(r"^([fm])2(?=[-_])", r"\1", stem)
    collection, part = ((match[group] or "").lower() for group in ("collection", "part"))
    return collection, part, file.parent, stem


def _some(names: list[str], noun: str) -> str:
    return f"{len(names)} {noun}" + (f": {first_names(names)}" if names else "")


def _index(paths: Iterable[tuple]) -> dict:
    index = {}
    for key, path in paths:
        if key in index:
            raise InputError(f"{shown(index[key])} and {shown(path)} have the same name: rename or remove one.")
        index[key] = path
    return index
