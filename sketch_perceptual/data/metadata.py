"""Captions from metadata.csv and metadata.jsonl."""

import csv
import io
import json
import posixpath
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError, complain, first_line, first_names, shown
from .filenames import by_spelling, check_unicode, hint, match_name
from .folders import METADATA, read_text

# Spellings of a missing value.
MISSING = {"", "nan", "-nan", "none", "null", "n/a", "na", "#n/a", "#na", "<na>", "undefined"}


def read_metadata(
    root: Path, files: Sequence[str], images: Sequence[str], column: str
) -> tuple[dict[str, list[str]], list[str]]:
    """Return captions by image path, and a description of each metadata file; InputError."""
    captions, descriptions, known = {}, [], by_spelling(images)
    for file in (file for file in files if posixpath.basename(file) in METADATA):
        rows = list(_read_rows(root / file, root))
        columns = ", ".join(sorted({key for _, row in rows for key in row})) or "none"
        descriptions.append(f"{file} has the columns {columns}")
        path, bad = shown(root / file), []
        if not any(column in row for _, row in rows):
            complain(f"{path} has no column {column!r}, `caption_column` can be one of: {columns}.")
        for line, row in rows:
            where = f"{path} line {line}"
            try:
                image = _image_of(row, file, where, columns, known, files)
                captions.setdefault(image, []).extend(as_captions(row.get(column), where))
            except InputError as error:
                bad.append(str(error))
        if bad:
            complain(first_names(bad, "\n"))
    return captions, descriptions


def as_captions(value: Any, where: str) -> list[str]:
    """Return the captions in a cell, a string or a list of strings, without those that are missing."""
    values = value if isinstance(value, list) else [value]
    for caption in values:
        if not (caption is None or isinstance(caption, str) or caption != caption):
            raise InputError(
                f"{where}: a caption must be a string or a list of strings, got {str(caption)[:80]}: choose another"
                " `caption_column`."
            )
    return [check_unicode(text, where) for text in values if isinstance(text, str) and is_caption(text)]


def is_caption(text: str) -> bool:
    """Return whether a text is a caption, not a missing value such as "", "nan" or "NULL"."""
    return text.strip().casefold() not in MISSING


def csv_reader(text: str, column: str) -> csv.DictReader:
    """Return a reader of CSV with `column` in its header, separated by commas, semicolons or tabs."""
    header = text.partition("\n")[0]
    delimiter = next((mark for mark in ",;\t" if column in _cells(header, mark)), ",")
    reader = csv.DictReader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True, strict=True)
    reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
    return reader


def _cells(line: str, delimiter: str) -> list[str]:
    return [cell.strip(' "') for cell in line.split(delimiter)]


def _image_of(
    row: dict, file: str, where: str, columns: str, known: dict[str, list[str]], files: Sequence[str]
) -> str:
    listed = row.get("file_name")
    if not (isinstance(listed, str) and listed):
        raise InputError(f"{where} has no file_name, the path of an image; its columns are {columns}.")
    image = posixpath.normpath(posixpath.join(posixpath.dirname(file), listed))
    if image.startswith(("/", "../")):
        raise InputError(f"{where} lists {shown(listed)}, which is outside of the folder.")
    if match := match_name(image, known):
        return match
    if match_name(image, by_spelling(files)):
        raise InputError(
            f"{where} lists {shown(listed)}, which is not read as an image: convert it to PNG, or remove the line if"
            " it is the mask of another image."
        )
    raise InputError(f"{where} lists {shown(listed)}, but there is no such image{hint(image, files)}.")


def _read_rows(path: Path, root: Path) -> Iterator[tuple[int, dict]]:
    """Yield (line number, row) of a .csv or .jsonl file."""
    return (_csv_rows if path.suffix == ".csv" else _json_rows)(path, read_text(path, root))


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict]]:
    try:
        reader = csv_reader(text, "file_name")
        for row in reader:
            if None in row:
                raise InputError(
                    f"{path} line {reader.line_num} has more cells than the header: put its caption in quotes."
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise InputError(f"{path} line {reader.reader.line_num} is not CSV: {error}.") from error


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, dict]]:
    for line, entry in enumerate(text.split("\n"), 1):
        if not entry.strip():
            continue
        try:
            row = json.loads(entry)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} line {line} is not JSON: {first_line(error)}.") from error
        if not isinstance(row, dict):
            raise InputError(f"{path} line {line} is not a JSON object: each line must be one.")
        yield line, row
