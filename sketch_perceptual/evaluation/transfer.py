"""Scores of stylised photos against the true sketches (Seo 2025, section 4.1, Table 1, Figure 2)."""

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..data.images import Source, fit_image, load_image, to_pil, to_tensor
from ..data.paired import Pairs
from ..errors import InputError
from ..figures import image_grid
from ..measures.image_quality import ssim
from ..networks.hub_model import fingerprint
from ..networks.style_net import JohnsonNet, load_johnson
from ..seeds import generator
from .set_distances import KERNELS, Features, set_distances, warn_of_small_sets
from .tables import SHEET_COLUMNS, Report

logger = get_logger(__name__, log_level="INFO")


def compare_styles(
    accelerator: Accelerator,
    pairs: Pairs,
    models: list[tuple[str, str]],
    features: Features,
    *,
    resolution: int = 256,
    fit: str = "crop",
    background: str = "white",
    seed: int = 0,
) -> Report | None:
    """Score each model's drawings against the true sketches, in pairs and as a set; None off the main process.

    Args:
        models: name and source of each network.
        resolution, fit, background: how photos and sketches are made square.
        seed: selects the photos in the figure.
    """
    if len(pairs.names) < 2:
        raise InputError(f"{pairs.summary}, need at least two to compare")
    read = functools.partial(read_square, resolution=resolution, fit=fit, background=background)
    networks = [(name, load_johnson(path).to(accelerator.device).eval()) for name, path in models]
    scores = score_pairs(accelerator, pairs, networks, read, features.extract)
    if not accelerator.is_main_process:
        return None
    kind, kernel = features.kind, KERNELS[features.kind]
    runs = [*baseline_runs(scores), *model_runs(scores, networks, kind)]
    columns = {"ssim": ".3f", "ssim_shuffled": ".3f", kind: ".4g", kernel: ".3g"}
    warn_of_small_sets(kind, len(scores), len(scores), features.description)
    about = {"pairs": len(scores), "layout": pairs.summary, "judged_by": features.description}
    return Report(runs, columns, about, lambda: transfer_sheet(accelerator, pairs, networks, read, seed))


@dataclass(frozen=True)
class PairScores:
    """Scores of one photo and its true sketch.

    Args:
        index: position in the pairs.
        reference: features (1, F) of the sketch.
        baselines: SSIM of a blank page and of the photo itself.
        models: for each network SSIM, SSIM with another sketch, and features (1, F) of its drawing.
    """

    index: int
    reference: Tensor
    baselines: list[float]
    models: list[tuple[float, float, Tensor]]


def score_pairs(
    accelerator: Accelerator,
    pairs: Pairs,
    networks: list[tuple[str, JohnsonNet]],
    read: Callable[[Source], Tensor],
    extract: Callable[[Tensor], Tensor],
) -> list[PairScores]:
    """Score all pairs, in order; the processes share them."""
    count, scores = len(pairs.names), []
    mine = range(count)[accelerator.process_index :: accelerator.num_processes]
    for index in tqdm(mine, "Pairs", disable=None if accelerator.is_main_process else True):
        paths = (pairs.photos[index], pairs.sketches[index], pairs.sketches[(index + 1) % count])
        photo, sketch, other = (read(path)[None].to(accelerator.device) for path in paths)
        baselines = [float(ssim(picture, sketch)) for picture in (torch.ones_like(sketch), photo)]
        drawings = [stylise(accelerator, network, photo) for _, network in networks]
        models = [(float(ssim(x, sketch)), float(ssim(x, other)), extract(x).cpu()) for x in drawings]
        scores.append(PairScores(index, extract(sketch).cpu(), baselines, models))
    return sorted(gather_object(scores), key=lambda pair: pair.index)


def baseline_runs(scores: list[PairScores]) -> list[dict]:
    columns = zip(*(pair.baselines for pair in scores), strict=True)
    return [
        {"name": name, "ssim": statistics.fmean(values)}
        for name, values in zip(("blank page", "the photo"), columns, strict=True)
    ]


def model_runs(scores: list[PairScores], networks: list[tuple[str, JohnsonNet]], kind: str) -> list[dict]:
    runs, reference = [], torch.cat([pair.reference for pair in scores])
    by_model = zip(*(pair.models for pair in scores), strict=True)
    for (name, network), columns in zip(networks, by_model, strict=True):
        paired, shuffled, features = zip(*columns, strict=True)
        run = {"name": name, "weights": fingerprint(network), "ssim": statistics.fmean(paired)}
        run["ssim_shuffled"] = statistics.fmean(shuffled)
        runs.append(run | set_distances(kind, torch.cat(features), reference))
    return runs


def read_square(source: Source, resolution: int, fit: str, background: str) -> Tensor:
    """Return a square image (3, resolution, resolution) in [-1, 1]."""
    return to_tensor(fit_image(load_image(source, background), resolution, fit, background))


@torch.no_grad()
def stylise(accelerator: Accelerator, network: JohnsonNet, photo: Tensor) -> Tensor:
    """Return drawings (B, 3, H, W) in [-1, 1], ready to be saved."""
    with accelerator.autocast():
        return network(photo).float().clamp(-1, 1)


def transfer_sheet(
    accelerator: Accelerator,
    pairs: Pairs,
    networks: list[tuple[str, JohnsonNet]],
    read: Callable[[Source], Tensor],
    seed: int,
) -> Image.Image:
    """Return a grid of some photos, their true sketches, and each network's drawings of them."""
    chosen = torch.randperm(len(pairs.names), generator=generator(seed, "sheet"))[:SHEET_COLUMNS].tolist()
    photos, sketches = ([read(paths[index]) for index in chosen] for paths in (pairs.photos, pairs.sketches))
    rows = {"photo": photos, "true sketch": sketches}
    for name, network in networks:
        drawn = [stylise(accelerator, network, photo[None].to(accelerator.device))[0] for photo in photos]
        rows[name] = drawn
    return image_grid({name: list(map(to_pil, row)) for name, row in rows.items()})
