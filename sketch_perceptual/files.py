"""Atomic writing of files, and checks that outputs do not replace inputs."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from .errors import InputError

LOCK = ".sketch-perceptual.lock"  # in a folder that a training or a generation writes to
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")  # formats of figures
RESULT = b'{\n "task": '  # start of an evaluation's JSON, which another evaluation may replace anywhere


class Output(NamedTuple):
    """A file that will be written, with its allowed endings; or, without endings, a folder.

    Args:
        argument: names the path in messages.
    """

    argument: str
    path: str | Path
    endings: tuple[str, ...] = ()


CARD = "README.md"
OTHER_CARDS = ("MODEL_CARD.md", "MODEL_CARD-sketch-perceptual.md")  # beside a card that is not ours
MARK = "<!-- written by sketch-perceptual -->"  # in every card of ours, also those of networks/hub_model.py


@contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """Yield a folder to write to; at the end of the block its files are moved, one by one, atomically, to `folder`.

    A README.md goes to `card_path`.
    """
    folder = Path(folder)
    partial = folder / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    for path in files_in(partial):
        target = folder / path.relative_to(partial)
        target = card_path(folder) if target == folder / CARD else target
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    shutil.rmtree(partial)


def card_path(folder: str | Path) -> Path:
    """Return the path for a model card in `folder` that does not replace a card that is not ours."""
    for name in (CARD, *OTHER_CARDS):
        path = Path(folder, name)
        if not path.exists() or MARK.encode() in path.read_bytes():
            break
    return path


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def write_whole(path: str | Path, write: Callable[[Path], Any]) -> None:
    """Write `path` atomically: call `write` with a temporary path, then rename that file. InputError."""
    path = Path(path)
    stem = os.fsdecode(os.fsencode(path.stem)[:200])
    partial = path.with_name(f".{stem}.partial{path.suffix}")
    try:
        write(partial)
        os.replace(partial, path)
    except (OSError, ValueError) as error:  # ValueError: Pillow, for an image that the format cannot hold
        raise InputError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically, in UTF-8. InputError."""
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def check_outputs(outputs: Iterable[Output], inputs: Iterable[str | Path | None]) -> None:
    """InputError if an output would replace an input, or could not be written.

    An input is a file, a folder with all its contents, or a name on the Hub; symlinks and other spellings of a path
    count. Subfolders with a run's lock are not read.
    """
    outputs = list(outputs)
    paths = ((os.path.realpath(output.path), output) for output in outputs)
    existing = {file_id(path): output for path, output in paths if _is_kept(path)}
    for source in inputs if existing else ():
        for path in _read_from(Path(source)) if source else ():
            if output := existing.get(file_id(path)):
                raise InputError(
                    f"`{output.argument}` {output.path} would replace {path}, which is read: choose another name"
                )
    for output in outputs:
        if output.endings:
            check_target(*output)
            if not (folder := Path(output.path).parent).is_dir():
                raise InputError(f"`{output.argument}` {output.path} cannot be written: there is no folder {folder}")


def check_target(argument: str, path: str | Path, endings: tuple[str, ...]) -> None:
    """InputError if a file could not be written to `path`; called before its contents are computed."""
    path = Path(path)
    if path.suffix.lower() not in endings:
        raise InputError(f"`{argument}` {path} must end in {' or '.join(endings)}")
    if path.is_dir():
        raise InputError(f"`{argument}` {path} cannot be written: it is a folder")
    if path.exists() and not path.is_file():
        raise InputError(f"`{argument}` {path} cannot be written: it is not a regular file")
    check_folder(argument, path.parent)


def check_folder(argument: str, folder: str | Path) -> None:
    """InputError if `folder` is not writable or cannot be created."""
    real = Path(os.path.realpath(folder))
    nearest = next(path for path in (real, *real.parents) if os.path.exists(path))
    if not nearest.is_dir():
        raise InputError(f"`{argument}` {folder} cannot be written to: {nearest} is not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"`{argument}` {folder} cannot be written to: nothing can be written in {nearest}")


def file_id(path: str | Path) -> tuple[int, int]:
    """Return an identity that all spellings of a path and all links to a file share."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _is_kept(path: str | Path) -> bool:
    """Return whether there is a folder or file at `path`, except an evaluation's result, which may be replaced."""
    if not os.path.isfile(path):
        return os.path.isdir(path)
    try:
        with open(path, "rb") as file:
            return file.read(len(RESULT)) != RESULT
    except OSError:
        return True


def _read_from(source: Path) -> Iterator[Path]:
    """Yield an existing input and, if it is a folder, all files in it and its subfolders with files."""
    if os.path.exists(source):
        yield source
        if source.is_dir():
            yield from _in_folder(source, {file_id(source)})


def _in_folder(folder: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
    try:
        paths = sorted(folder.iterdir())
    except OSError:  # reading the folder will raise it
        return
    for path in paths:
        if not os.path.exists(path):  # a broken link
            continue
        if not os.path.isdir(path):
            yield path
        elif (identity := file_id(path)) not in seen and not os.path.exists(path / LOCK):
            seen.add(identity)
            inside = _in_folder(path, seen)
            if (first := next(inside, None)) is not None:
                yield from (path, first)
                yield from inside
