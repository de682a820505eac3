"""Photos and the sketches drawn after them: FS2K, CUFS, folders and lists of pairs."""

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
    f"Expected is one of: FS2K ({', '.join(ANNOTATIONS.values())}, photo/, sketch/); CUFS (CUHK_student/, AR/ or"
    f" XM2VTS/ with photos/ and sketches/); photos/ and sketches/, or train/ and test/ with both; a {LIST} with the"
    " columns photo,sketch."
)
HOW_TO_PART = f"A {LIST} with a column part, or train/ and test/ folders with photos/ and sketches/ each, would tell."
NO_PARTS = "%s is not divided into train and test: all of its pairs are for training"
# CUHK_student/train/photos/1.jpg, AR/train_photos/1.jpg, CUFS/test_sketches/1.jpg, testing_sketch/1.jpg, photo/1.jpg
PLACE = re.compile(
    r"(?:(?P<collection>CUHK[ _-]?student|CUHK|student|AR|XM2VTS|CUFS)/)?"
    r"(?:(?P<part>train|test)(?:ing)?[/ _-])?(?P<side>photo|sketch)(?:s|es)?/(?P<file>.+)",
    re.IGNORECASE | re.DOTALL,
)


@dataclass(frozen=True)
class Pairs:
    """Photos and their sketches, equally long and in the order of the names.

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
    """The pairs in `root`, or in its only folder, as a zip unpacks; hidden files are left out. The first that fits of:

    1. pairs.csv: the columns photo and sketch, paths below its folder, and perhaps part.
    2. FS2K (Fan et al. 2022): its two annotations tell the part and the style, whatever the folder's number.
    3. CUFS (Wang and Tang 2009): a folder for each collection, or those of Face-Sketch-Wild (Chen et al. 2018).
    4. Photo and sketch folders, perhaps in train and test folders.

    In 3 and 4 a sketch has its photo's place and stem, or CUHK's: F2-005-01-sz1 is drawn after f-005-01.

    Args:
        part: "train", which is all where nothing says what is for what, or "test"; None is both.
        style: 1, 2 or 3, of FS2K only; None is all.

    Raises InputError.
    """
    root = Path(root)
    inside = [root / name for name in folders_in(root)]
    places = [root, *(inside if len(inside) == 1 else [])]
    if folder := _holding(places, LIST):
        layout, pairs = "CSV", _listed(folder, part, root)
    elif folder := _holding(places, *ANNOTATIONS.values()):
        layout, pairs = "FS2K", _annotated(folder, part, style, root)
    else:
        folder, layout, pairs = _twins(places, part)
    if style is not None and layout != "FS2K":
        raise InputError(f"{folder} is not FS2K ({layout}) and has no styles: ask for no style.")
    what = ", ".join(filter(None, [layout, part, f"style {style}" if style else None]))
    if not pairs:
        raise InputError(f"there are no such pairs in {folder}: {what}.")
    names = sorted(pairs)
    photos, sketches = [folder / name for name in names], [folder / pairs[name] for name in names]
    return Pairs(photos, sketches, names, layout, f"{what}: {len(names)} pairs")


def _holding(places: list[Path], *names: str) -> Path | None:
    return next((place for place in places if any(os.path.isfile(place / name) for name in names)), None)


def _listed(folder: Path, part: str | None, root: Path) -> dict[str, str]:
    pairs, path = {}, folder / LIST
    columns, rows = _read_list(path, root)
    known = by_spelling(walk(folder)[0])
    if part == "train" and "part" not in columns:
        logger.warning(NO_PARTS, shown(path))
        part = None
    if part and "part" not in columns:
        raise InputError(f"{shown(path)} does not say what is for {part}. {HOW_TO_PART}")
    for line, row in rows:
        where = f"{shown(path)} line {line}"
        if None in row or None in row.values():
            raise InputError(f"{where} must have {len(columns)} cells, as the header has.")
        if "part" in columns and row["part"] not in ANNOTATIONS:
            raise InputError(f"{where}: the part must be train or test, got {row['part']!r}.")
        photo, sketch = (_below(folder, row[side], where, known) for side in ("photo", "sketch"))
        if photo in pairs:
            raise InputError(f"{where} lists {shown(photo)} again: a photo has one sketch.")
        pairs[photo] = sketch, row.get("part")
    warn_about_links(folder, [path for photo, (sketch, _) in pairs.items() for path in (photo, sketch)])
    return {photo: sketch for photo, (sketch, its_part) in pairs.items() if part in (None, its_part)}


def _read_list(path: Path, root: Path) -> tuple[list[str], list[tuple[int, dict]]]:
    """Columns, and (line, row) of each pair."""
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
    if found := match_name(path.as_posix(), known):
        return found
    near = hint(path.as_posix(), known)
    raise InputError(f"{where} lists {listed!r}, but there is no such file in {folder}{near}.")


def _annotated(folder: Path, part: str | None, style: int | None, root: Path) -> dict[str, str]:
    listed = {}
    for path in (folder / name for key, name in ANNOTATIONS.items() if part in (None, key)):
        for number, entry in enumerate(_entries(path, root), 1):
            if not (isinstance(entry, dict) and "image_name" in entry and entry.get("style") in (0, 1, 2)):
                raise InputError(
                    f"{path} entry {number} must have an image_name as photo1/image0110 and a style of 0, 1 or 2, got"
                    f" {str(entry)[:200]}."
                )
            if style in (None, entry["style"] + 1):
                photo = f"photo/{entry['image_name']}"
                listed[photo] = photo.replace("photo", "sketch").replace("image", "sketch")
    images = [f"{side}/{image}" for side in ("photo", "sketch") for image in find_images(folder / side)[1]]
    files = _index((PurePosixPath(image).with_suffix("").as_posix(), image) for image in images)
    if lost := [path for pair in listed.items() for path in pair if path not in files]:
        raise InputError(f"{_some(lost, 'listed images')} are not in {folder}: unpack the whole zip.")
    return {files[photo]: files[sketch] for photo, sketch in listed.items()}


def _entries(path: Path, root: Path) -> list:
    text = read_text(path, root)
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {first_line(error)}.") from error
    if not isinstance(entries, list):
        raise InputError(f"{path} must hold a list, as FS2K's does.")
    return entries


def _twins(places: list[Path], part: str | None) -> tuple[Path, str, dict[str, str]]:
    folder, used = _photos_and_sketches(places)
    if part == "train" and not any(place["part"] for place in used):
        logger.warning(NO_PARTS, shown(folder))
        part = None
    if part and (unknown := [place.string for place in used if not place["part"]]):
        raise InputError(f"{shown(unknown[0])} in {folder} is neither for train nor for test. {HOW_TO_PART}")
    used = [place for place in used if part in (None, (place["part"] or "").lower())]
    photos, sketches = (
        _index((_key(place), place.string) for place in used if place["side"].lower() == side)
        for side in ("photo", "sketch")
    )
    if photos.keys() != sketches.keys():
        lone = _some([photos[key] for key in photos if key not in sketches], "photos without a sketch")
        lone += "; " + _some([sketches[key] for key in sketches if key not in photos], "sketches without a photo")
        raise InputError(f"{folder} has {lone}. Twins have the same name; a {LIST} pairs any others.")
    layout = "CUFS" if any(place["collection"] for place in used) else "folders"
    return folder, layout, {photos[key]: sketches[key] for key in photos}


def _photos_and_sketches(places: list[Path]) -> tuple[Path, list[re.Match]]:
    """The first place with folders of both, and the images in them."""
    root = places[0]
    try:
        images = find_images(root)[1]
    except InputError as error:
        raise InputError(f"{error} {EXPECTED}") from error
    for folder in places:
        above = folder.relative_to(root).as_posix() + "/"
        files = [image.removeprefix(above) for image in images]
        used = [place for place in map(PLACE.fullmatch, files) if place]
        if {place["side"].lower() for place in used} != {"photo", "sketch"}:
            continue
        if stray := sorted(set(files) - {place.string for place in used}):
            logger.warning("Not used, outside the photo and sketch folders of %s: %s", folder, _some(stray, "images"))
        return folder, used
    folders = _some(sorted({str(PurePosixPath(image).parent) for image in images}), "folders with images")
    raise InputError(f"{root} has no layout that is known, found {folders}. {EXPECTED}")


def _key(place: re.Match) -> tuple:
    """What a photo and its sketch have in common."""
    file = PurePosixPath(place["file"])
    stem = re.sub(r"[-_]sz\d+$", "", file.stem.lower())
    stem = re.sub(r"^([fm])2(?=[-_])", r"\1", stem)
    collection, part = ((place[group] or "").lower() for group in ("collection", "part"))
    return collection, part, file.parent, stem


def _some(names: list[str], what: str) -> str:
    return f"{len(names)} {what}" + (f": {first_names(names)}" if names else "")


def _index(paths: Iterable[tuple]) -> dict:
    index = {}
    for key, path in paths:
        if key in index:
            raise InputError(f"{shown(index[key])} and {shown(path)} cannot be told apart: rename or remove one.")
        index[key] = path
    return index
