"""Cache on disk of the features that frozen networks compute from images.

Independent of networks and data sets: callers pass the functions that read an image and compute its features.
"""

import functools
import hashlib
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from ..cli import interruption
from ..errors import InputError, first_line, first_names

logger = get_logger(__name__, log_level="INFO")

CACHE_FILE = 1024  # images per file: an interrupted run recomputes no more than that
FILE_NAME = re.compile(r"[0-9a-f]{16}\.(safetensors|partial)")  # all other files in the folder are left alone
ABANDONED = 24 * 3600  # age in seconds at which a .partial file is deleted


class FeatureCache:
    """A folder of features by key. Files are written atomically, so that several processes may add at once.

    Each file carries a checksum, which is verified once, when `missing` is first asked for one of its keys. A file
    that fails the check counts as missing and is recorded in `damaged`.

    Args:
        folder: created if necessary; one for each kind of features, see `feature_folder`.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.where: dict[str, tuple[Path, int]] = {}
        self.known: set[Path] = set()
        self.verified: set[Path] = set()
        self.damaged: dict[Path, str] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"`feature_dir`: {folder} cannot be written to: {error.strerror}") from error
        self._remove_abandoned()
        self.refresh()

    def refresh(self) -> None:
        """Pick up files that other processes have added."""
        for path in sorted(set(filter(_is_cache_file, self.folder.glob("*.safetensors"))) - self.known):
            self.known.add(path)
            keys = self._check(path)
            self.where |= {key: (path, row) for row, key in enumerate(keys)}

    def missing(self, keys: Sequence[str]) -> list[int]:
        """Return the positions of keys that are absent or damaged, the first position of equal keys."""
        for path in {self.where[key][0] for key in keys if key in self.where} - self.verified:
            if self._check(path, verify=True):
                self.verified.add(path)
            else:
                self.where = {key: entry for key, entry in self.where.items() if entry[0] != path}
        first = {key: index for index, key in reversed(list(enumerate(keys))) if key not in self.where}
        return sorted(first.values())

    def add(self, keys: Sequence[str], features: Tensor) -> None:
        """Store features (N, F), as float32, for keys without spaces."""
        path = self.folder / f"{secrets.token_hex(8)}.safetensors"
        partial = path.with_suffix(".partial")
        features = features.float().cpu().contiguous()
        try:
            metadata = {"keys": " ".join(keys), "sha256": _checksum(keys, features)}
            save_file({"features": features}, partial, metadata)
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"`feature_dir`: {path} cannot be written: {error}") from error
        finally:
            partial.unlink(missing_ok=True)
        self.known.add(path)
        self.verified.add(path)
        self.where |= {key: (path, row) for row, key in enumerate(keys)}

    def parts(self, keys: Sequence[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield positions in `keys` and their features (n, F), one file at a time."""
        files: dict[Path, list[tuple[int, int]]] = {}
        for index, key in enumerate(keys):
            path, row = self.where[key]
            files.setdefault(path, []).append((index, row))
        for path, entries in files.items():
            with self._open(path) as file:
                positions, rows = torch.tensor(entries).T
                yield positions, file.get_tensor("features")[rows]

    def row(self, key: str) -> Tensor:
        """Return the features (F,) of one key, without reading the rest of its file."""
        path, row = self.where[key]
        with self._open(path) as file:
            return file.get_slice("features")[row]

    def read(self, keys: Sequence[str]) -> Tensor:
        """Return the features (N, F) in the order of the keys."""
        features = torch.empty(0)
        for positions, part in self.parts(keys):
            if not len(features):
                features = part.new_empty(len(keys), part.shape[1])
            features[positions] = part
        return features

    def remove_damaged(self) -> str | None:
        """Delete damaged files; return a sentence that names them, or None."""
        if not self.damaged:
            return None
        for path in self.damaged:
            with suppress(OSError):  # read-only folder: keep the file and recompute
                path.unlink()
        names = [f"{path.name} ({reason})" for path, reason in sorted(self.damaged.items())]
        self.damaged = {}
        return f"{self.folder}: recomputing damaged files: {first_names(names)}"

    def _open(self, path: Path):
        try:
            return safe_open(path, "pt")
        except (OSError, SafetensorError) as error:
            raise InputError(f"`feature_dir`: {path} cannot be read: {first_line(error)}") from error

    def _check(self, path: Path, verify: bool = False) -> list[str]:
        """Return the keys of a file's rows, or [] if the file cannot be used."""
        try:
            with safe_open(path, "pt") as file:
                keys = _keys(file)
                if verify and file.metadata()["sha256"] != _checksum(keys, file.get_tensor("features")):
                    raise ValueError("its checksum does not match")
                return keys
        except FileNotFoundError:  # another process has just removed it as damaged
            return []
        except (SafetensorError, ValueError) as error:
            self.damaged[path] = first_line(error)
            return []
        except OSError as error:
            raise InputError(f"`feature_dir`: {path} cannot be read: {first_line(error)}") from error

    def _remove_abandoned(self) -> None:
        """Delete files left by processes that were killed while writing."""
        for path in filter(_is_cache_file, self.folder.glob("*.partial")):
            with suppress(OSError):
                if path.stat().st_mtime < time.time() - ABANDONED:
                    path.unlink()


