"""Prompts, and the folder with a picture for each."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

from PIL import Image

from ..errors import InputError
from ..files import write_text

METADATA, SETTINGS = "metadata.jsonl", ".settings.json"
ADVICE = "delete the folder or choose another `output_dir`"


def read_prompts(path: str | Path) -> list[str]:
    """Return the lines of a text file that are not blank; InputError if there are none."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"`prompts` {path} cannot be read: {error}") from error
    if not (prompts := [line.strip() for line in lines if line.strip()]):
        raise InputError(f"`prompts` {path} contains no prompts")
    return prompts


def cycle_prompts(prompts: Sequence[str], count: int) -> list[tuple[str, int]]:
    """Repeat the prompts up to `count`, each with the number of times it occurred before."""
    before = Counter()
    numbered = []
    for prompt in islice(cycle(prompts), count):
        numbered.append((prompt, before[prompt]))
        before[prompt] += 1
    return numbered


def open_folder(folder: Path, prompts: Sequence[tuple[str, int]], settings: dict) -> list[Path]:
    """Return the path of each prompt's picture, `00000.png` and so on, in a folder that `captioned_folder` reads.

    Existing pictures are kept; InputError if they have other settings or prompts.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"`output_dir`: {folder} cannot be written to: {error.strerror}") from error
    saved = _read_settings(folder / SETTINGS) or settings
    for name in saved | settings:
        if (old := saved.get(name)) != (new := settings.get(name)):
            raise InputError(f"{folder} was drawn with {name}={old}, not {new}: choose another `output_dir`")
    captions = _read_captions(folder / METADATA)
    for old, (prompt, _) in zip(captions, prompts, strict=False):
        if old != prompt:
            raise InputError(
                f"{folder} contains a picture of {old!r} instead of {prompt!r}: choose another `output_dir`"
            )
    captions += [prompt for prompt, _ in prompts[len(captions) :]]
    lines = [json.dumps({"file_name": _name(index), "text": text}) for index, text in enumerate(captions)]
    for name, text in ((METADATA, "\n".join(lines) + "\n"), (SETTINGS, json.dumps(settings, indent=1))):
        write_text(folder / name, text)
    return [folder / _name(index) for index in range(len(prompts))]


def latents_path(picture: Path) -> Path:
    """Return the path of a picture's noise and latents."""
    return picture.with_suffix(".safetensors")


def missing_pictures(paths: Sequence[Path], resolution: int, with_latents: bool = False) -> list[int]:
    """Return the positions of pictures that are absent, damaged, of another size, or without the latents wanted."""
    missing = []
    for index, path in enumerate(paths):
        if os.path.isdir(path):
            raise InputError(f"{path} is a folder instead of a picture: {ADVICE}")
        try:
            with Image.open(path) as image:
                image.load()
                if image.size != (resolution, resolution) or (with_latents and not latents_path(path).is_file()):
                    missing.append(index)
        except (OSError, ValueError, SyntaxError):  # Pillow's errors for damaged files
            missing.append(index)
    return missing


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
        raise InputError(f"{path} does not contain settings: {ADVICE}")
    return settings


def _read_captions(path: Path) -> list[str]:
    """Return the prompt of each picture; InputError for lines that `open_folder` does not write."""
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
