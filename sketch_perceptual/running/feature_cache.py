"""What frozen networks say of pictures, kept on disk so that it is computed once."""

import argparse
import functools
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from ..data.image_sets import Images
from ..data.images import fit_image, to_tensor
from ..errors import InputError
from ..networks.embedder import SketchEmbedder

logger = get_logger(__name__, log_level="INFO")


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


CACHE_FILE = 1024  # images: what an interrupted run has to compute again at most


def open_cache(args: argparse.Namespace, accelerator: Accelerator, embedder: SketchEmbedder) -> FeatureCache:
    """Where `--feature_dir` keeps `embedder.features`."""
    return FeatureCache(Path(args.feature_dir, f"{embedder.feature_key}-{accelerator.mixed_precision}"))


@torch.no_grad()
def extract_features(
    args: argparse.Namespace, accelerator: Accelerator, embedder: SketchEmbedder, data: Images, keys: Sequence[str]
) -> FeatureCache:
    """`open_cache` with all of `data` in it; the processes share what it lacks.

    `keys` stand for the contents of the images.
    """
    cache = open_cache(args, accelerator, embedder)
    embedder.to(accelerator.device, memory_format=torch.channels_last)
    read = functools.partial(_fitted, data, embedder.resolution, embedder.fit)

    def compute(images: torch.Tensor) -> torch.Tensor:
        with accelerator.autocast():
            return embedder.features(images)

    fill_cache(args, accelerator, cache, keys, read, compute, data.name, args.extraction_batch_size)
    return cache


@torch.no_grad()
def fill_cache(
    args: argparse.Namespace,
    accelerator: Accelerator,
    cache: FeatureCache,
    keys: Sequence[str],
    read: Callable[[int], torch.Tensor],
    compute: Callable[[torch.Tensor], torch.Tensor],
    name: Callable[[int], str],
    batch_size: int,
    what: str = "features",
) -> None:
    """Add `compute` of the pictures that `cache` lacks; the processes share them.

    `read` and `name` take a position in `keys`; `compute` takes a batch and returns (B, F).
    """
    missing = cache.missing(keys)
    accelerator.wait_for_everyone()  # nobody adds before all have looked
    if not missing:
        return
    logger.info(f"{len(set(keys)) - len(missing)} of {len(set(keys))} images have {what} in {cache.folder}")
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    loader = torch.utils.data.DataLoader(_Pictures(mine, read), batch_size, num_workers=args.dataloader_num_workers)
    found: list[torch.Tensor] = []
    start = 0
    for batch in tqdm(loader, what.capitalize(), unit="batch", disable=None if accelerator.is_main_process else True):
        features = compute(batch.to(accelerator.device, memory_format=torch.channels_last)).float().cpu()
        if bad := (~features.isfinite().all(1)).nonzero().flatten().tolist():
            overflowing = name(mine[start + len(found) + bad[0]])
            raise InputError(f"the {what} of {overflowing} overflow: use --mixed_precision bf16 or no")
        found.extend(features)
        stop = start + len(found)
        if len(found) >= CACHE_FILE or stop == len(mine):
            cache.add([keys[index] for index in mine[start:stop]], torch.stack(found))
            found, start = [], stop
    accelerator.wait_for_everyone()
    cache.refresh()
    if cache.missing(keys):
        raise InputError(f"--feature_dir {cache.folder} must be a folder that all machines share")


def _fitted(data: Images, resolution: int, fit: str, index: int) -> torch.Tensor:
    return to_tensor(fit_image(data.image(index), resolution, fit, data.background))


class _Pictures(torch.utils.data.Dataset):
    """What `read` makes of the pictures at some positions."""

    def __init__(self, positions: Sequence[int], read: Callable[[int], torch.Tensor]):
        self.positions, self.read = positions, read

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.read(self.positions[index])