def cache_folder() -> Path:
    """Return the default of `feature_dir`. InputError if there is no home folder."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    except RuntimeError as error:
        raise InputError("there is no home folder to keep features in: choose a `feature_dir`") from error
    return Path(base, "sketch-perceptual", "features")


def scan_folder(folder: str | None = None) -> Path | None:
    """Return the folder for scans of images, in `folder` or `cache_folder()`; None if there is no home folder."""
    try:
        return Path(folder or cache_folder(), "scans")
    except InputError:
        return None


def feature_folder(accelerator: Accelerator, folder: str | None, extractor, background: str) -> Path:
    """Return the folder for features of images on `background`, in `folder` or `cache_folder()`."""
    paper = re.sub(r"\W+", "-", background.lower()).strip("-")
    name = f"{extractor.feature_key}-on-{paper}-{accelerator.mixed_precision}"
    return Path(folder or cache_folder(), name)


@torch.no_grad()
def extract_features(
    accelerator: Accelerator,
    folder: str | None,
    extractor,
    data,
    keys: Sequence[str],
    *,
    batch_size: int = 64,
    num_workers: int = 0,
) -> FeatureCache:
    """Return a cache with the features of all of `data`; the processes share the computation.

    Args:
        folder: contains all caches; None is `cache_folder()`.
        extractor: a module with `prepare(image)` -> (3, H, W), `features((B, 3, H, W))` -> (B, F), and `feature_key`,
            which identifies everything that the features depend on.
        data: has `image(i)`, `name(i)` and the `background` of its images.
        keys: identify the contents of the images; equal images have equal keys.
    """
    cache = FeatureCache(feature_folder(accelerator, folder, extractor, data.background))

    def compute(images: Tensor) -> Tensor:
        extractor.to(accelerator.device, memory_format=torch.channels_last)
        with accelerator.autocast():
            return extractor.features(images)

    read = functools.partial(_prepare, data, extractor.prepare)
    fill_cache(accelerator, cache, keys, read, compute, data.name, batch_size=batch_size, num_workers=num_workers)
    return cache


@torch.no_grad()
def fill_cache(
    accelerator: Accelerator,
    cache: FeatureCache,
    keys: Sequence[str],
    read: Callable[[int], Tensor],
    compute: Callable[[Tensor], Tensor],
    name: Callable[[int], str],
    *,
    batch_size: int,
    num_workers: int = 0,
    kind: str = "features",
) -> None:
    """Compute and add the features that `cache` lacks; the processes share the computation.

    `read` and `name` take a position in `keys`; `compute` takes a batch and returns (B, F). InputError names an image
    whose features are not finite.
    """
    missing = sorted(set(gather_object(cache.missing(keys))))  # all look before one adds or removes
    if accelerator.is_main_process and (report := cache.remove_damaged()):
        logger.warning(report)
    if not missing:
        return
    logger.info(f"{len(set(keys)) - len(missing)} of {len(set(keys))} images have {kind} in {cache.folder}")
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    loader = torch.utils.data.DataLoader(
        mine,  # type: ignore[arg-type]  # a list is a data set
        batch_size,
        num_workers=num_workers,
        collate_fn=functools.partial(_read_batch, read),
        worker_init_fn=interruption.ignore_in_worker,
    )
    with interruption.held_back():  # while workers start
        batches = iter(loader)
    pending: list[Tensor] = []
    start = 0

    def add() -> None:
        nonlocal start
        stop = start + len(pending)
        cache.add([keys[index] for index in mine[start:stop]], torch.stack(pending))
        pending.clear()
        start = stop

    disable = None if accelerator.is_main_process else True
    for batch in tqdm(batches, kind.capitalize(), len(loader), unit="batch", disable=disable):
        features = compute(batch.to(accelerator.device, memory_format=torch.channels_last)).float().cpu()
        if bad := (~features.isfinite().all(1)).nonzero().flatten().tolist():
            image = name(mine[start + len(pending) + bad[0]])
            raise InputError(f"the {kind} of {image} are not finite: choose a `mixed_precision` of bf16 or no")
        if pending and len(pending[0]) != features.shape[1]:
            add()
        pending.extend(features)
        if len(pending) >= CACHE_FILE:
            add()
    if pending:
        add()
    accelerator.wait_for_everyone()
    cache.refresh()
    if cache.missing(keys):
        raise InputError(f"`feature_dir`: all machines must share the folder {cache.folder}")


def _is_cache_file(path: Path) -> bool:
    return FILE_NAME.fullmatch(path.name) is not None


def _keys(file) -> list[str]:
    """Return the keys of an open file's rows; ValueError if it is not a file that `FeatureCache.add` writes."""
    metadata = file.metadata() or {}
    if not {"keys", "sha256"} <= set(metadata) or list(file.keys()) != ["features"]:
        raise ValueError("no checksum, keys and features")
    keys, rows = metadata["keys"].split(" "), file.get_slice("features")
    if rows.get_dtype() != "F32" or len(rows.get_shape()) != 2 or rows.get_shape()[0] != len(keys):
        raise ValueError(f"not {len(keys)} rows of numbers")
    return keys


def _checksum(keys: Sequence[str], features: Tensor) -> str:
    digest = hashlib.sha256(repr((list(keys), tuple(features.shape))).encode())
    digest.update(features.numpy().data)
    return digest.hexdigest()


def _prepare(data, prepare: Callable, index: int) -> Tensor:
    return prepare(data.image(index))


def _read_batch(read: Callable[[int], Tensor], positions: list[int]) -> Tensor:
    return torch.stack([read(index) for index in positions])
