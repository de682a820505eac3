"""Scores of generated pictures against drawings and prompts (Seo 2025, section 4.1, Table 2, Figure 3)."""

import functools
import math
import statistics
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from PIL import Image
from torch import Tensor

from ..data.class_names import find_classes
from ..data.datasets import CaptionedImages
from ..data.preview import pad
from ..data.scan import read_once
from ..errors import InputError
from ..figures import image_grid
from ..measures.image_quality import ClipFeatures, InceptionFeatures
from ..measures.ink import chroma, is_black
from ..measures.ranking import most_alike
from ..measures.strokes import (
    SHAPE,
    Difference,
    Strokes,
    equal_ink_level,
    mean_strokes,
    measure_strokes,
    stroke_differences,
    stroke_distance,
)
from ..networks.backbone import load_backbone
from ..networks.embedder import make_embedder
from ..seeds import generator
from ..training.distributed import on_main
from .embedding import Extract
from .sampling import Drawn
from .set_distances import KERNELS, set_distances, warn_of_small_sets
from .tables import SHEET_ROWS, Report

logger = get_logger(__name__, log_level="INFO")

COLUMNS = {"images": "", "frechet": ".4g", "kernel": ".3g", "fid": ".4g", "kid": ".3g", "clip": ".2f"}
COLUMNS |= {"accuracy": ".1%", "nearest_same": ".1%", "strokes": ".2f", "shape": ".2f"}
COLUMNS |= {"width": ".2f", "ends": ".1f", "edge": ".2f", "paper": ".3f", "ink": ".3f", "chroma": ".3f"}
MEASURED = 2048  # pictures of a set whose strokes are measured, evenly spaced: a tenth of a second each at 512 px
Fit = Callable[[Image.Image], Image.Image]


@dataclass(frozen=True)
class Pictures:
    """Captioned pictures, without the black ones, the keys of their contents, and the strokes of at most MEASURED."""

    data: CaptionedImages
    keys: list[str]
    black: int
    chroma: float
    strokes: list[Strokes]

    @property
    def captions(self) -> list[list[str]]:
        return [self.data.captions[row] for row in self.data.rows]


def shuffled_captions(pictures: Pictures, seed: int) -> list[str]:
    """Return all distinct captions in random order, which are the default prompts."""
    captions = list(dict.fromkeys(caption for row in pictures.captions for caption in row))
    return [captions[index] for index in torch.randperm(len(captions), generator=generator(seed, "prompts"))]


def read_pictures(accelerator: Accelerator, data: CaptionedImages, name: str, on_bad_image: str, fit: Fit) -> Pictures:
    """Read each picture once; count and leave out entirely black ones. InputError if fewer than two remain.

    Args:
        fit: brings a picture to the size at which strokes are measured.
    """
    positions, keys, looks = on_main(accelerator, _read_looks, data, on_bad_image, fit)
    kept = [index for index, (black, _, _) in enumerate(looks) if not black]
    if black := len(looks) - len(kept):
        logger.warning(f"{name}: {black} of {len(looks)} pictures are entirely black and are not scored")
    if len(kept) < 2:
        raise InputError(f"{name}: need at least two pictures, got {len(kept)}")
    _, colours, strokes = zip(*(looks[index] for index in kept), strict=True)
    strokes = [item for item in strokes if item is not None]
    data = data.select(positions[index] for index in kept)
    return Pictures(data, [keys[index] for index in kept], black, statistics.fmean(colours), strokes)


def _read_looks(
    data: CaptionedImages, on_bad_image: str, fit: Fit
) -> tuple[list[int], list[str], list[tuple[bool, float, Strokes | None]]]:
    """Return positions, keys and, for each picture, whether it is black, its colour and, for some, its strokes."""
    looks = {}
    measured = data.spread(MEASURED)

    def measure(index: int, image: Image.Image) -> None:
        looks[index] = is_black(image), chroma(image), measure_strokes(fit(image)) if index in measured else None

    contents = read_once(data, on_bad_image, measure)
    return contents.positions, contents.keys, [looks[index] for index in contents.positions]


def score_strokes(name: str, pictures: Pictures, drawings: Pictures, fit: Fit) -> dict[str, Any]:
    """Compare strokes and paper with those of the drawings.

    Returns:
        "strokes", the `stroke_distance`, and "shape", that of the SHAPE measures where the pictures have as much ink
        as the drawings, which no tone curve changes that keeps greys apart; and each measure's `Difference` in both
        cases.
    """
    data, ink = pictures.data, mean_strokes(drawings.strokes)["ink"]
    as_drawn = stroke_differences(pictures.strokes, drawings.strokes)
    scores: dict[str, Any] = {"strokes": stroke_distance(as_drawn), "as_drawn": _as_dicts(as_drawn)}
    if 0 < ink < 1:
        some = data.spread(MEASURED)
        level = equal_ink_level((fit(data.image(index)) for index in some), ink)
        inked = [measure_strokes(fit(data.image(index)), level) for index in some]
        differences = stroke_differences(inked, drawings.strokes)
        shape = {name: differences[name] for name in SHAPE}
        reached = mean_strokes(inked)["ink"]
        if abs(reached / ink - 1) > 0.2:
            logger.warning(
                f"{name}: the pictures have too few greys for the ink of the drawings ({ink:.1%}); their shape is"
                f" measured at {reached:.1%}"
            )
        scores |= {"shape": stroke_distance(shape), "equal_ink": {"level": level, "ink": reached} | _as_dicts(shape)}
    return scores


