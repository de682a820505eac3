"""Measures of strokes and paper, of a drawing and of sets of drawings."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image

from ..errors import InputError
from ..extras import optional

LEVEL = 0.7  # of grey: darker pixels are ink; at 0.5 anti-aliased lines of a pixel fall into pieces
MARGIN = 3  # pixels between ink and what counts as paper


@dataclass(frozen=True)
class Strokes:
    """Strokes and paper of a drawing; grey runs from 0, black, to 1. NaN without a stroke, or without paper.

    The skeleton is the centre line of the ink, one pixel wide (Zhang & Suen 1984).

    Attributes:
        ink: share of the pixels that are ink.
        width: mean stroke width, in pixels, to within half a pixel.
        width_spread: standard deviation of the width along the skeleton, over its mean.
        ends: ends of strokes per 100 pixels of skeleton, without those at the frame; a gap makes two, a dot has two.
        junctions: crossings and branches per 100 pixels of skeleton.
        pieces: number of connected pieces of ink.
        specks: number of pieces that are at most as long as two stroke widths.
        edge: width of an edge in pixels, from 10 to 90 % of the step from stroke to paper; only pixels within 3 pixels
            of ink count.
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


FAR = 10.0  # units: the distance from a picture that has no strokes, or no paper
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
# These change with `level` only through what it counts as ink.
SHAPE = ("width", "width_spread", "ends", "junctions", "pieces", "specks")


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
        branches = _branches(skeleton)
        inside = distance < _to_frame(*skeleton.shape)
        labels, pieces = ndimage.label(ink, np.ones((3, 3)))
        boxes = ndimage.find_objects(labels)
        sides = np.array([max(part.stop - part.start for part in box) for box in boxes])
        strokes |= {
            "width": float(widths.mean()),
            "width_spread": float(widths.std() / widths.mean()),
            "ends": 100 * int(np.maximum(2 - branches, 0)[skeleton & inside].sum()) / length,
            "junctions": 100 * ndimage.label(branches >= 3, np.ones((3, 3)))[1] / length,
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
            strokes["edge"] = _edge_width(grey, ~far, strokes["stroke"], paper)
    return Strokes(**strokes)


def equal_ink_level(images: Iterable[Image.Image], ink: float) -> float:
    """Return the level of `measure_strokes` at which the mean share of ink in the pictures is closest to `ink`.

    Two sets that are measured at their levels for one share differ in the shape of their strokes, and not in how black
    a tone curve would make them. Pictures of few greys can miss the share: look at the `ink` that they have there.
    """
    if not (isinstance(ink, int | float) and 0 < ink < 1):
        raise InputError(f"`ink` must be a share between 0 and 1, got {ink!r}")
    histograms = [np.array(image.convert("L").histogram()) / (image.width * image.height) for image in images]
    if not histograms:
        raise InputError("`images` must contain at least one picture")
    shares = np.cumsum(np.mean(histograms, 0))[:-1]  # of greys up to 0, 1, ... 254
    return float(np.abs(shares - ink).argmin() + 0.5) / 255


@dataclass(frozen=True)
class Difference:
    """Difference of a measure between two sets of pictures.

    Attributes:
        mean: of the set, over the pictures that have the measure; NaN if none has.
        difference: from the mean of the reference.
        interval: half of the 95 % interval of the difference (Welch's t, pictures as draws); NaN for a single picture.
        distance: Wasserstein distance of the two distributions, in UNITS of the measure; a picture that lacks it, like
            the width on a blank page, is FAR from one that has it.
    """

    mean: float
    difference: float
    interval: float
    distance: float


def stroke_differences(strokes: Sequence[Strokes], reference: Sequence[Strokes]) -> dict[str, Difference]:
    """Compare each measure of a set of pictures with that of a reference set, by name. InputError for empty sets."""
    if not (strokes and reference):
        raise InputError("`strokes` and `reference` must contain at least one picture")
    differences = {}
    for name, unit in UNITS.items():
        values, true = (np.array([getattr(item, name) for item in group]) for group in (strokes, reference))
        differences[name] = _difference(values, true, unit)
    return differences


def _difference(values: np.ndarray, true: np.ndarray, unit: float) -> Difference:
    stats = optional("scipy.stats", "train")
    lacking = abs(np.isnan(values).mean() - np.isnan(true).mean())
    values, true = values[~np.isnan(values)], true[~np.isnan(true)]
    if not (len(values) and len(true)):
        return Difference(float(values.mean()) if len(values) else math.nan, math.nan, math.nan, FAR * float(lacking))
    half = math.nan
    if min(len(values), len(true)) > 1:
        errors = [(group.var(ddof=1) / len(group), len(group)) for group in (values, true)]
        error = sum(squared for squared, _ in errors)
        freedom = error**2 / sum(squared**2 / (count - 1) for squared, count in errors) if error else 1
        half = float(stats.t.ppf(0.975, freedom) * math.sqrt(error))
    distance = lacking * FAR + (1 - lacking) * stats.wasserstein_distance(values, true) / unit
    return Difference(float(values.mean()), float(values.mean() - true.mean()), half, float(distance))


def stroke_distance(differences: Mapping[str, Difference]) -> float:
    """Return the mean of the distances of all measures in UNITS, each at most FAR, with equal weights; 0 if equal."""
    if not differences:
        raise InputError("`differences` is empty")
    return statistics.fmean(min(x.distance, FAR) for x in differences.values())


def mean_strokes(strokes: Sequence[Strokes]) -> dict[str, float]:
    """Return the mean of each measure over the drawings that have it. InputError without drawings."""
    if not strokes:
        raise InputError("`strokes` must contain at least one drawing")
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
    strokes = f"{means['ink']:.1%} ink, strokes {means['width']:.1f} px wide with {means['ends']:.1f} ends per 100 px"
    if math.isnan(means["paper"]):
        return f"{strokes}, no paper between them"
    return f"{strokes}, paper {means['paper']:.2f} of white, tint {means['tint']:.2f}"


def _branches(skeleton: np.ndarray) -> np.ndarray:
    """Return the number of branches that leave each pixel of a skeleton, (H, W): 1 at an end, 3 or more at a junction.

    It is the number of changes from paper to ink around the pixel (Rutovitz 1966); 3 in a block of 2 x 2 pixels, which
    thinning leaves where two strokes cross.
    """
    padded = np.pad(skeleton, 1)
    height, width = skeleton.shape
    around = [(0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0), (0, 0)]
    ring = np.stack([padded[y : y + height, x : x + width] for y, x in around])
    blocks = padded[1:, 1:] & padded[:-1, 1:] & padded[1:, :-1] & padded[:-1, :-1]  # by their last pixel
    in_block = blocks[1:, 1:] | blocks[:-1, 1:] | blocks[1:, :-1] | blocks[:-1, :-1]
    return np.where(in_block, 3, (~ring & np.roll(ring, -1, 0)).sum(0)) * skeleton


def _to_frame(height: int, width: int) -> np.ndarray:
    """Return the distance of each pixel from the frame, (H, W), 0 for the outermost."""
    rows, columns = (np.minimum(np.arange(size), np.arange(size)[::-1]) for size in (height, width))
    return np.minimum(rows[:, None], columns)


def _edge_width(grey: np.ndarray, near: np.ndarray, stroke: float, paper: float) -> float:
    """Return the area of the edges `near` ink, from 10 to 90 % of the step, over the length of the outline."""
    if min(grey.shape) < 2:
        return math.nan
    step = (grey - stroke) / max(paper - stroke, 1 / 255)
    reach = np.maximum(np.hypot(*np.gradient(step)), 1 / 255) / 2
    inside = np.clip(step + reach, 0.1, 0.9) - np.clip(step - reach, 0.1, 0.9)  # of the greys that a pixel spans
    area = (inside / (2 * reach))[near].sum()
    outline = optional("skimage.measure", "train").find_contours(step, 0.5, mask=near)
    length = sum(np.linalg.norm(np.diff(line, axis=0), axis=1).sum() for line in outline)
    return float(area / length) if length else math.nan
