"""Folders of drawings with captions."""

import io
import json
import os
from itertools import product
from pathlib import Path

from tqdm import tqdm

from ..errors import InputError
from ..files import write_whole
from .render import check, draw
from .scenes import CLASSES


def write_folder(output_dir, per_class=16, seed=0, size=256, styles=("pen",), classes=CLASSES):
    """Write per_class drawings of each class and style, and metadata.jsonl with a caption for each.

    Images are named house/0003.png, so that a folder of sketches and one of photos match by name, or
    house/0003_pen.png for several styles in one folder. Each line of metadata.jsonl holds file_name (relative to
    output_dir) and text. Return the number of images. InputError as in draw, for a folder with other files of these
    names, and if nothing can be written.
    """
    check(classes, styles, size)
    folder, images, lines = Path(output_dir), [], []
    for name, index, style in product(classes, range(per_class), styles):
        file_name = f"{name}/{index:04d}{f'_{style}' if len(styles) > 1 else ''}.png"
        kind, article = "photo" if style == "photo" else "sketch", "an" if name[0] in "aeiou" else "a"
        images.append((folder / file_name, name, index, style))
        lines.append(json.dumps({"file_name": file_name, "text": f"a {kind} of {article} {name}"}) + "\n")
    ours = _is_ours(folder / "metadata.jsonl", lines)
    for path, name, index, style in tqdm(images, unit="image", disable=None):
        data = _png(draw(name, index, seed, style, size))
        if not ours and os.path.lexists(path) and not (path.is_file() and path.read_bytes() == data):
            raise InputError(f"`output_dir`: {path} already exists and is another image: choose another folder")
        _write(path, data)
    _write(folder / "metadata.jsonl", "".join(lines).encode())
    return len(lines)


def _is_ours(path, lines):
    """Return whether there is a metadata.jsonl of these drawings; InputError if it lists other images."""
    if not os.path.lexists(path):
        return False
    try:
        known = set(path.read_text(encoding="utf-8").splitlines(keepends=True))
    except (OSError, ValueError):
        known = {""}
    if not known <= set(lines):
        raise InputError(f"`output_dir`: {path} already exists and lists other images: choose another folder")
    return True


def _png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _write(path, data):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"`output_dir`: {path.parent} cannot be made: {error.strerror}") from error
    write_whole(path, lambda partial: partial.write_bytes(data))