def _as_dicts(differences: Mapping[str, Difference]) -> dict[str, dict[str, float]]:
    return {name: asdict(difference) for name, difference in differences.items()}


def load_extractors(
    *,
    backbone: str,
    inception_weights: str | None = None,
    clip_model: str | None = None,
    classifier: str | None = None,
    resolution: int,
    fit: str,
    background: str,
) -> dict[str, Any]:
    """Return the networks that extract features, by purpose: "frechet", "fid", "clip", "class"."""
    options = {"fit": fit, "background": background}
    small = options | {"resolution": min(224, resolution)}
    extractors: dict[str, Any] = {"frechet": make_embedder(load_backbone(backbone, "none"), **small)}
    if inception_weights:
        extractors["fid"] = InceptionFeatures(inception_weights, resolution, **options)
    if clip_model:
        extractors["clip"] = ClipFeatures(clip_model, resolution, **options)
    if classifier:
        network = load_backbone(classifier, "none")
        if not network.classes:
            raise InputError(f"`classifier` {classifier} has no classes: choose a network of train_backbone.py")
        extractors["class"] = make_embedder(network, embedding="logits", **small)
    return extractors


def score_models(
    accelerator: Accelerator,
    drawings: Pictures,
    drawn: list[Drawn],
    extractors: dict[str, Any],
    extract: Extract,
    fit: Fit,
    on_bad_image: str = "error",
) -> Report | None:
    """Score each model's pictures as a set, against their prompts, and by strokes; None off the main process.

    Args:
        drawings: reference for the pictures of the models, `drawn`.
        extractors: from `load_extractors`.
        fit: see `read_pictures`.
    """
    about, reference = score(accelerator, extractors, extract, drawings)
    runs, nearest = [{"name": "the drawings"} | about], {}
    for name, model, data in drawn:
        pictures = read_pictures(accelerator, data, name, on_bad_image, fit)
        scores, features = score(accelerator, extractors, extract, pictures)
        if not accelerator.is_main_process:
            continue
        for kind in sorted(set(KERNELS) & set(extractors)):
            scores |= set_distances(kind, features[kind], reference[kind])
        scores |= score_strokes(name, pictures, drawings, fit)
        similar = most_alike(features["frechet"], reference["frechet"])
        same = [texts[0] in drawings.captions[index] for texts, index in zip(pictures.captions, similar, strict=True)]
        runs.append({"name": name} | model | scores | {"nearest_same": statistics.fmean(same)})
        nearest.setdefault(name, (pictures, similar))
    if not accelerator.is_main_process:
        return None
    description = {kind: f"{type(network).__name__} {network.feature_key}" for kind, network in extractors.items()}
    for kind in set(KERNELS) & set(extractors):
        warn_of_small_sets(kind, min(run["images"] for run in runs[1:]), len(drawings.keys), description[kind])
    render = functools.partial(generation_sheet, drawings, nearest)
    return Report(runs, COLUMNS, {"drawings": len(drawings.keys)} | description, render)


def score(
    accelerator: Accelerator, extractors: dict[str, Any], extract: Extract, pictures: Pictures
) -> tuple[dict, dict[str, Tensor]]:
    """Return the scores that need no reference, and the features of each kind; both empty off the main process."""
    caches = {kind: extract(network, pictures.data, pictures.keys) for kind, network in extractors.items()}
    if not accelerator.is_main_process:
        return {}, {}
    features = {kind: cache.read(pictures.keys) for kind, cache in caches.items()}
    scores = {"images": len(pictures.keys), "black": pictures.black, "chroma": pictures.chroma}
    scores |= mean_strokes(pictures.strokes)
    prompts = [texts[0] for texts in pictures.captions]
    if "clip" in extractors:
        clip = extractors["clip"].to(accelerator.device)
        cosines = F.cosine_similarity(features["clip"], clip.texts(prompts))
        scores |= {"clip": float(100 * cosines.clamp(min=0).mean()), "clip_cosine": float(cosines.mean())}
    if "class" in extractors:
        network = extractors["class"].to(accelerator.device)
        predicted = network.project(features["class"].to(accelerator.device)).argmax(1).tolist()
        named = find_classes(prompts, network.backbone.classes)
        right = [label in labels for label, labels in zip(predicted, named, strict=True) if labels]
        scores |= {"accuracy": statistics.fmean(right) if right else math.nan, "with_class": len(right)}
    return scores, features


def generation_sheet(drawings: Pictures, nearest: dict[str, tuple[Pictures, list[int]]]) -> Image.Image:
    """Return a grid of prompts by models, each picture beside its nearest drawing, to show that it is not a copy."""
    rows: dict[str, dict[str, int]] = {}
    for name, (pictures, _) in nearest.items():
        for index, (caption, *_) in enumerate(pictures.captions):
            rows.setdefault(caption, {}).setdefault(name, index)
    common = [(caption, row) for caption, row in rows.items() if len(row) == len(nearest)]
    if not common:
        raise InputError("`figure`: the models have no prompt in common")
    shown = {}
    for caption, row in common[:SHEET_ROWS]:
        shown[textwrap.shorten(caption, 40)] = [
            pad(picture, drawings.data.background)
            for name, index in row.items()
            for picture in (nearest[name][0].data.image(index), drawings.data.image(nearest[name][1][index]))
        ]
    return image_grid(shown, [head for name in nearest for head in (name, "nearest drawing")])
