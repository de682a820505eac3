"""What frozen networks say of pictures, kept on disk so that it is computed once."""

import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import InputError


class FeatureCache:
    """A folder of features by key. A file appears whole or not at all, so that several processes may add at once.

    Args:
        folder: made if need be; one for each kind of features, see `SketchEmbedder.feature_key`.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.where: dict[str, tuple[Path, int]] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--feature_dir: {folder} cannot be written to: {error.strerror}") from error
        self.refresh()

    def refresh(self) -> None:
        """Take note of what other processes have added."""
        for path in sorted(set(self.folder.glob("*.safetensors")) - {path for path, _ in self.where.values()}):
            with _open(path) as file:
                self.where |= {key: (path, row) for row, key in enumerate(file.metadata()["keys"].split(" "))}

    def missing(self, keys: Sequence[str]) -> list[int]:
        """Positions of the keys that are not here, the first of equals."""
        first = {key: index for index, key in reversed(list(enumerate(keys))) if key not in self.where}
        return sorted(first.values())

    def add(self, keys: Sequence[str], features: Tensor) -> None:
        """Keep features (N, F), as float32, for keys without spaces."""
        path = self.folder / f"{secrets.token_hex(8)}.safetensors"
        partial = path.with_suffix(".partial")
        try:
            save_file({"features": features.float().cpu().contiguous()}, partial, {"keys": " ".join(keys)})
            partial.rename(path)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise InputError(f"--feature_dir: {path} cannot be written: {error}") from error
        self.where |= {key: (path, row) for row, key in enumerate(keys)}

    def parts(self, keys: Sequence[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """Positions in `keys` and their features (n, F), a file of them at a time."""
        files: dict[Path, list[tuple[int, int]]] = {}
        for index, key in enumerate(keys):
            path, row = self.where[key]
            files.setdefault(path, []).append((index, row))
        for path, places in files.items():
            with _open(path) as file:
                positions, rows = torch.tensor(places).T
                yield positions, file.get_tensor("features")[rows]

    def row(self, key: str) -> Tensor:
        """The features (F,) of one key, read without the rest of its file."""
        path, row = self.where[key]
        with _open(path) as file:
            return file.get_slice("features")[row]

    def read(self, keys: Sequence[str]) -> Tensor:
        """(N, F), in the order of the keys."""
        features = torch.empty(0)
        for positions, part in self.parts(keys):
            if not len(features):
                features = part.new_empty(len(keys), part.shape[1])
            features[positions] = part
        return features


def _open(path: Path):
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise InputError(f"--feature_dir: {path} is damaged ({error}): delete it") from error
