"""Files that are there whole or not at all."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CARD, OTHER_CARD = "README.md", "MODEL_CARD.md"
MARK = "<!-- written by sketch-perceptual -->"  # in every card of ours, those of networks/hub_model.py too


@contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """A folder to write into; at the end of the block each of its files moves to its place in `folder` at once.

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
    """Return where the card of what is written to `folder` belongs: beside a README.md of somebody else."""
    path = Path(folder, CARD)
    is_ours = not path.exists() or MARK.encode() in path.read_bytes()
    return path if is_ours else path.with_name(OTHER_CARD)


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()
