"""Prompts, and the folder that keeps one picture for each."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path

from PIL import Image

from ..data.class_names import readable_class
from ..errors import InputError
from .tables import write_text

METADATA, SETTINGS = "metadata.jsonl", ".settings.json"
ADVICE = "delete the folder or choose another `output_dir`"


def read_prompts(path: str | Path) -> list[str]:
    """The lines of a text file that are not blank. InputError."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"`prompts` {path} cannot be read: {error}") from error
    if not (prompts := [line.strip() for line in lines if line.strip()]):
        raise InputError(f"`prompts` {path} holds no prompts")
    return prompts


def cycle_prompts(prompts: Sequence[str], count: int) -> list[tuple[str, int]]:
    """`count` prompts, over and over, each with how often it came before."""
    before = Counter()
    numbered = []
    for prompt in islice(cycle(prompts), count):
        numbered.append((prompt, before[prompt]))
        before[prompt] += 1
    return numbered


def open_folder(folder: Path, prompts: Sequence[tuple[str, int]], settings: dict) -> list[Path]:
    """Where the picture of each prompt goes, `00000.png` and so on, in a folder that `captioned_folder` reads.

    What is there stays if it was drawn with the same settings and prompts; InputError if not.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"`output_dir`: {folder} cannot be written to: {error.strerror}") from error
    saved = _read_settings(folder / SETTINGS) or settings
    for name in saved | settings:
        if (old := saved.get(name)) != (new := settings.get(name)):
            raise InputError(f"{folder} was drawn with {name}={old}, now it is {new}: choose another `output_dir`")
    captions = _read_captions(folder / METADATA)
    for old, (prompt, _) in zip(captions, prompts, strict=False):
        if old != prompt:
            raise InputError(
                f"{folder} has a picture of {old!r} where {prompt!r} belongs: choose another `output_dir`"
            )
    captions += [prompt for prompt, _ in prompts[len(captions) :]]
    lines = [json.dumps({"file_name": _name(index), "text": text}) for index, text in enumerate(captions)]
    for name, text in ((METADATA, "\n".join(lines) + "\n"), (SETTINGS, json.dumps(settings, indent=1))):
        write_text(folder / name, text)
    return [folder / _name(index) for index in range(len(prompts))]


def missing_pictures(paths: Sequence[Path], resolution: int) -> list[int]:
    """Positions of the pictures that are not there, damaged or of another size, and so have to be drawn."""
    missing = []
    for index, path in enumerate(paths):
        if os.path.isdir(path):
            raise InputError(f"{path} is a folder, where a picture belongs: {ADVICE}")
        try:
            with Image.open(path) as image:
                image.load()
                if image.size != (resolution, resolution):
                    missing.append(index)
        except (OSError, ValueError, SyntaxError):  # as Pillow says that a file is damaged
            missing.append(index)
    return missing


def find_classes(prompts: Sequence[str], classes: Sequence[str]) -> Iterator[set[int]]:
    """For each prompt the class that it names, of several the longest, as it is read: "hot dog" of "hot_dog".

    A set, since two classes may read alike; empty where no class is named.
    """
    readings: dict[str, set[int]] = {}
    for index, name in enumerate(classes):
        readings.setdefault(readable_class(name).casefold(), set()).add(index)
    names = sorted(readings, key=len, reverse=True)
    pattern = re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, names)) + r")(?!\w)")
    for prompt in prompts:
        named = pattern.findall(prompt.casefold())
        yield readings[max(named, key=len)] if named else set()


def _name(index: int) -> str:
    return f"{index:05}.png"


def _read_settings(path: Path) -> dict:
    if (text := _read(path)) is None:
        return {}
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}): {ADVICE}") from error
    if not isinstance(settings, dict):
        raise InputError(f"{path} does not hold the settings of a drawing: {ADVICE}")
    return settings


def _read_captions(path: Path) -> list[str]:
    """The prompt of each picture; InputError for what `open_folder` does not write."""
    captions = []
    for index, line in enumerate((_read(path) or "").splitlines()):
        try:
            row = json.loads(line)
            if row["file_name"] != _name(index) or not isinstance(row["text"], str):
                raise ValueError(f"expected the prompt of {_name(index)}")
        except (ValueError, RecursionError, TypeError, KeyError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise InputError(f"{path} line {index + 1} is damaged ({reason}): {ADVICE}") from error
        captions.append(row["text"])
    return captions


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{os.fspath(path)} cannot be read ({error}): {ADVICE}") from error
