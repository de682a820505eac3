"""Measures of strokes and paper, of a drawing and of sets of drawings."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image

from ..errors import InputError
from ..extras import optional

LEVEL = 0.5  # of grey: darker pixels are ink
MARGIN = 3  # pixels between ink and what counts as paper


@dataclass(frozen=True)
class Strokes:
    """Strokes and paper of a drawing; grey runs from 0, black, to 1. NaN without a stroke, or without paper.

    The skeleton is the centre line of the ink, one pixel wide (Zhang & Suen 1984).

    Attributes:
        ink: share of the pixels that are ink.
        width: mean stroke width, in pixels, to within half a pixel.
        width_spread: standard deviation of the width along the skeleton, over its mean.
        ends: ends of strokes per 100 pixels of skeleton, without those at the frame; a gap in a stroke makes two.
        junctions: crossings and branches per 100 pixels of skeleton.
        pieces: number of connected pieces of ink.
        specks: number of pieces that are at most as long as two stroke widths.
        edge: width of an edge in pixels, from 10 to 90 % of the step from stroke to paper; at most 3 pixels a side of
            it are looked at.
        stroke: mean grey of the skeleton.
        paper: median grey of the paper, which is everything farther than 3 pixels from ink.
        paper_spread: standard deviation of the paper's grey.
        tint: mean over the paper of max(R, G, B) - min(R, G, B).
    """

    ink: float
    width: float
    width_spread: float
    ends: float
    junctions: float
    pieces: float
    specks: float
    edge: float
    stroke: float
    paper: float
    paper_spread: float
    tint: float


# One unit of `stroke_distance`: a difference between two sets that is plain to see, chosen by eye.
UNITS = {
    "ink": 0.02,
    "width": 0.5,
    "width_spread": 0.1,
    "ends": 2.0,
    "junctions": 1.0,
    "pieces": 2.0,
    "specks": 1.0,
    "edge": 0.25,
    "stroke": 0.1,
    "paper": 0.02,
    "paper_spread": 0.02,
    "tint": 0.02,
}
SHAPE = ("width", "width_spread", "ends", "junctions", "pieces", "specks")  # depend on `level` by the ink it takes


def measure_strokes(image: Image.Image, level: float = LEVEL) -> Strokes:
    """Measure a drawing of dark strokes on light paper, RGB or grey; see `load_image` for transparent ones.

    Args:
        level: pixels whose grey is below this are ink, from 0 to 1; see `equal_ink_level`.
    """
    ndimage = optional("scipy.ndimage", "train")
    rgb = np.asarray(image.convert("RGB"), np.float32) / 255
    grey = np.asarray(image.convert("L"), np.float32) / 255
    ink = grey < level
    distance = ndimage.distance_transform_edt(np.pad(ink, 1))[1:-1, 1:-1]
    skeleton = optional("skimage.morphology", "train").skeletonize(ink)
    length = int(skeleton.sum())
    strokes = dict.fromkeys(UNITS, math.nan)
    strokes |= {"ink": float(ink.mean()), "pieces": 0.0, "specks": 0.0}
    if length:
        widths = 2 * distance[skeleton] - 0.5  # an odd width is measured half a pixel too wide, an even one too narrow
        crossings = _crossing_number(skeleton)
        inside = distance < _to_frame(*skeleton.shape)
        labels, pieces = ndimage.label(ink, np.ones((3, 3)))
        boxes = ndimage.find_objects(labels)
        sides = np.array([max(part.stop - part.start for part in box) for box in boxes])
        strokes |= {
            "width": float(widths.mean()),
            "width_spread": float(widths.std() / widths.mean()),
            "ends": 100 * int(((crossings == 1) & inside).sum()) / length,
            "junctions": 100 * ndimage.label(crossings >= 3, np.ones((3, 3)))[1] / length,
            "pieces": float(pieces),
            "specks": float((sides <= 2 * widths.mean()).sum()),
            "stroke": float(grey[skeleton].mean()),
        }
    far = ndimage.distance_transform_edt(~ink) > MARGIN if ink.any() else np.ones_like(ink)
    if far.any():
        paper = float(np.median(grey[far]))
        strokes |= {
            "paper": paper,
            "paper_spread": float(grey[far].std()),
            "tint": float(np.ptp(rgb[far], axis=1).mean()),
        }
        if length:
            strokes["edge"] = _edge_width(grey, ink, ~far, strokes["stroke"], paper)
    return Strokes(**strokes)


def equal_ink_level(images: Iterable[Image.Image], ink: float) -> float:
    """Return the level at which a set of pictures has the share `ink` of ink in the mean, as `measure_strokes` has it.

    Two sets that are measured at their levels for one share differ in the shape of their strokes, and not in how black
    a tone curve would make them.
    """
    if not 0 < ink < 1:
        raise InputError(f"`ink` must be a share between 0 and 1, got {ink}")
    histograms = [np.array(image.convert("L").histogram()) / (image.width * image.height) for image in images]
    if not histograms:
        raise InputError("`images` must contain at least one picture")
    shares = np.concatenate([[0], np.cumsum(np.mean(histograms, 0))])  # of greys below 0, 1, ... 256
    return float(np.abs(shares - ink).argmin() - 0.5) / 255


@dataclass(frozen=True)
class Difference:
    """Difference of a measure between two sets of pictures.

    Attributes:
        mean: of the set, over the pictures that have the measure.
        difference: from the mean of the reference.
        interval: half of the 95 % interval of the difference (Welch's t, pictures as draws).
        distance: Wasserstein distance of the two distributions, in UNITS of the measure.
    """

    mean: float
    difference: float
    interval: float
    distance: float


def stroke_differences(strokes: Sequence[Strokes], reference: Sequence[Strokes]) -> dict[str, Difference]:
    """Compare each measure of a set of pictures with that of a reference set, by name; NaN if a set has too few."""
    stats = optional("scipy.stats", "train")
    differences = {}
    for name, unit in UNITS.items():
        values, true = (np.array([getattr(item, name) for item in group]) for group in (strokes, reference))
        values, true = values[~np.isnan(values)], true[~np.isnan(true)]
        if min(len(values), len(true)) < 2:
            differences[name] = Difference(*[math.nan] * 4)
            continue
        errors = [(group.var(ddof=1) / len(group), len(group)) for group in (values, true)]
        error = sum(squared for squared, _ in errors)
        freedom = error**2 / sum(squared**2 / (count - 1) for squared, count in errors) if error else 1
        half = float(stats.t.ppf(0.975, freedom) * math.sqrt(error))
        distance = float(stats.wasserstein_distance(values, true)) / unit
        differences[name] = Difference(float(values.mean()), float(values.mean() - true.mean()), half, distance)
    return differences


def stroke_distance(differences: Mapping[str, Difference]) -> float:
    """Return the mean of the distances of all measures in UNITS, each at most 10, with equal weights.

    0 for equal sets. A measure that a set lacks, like the width in blank pictures, counts 10.
    """
    return statistics.fmean(10 if math.isnan(x.distance) else min(x.distance, 10) for x in differences.values())


def mean_strokes(strokes: Sequence[Strokes]) -> dict[str, float]:
    """Return the mean of each measure over the drawings that have it."""
    table = np.array([list(asdict(item).values()) for item in strokes])
    has = ~np.isnan(table)
    counts = has.sum(0)
    means = np.where(has, table, 0).sum(0) / np.maximum(counts, 1)
    return {name: float(x) if n else math.nan for name, x, n in zip(UNITS, means, counts, strict=True)}


def describe_strokes(images: Iterable[Image.Image]) -> str:
    """Return the means of the measures that a reader can picture, as a phrase."""
    means = mean_strokes([measure_strokes(image) for image in images])
    if math.isnan(means["width"]):
        return "no strokes"
    return (
        f"{means['ink']:.1%} ink, strokes {means['width']:.1f} px wide with {means['ends']:.1f} ends per 100 px, paper"
        f" {means['paper']:.2f} of white, tint {means['tint']:.2f}"
    )


def _crossing_number(skeleton: np.ndarray) -> np.ndarray:
    """Return the number of branches that leave each pixel of a skeleton, (H, W): 1 at an end, 3 or more at a junction.

    It is the number of changes from paper to ink around the pixel (Rutovitz 1966).
    """
    padded = np.pad(skeleton, 1)
    height, width = skeleton.shape
    around = [(0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0), (0, 0)]
    ring = np.stack([padded[y : y + height, x : x + width] for y, x in around])
    return (~ring & np.roll(ring, -1, 0)).sum(0) * skeleton


def _to_frame(height: int, width: int) -> np.ndarray:
    """Return the distance of each pixel from the frame, (H, W), 0 for the outermost."""
    rows, columns = (np.minimum(np.arange(size), np.arange(size)[::-1]) for size in (height, width))
    return np.minimum(rows[:, None], columns)


def _edge_width(grey: np.ndarray, ink: np.ndarray, near: np.ndarray, stroke: float, paper: float) -> float:
    """Return the area of the edges `near` ink, from 10 to 90 % of the step, over the length of the outline."""
    step = (grey - stroke) / max(paper - stroke, 1 / 255)
    area = ((step > 0.1) & (step < 0.9) & near).sum()
    sides = (ink[1:] != ink[:-1]).sum() + (ink[:, 1:] != ink[:, :-1]).sum()
    return float(area / (np.pi / 4 * sides)) if sides else math.nan  # pixel sides are 4 / pi longer than the outline
