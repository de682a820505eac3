"""Distances of drawings within and across classes (Seo 2025, section 4.3, Table 4, Figure 4)."""

import functools
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from ..data.class_names import class_names
from ..data.datasets import LabelledImages
from ..data.splits import split, split_hash
from ..errors import InputError
from ..figures import ratio_bars
from ..measures.class_distances import ClassDistances
from .embedding import Drawings, Extract, embed_models, saved_background
from .tables import Report

logger = get_logger(__name__, log_level="INFO")


def measure_distances(
    accelerator: Accelerator,
    data: LabelledImages,
    models: list[tuple[str, str]],
    extract: Extract,
    *,
    on_bad_image: str = "error",
    held_out: float | None = None,
    **options,
) -> Report | None:
    """Return mean cosine distances within and across classes and their ratio; None off the main process.

    Args:
        models: name and source of each.
        held_out: measure only the fraction that `split` holds out.
        options: keyword arguments of `load_embedder`; None is the model's own value.
    """
    background = options.get("background") or saved_background(models[0][1])
    drawings = Drawings(accelerator, data, on_bad_image, background)
    data, keys = drawings.data, drawings.keys
    about: dict[str, Any] = {"copies": len(drawings.copies) - len(set(drawings.copies))}
    positions = list(range(len(data)))
    if held_out is not None:
        positions = split(data.labels, keys, drawings.copies, data.groups, held_out).validation
        about["split"] = split_hash({"validation": sorted(keys[index] for index in positions)})
    drawings.keep(positions)
    labels, runs = torch.tensor(drawings.data.labels), []
    for model, embedder, cache, keys in embed_models(accelerator, models, drawings, extract, options):
        distances = ClassDistances(len(data.classes))
        for rows, features in cache.parts(keys):
            distances.update(embedder.project(features.to(accelerator.device)), labels[rows])
        runs.append(model | vars(distances.compute()))
    if not runs:
        return None
    counts = runs[0]["counts"]
    about |= {"images": len(labels), "classes": sum(count > 0 for count in counts), "alone": counts.count(1)}
    about["class_names"] = class_names(data.classes)
    if about["alone"] == about["classes"]:
        raise InputError("no class has two drawings, so there are no distances within classes to measure")
    if about["alone"]:
        logger.info(f"classes of one drawing, which have no distances within: {about['alone']}")
    report = Report(runs, {"embedding": "", "intra": ".3f", "inter": ".3f", "ratio": ".2f"}, about)
    report.render = functools.partial(_plot_bars, report, f"{len(labels)} drawings of {about['classes']} classes")
    return report


def _plot_bars(report: Report, title: str):
    return ratio_bars({name: result["mean"]["ratio"] for name, result in report.results.items()}, title)
