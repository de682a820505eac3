"""Measure how often a distance finds the same thing nearer, and how it grows with what is done to a drawing.

    python -m research.agreement --trunk vgg16_hed.safetensors --labelled unseen=unseen \
      --held_out concepts=concepts --colour_pairs openmoji=openmoji --figure tolerance.png

Every row below is one distance; each set is of triplets (an anchor, the same thing, another thing), 50 % is chance:

- --labelled, --held_out: a data set of things by hands; the same thing by another hand, another thing by that hand.
  Of --held_out only the hands that train_backbone.py --group_column keeps apart;
- redraws: embedded scenes in another style, moved and bent, against other scenes of their class;
- --colour_pairs: a line drawing, its coloured twin, another coloured picture of its class.

Intervals are 95 % of the bootstrap over subjects. `--trunk` is VGG-16 for the rows that are not ours: LPIPS and DISTS
with the heads that their packages ship (pip install lpips DISTS-pytorch).
"""

import argparse
import functools
import json
import random
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from research.learned import FITTED_CLASSES, soft_units
from sketch_perceptual import AttentionVGG16, PerceptualLoss, drawings, load_backbone, to_tensor
from sketch_perceptual.drawings.outlines import turn
from sketch_perceptual.drawings.render import STROKES, sketch
from sketch_perceptual.drawings.scene import Scene
from sketch_perceptual.losses import DEFAULT_LAYERS, LPIPSLoss, calibrate, gram_matrix, soft_distance
from sketch_perceptual.losses.calibration import gram_distance, reference_drawings, unrelated
from sketch_perceptual.networks.backbone import BUNDLED
from tools.triplets import Triplets, by_hands, colour_pairs, load_labelled, redraws, synonyms

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYERS_LEARNED = "soft, weights of layers learned: the default"
CHANNELS_LEARNED = "soft, weights of channels learned"
Distances = Callable[[Tensor, Tensor], dict[str, Tensor]]  # all drawings, pairs of positions (2, N) -> (N,) a row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--trunk", required=True, help="a .safetensors with VGG-16 weights")
    add("--models", nargs="+", default=[f"bundled={BUNDLED}"], metavar="NAME=BACKBONE", help="rows for each")
    add("--labelled", nargs="*", default=[], metavar="NAME=DATASET")
    add("--held_out", nargs="*", default=[], metavar="NAME=DATASET")
    add("--colour_pairs", nargs="*", default=[], metavar="NAME=DATASET")
    add("--channels", type=Path, help="the channels.json of research.learned for the first of --models")
    add("--triplets", type=int, default=1000, help="of each set")
    add("--side", type=int, default=64, help="drawings are scored at this size")
    add("--output", type=Path, help="write the figures as JSON")
    add("--figure", type=Path, help="measure and draw the tolerance curves")
    args = parser.parse_args()
    channels = json.loads(args.channels.read_text()) if args.channels else None
    models = dict(value.split("=", 1) for value in args.models) | {"vgg": args.trunk}
    backbones = {name: load_backbone(path, "none", DEFAULT_LAYERS).to(DEVICE) for name, path in models.items()}
    judges: list[Distances] = [pixel_rows]
    for name, backbone in backbones.items():
        own_channels = channels if name == next(iter(models)) else None
        judges.append(functools.partial(network_rows, backbone, name, own_channels))
    judges += [lpips_rows(args.trunk), dists_rows(args.trunk)]
    scores = {}
    for name, triplets in build_sets(args).items():
        scores[name] = accuracies(triplets, measure(judges, triplets, args.side, name))
    print(table(scores))
    if args.output:
        args.output.write_text(json.dumps(scores, indent=2))
    if args.figure:
        curves = tolerance(judges, args.side)
        print(curves_table(curves))
        plot(curves).savefig(args.figure)
        print(drift(backbones))


def build_sets(args) -> dict[str, Triplets]:
    sets = {}
    for option in ("labelled", "held_out"):
        for name, path in (value.split("=", 1) for value in getattr(args, option)):
            data = load_labelled(path)
            same_thing = synonyms(data)
            chosen = data.select(data.sides()[1]) if option == "held_out" else data
            sets[name] = by_hands(chosen, args.triplets, same_thing)
    others = [name for name in drawings.CLASSES if name not in FITTED_CLASSES]
    sets["redraws"] = redraws(args.triplets, 2 * args.side, others)
    for name, path in (value.split("=", 1) for value in args.colour_pairs):
        sets[name] = colour_pairs(path, args.triplets)
    return sets


def pixel_rows(images: Tensor, pairs: Tensor) -> dict[str, Tensor]:
    blurred = F.avg_pool2d(images, 8)
    return {
        "pixels, L1": (images[pairs[0]] - images[pairs[1]]).abs().mean((1, 2, 3)),
        "pixels after an 8x8 mean, L1": (blurred[pairs[0]] - blurred[pairs[1]]).abs().mean((1, 2, 3)),
    }


def network_rows(
    network: AttentionVGG16, name: str, channels: dict | None, images: Tensor, pairs: Tensor
) -> dict[str, Tensor]:
    """One pass through the network for all of its rows."""
    calibration = calibrate(network, DEFAULT_LAYERS)
    rows: dict[str, Any] = defaultdict(int)
    for layer, features in network.walk(images, DEFAULT_LAYERS):
        values, (a, b) = calibration[layer], features[pairs]
        raw = (a - b).abs().mean((1, 2, 3))
        gram = gram_distance(gram_matrix(a), gram_matrix(b))
        soft = soft_distance(a, b, values["softening"]).mean((1, 2))
        rows["raw L1, summed: the paper's words"] += raw
        rows["raw L1, balanced"] += raw / typical(network, layer)
        rows["Gram, summed"] += gram
        rows["Gram, balanced"] += gram / values["gram"]
        rows["soft, balanced"] += soft / values["distance"]
        rows[f"{layer}, raw L1"], rows[f"{layer}, soft"] = raw, soft
        if "weight" in values:
            rows[LAYERS_LEARNED] += values["weight"] * soft / values["distance"]
        if channels is not None:
            parts = (soft_units(a, values["softening"]) - soft_units(b, values["softening"])).square().mean((2, 3))
            rows[CHANNELS_LEARNED] += parts @ torch.tensor(channels[layer], device=DEVICE) / values["distance"]
    return {f"{name}, {row}": value for row, value in rows.items()}


@functools.cache
def typical(network: AttentionVGG16, layer: str) -> float:
    """Raw L1 between unrelated drawings."""
    features = network.taps(reference_drawings().to(DEVICE), [layer])[layer]
    return float(unrelated(lambda a, b: (a - b).abs().mean((1, 2, 3)), features))


def lpips_rows(trunk: str) -> Distances:
    loss = LPIPSLoss(trunk)
    return lambda images, pairs: {"lpips, its heads": loss(*images[pairs])}


def dists_rows(trunk: str) -> Distances:
    import torchvision
    from DISTS_pytorch import DISTS

    vgg16, plain = torchvision.models.vgg16, load_backbone(trunk, "none")

    def with_trunk(**_):
        network = vgg16()
        network.features.load_state_dict(plain.features.state_dict())
        return network

    torchvision.models.vgg16 = with_trunk
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            metric = DISTS().eval().to(DEVICE)
    finally:
        torchvision.models.vgg16 = vgg16
    return lambda images, pairs: {"DISTS, its weights": metric(*((images[pairs] + 1) / 2))}


@torch.inference_mode()
def measure(judges: list[Distances], triplets: Triplets, side: int, name: str, chunk: int = 25) -> dict[str, Tensor]:
    """Margins by which the other is farther than the same, for each row of the table and each triplet."""
    margins: dict[str, list[Tensor]] = {}
    for start in tqdm(range(0, len(triplets.rows), chunk), name):
        images, positions = triplets.tensors(range(start, min(start + chunk, len(triplets.rows))), side)
        anchor, same, other = positions.T
        images, pairs = images.to(DEVICE), torch.stack([anchor.repeat(2), torch.cat([same, other])]).to(DEVICE)
        for judge in judges:
            for row, values in judge(images, pairs).items():
                near, far = values.cpu().chunk(2)
                margins.setdefault(row, []).append(far - near)
    return {row: torch.cat(values) for row, values in margins.items()}


def accuracies(triplets: Triplets, margins: dict[str, Tensor], draws: int = 2000) -> dict[str, list[float]]:
    """Row -> share of triplets that are right, with the ends of its interval: subjects are drawn again, not rows."""
    subjects = {subject: number for number, subject in enumerate(dict.fromkeys(triplets.subjects))}
    owner = np.array([subjects[subject] for subject in triplets.subjects])
    chosen = np.random.default_rng(0).integers(len(subjects), size=(draws, len(subjects)))
    counts = np.bincount(owner, minlength=len(subjects))
    shares_of = {}
    for row, margin in margins.items():
        right = np.bincount(owner, weights=(margin > 0).double().numpy(), minlength=len(subjects))
        shares = right[chosen].sum(1) / counts[chosen].sum(1)
        shares_of[row] = [float((margin > 0).double().mean()), *map(float, np.quantile(shares, (0.025, 0.975)))]
    return shares_of


# What is done to a drawing, from little to much; x is what the curve shows.
CHANGES: dict[str, list[float]] = {
    "shift, % of the side": [1, 2, 4, 8, 16],
    "rotation, degrees": [2, 4, 8, 16, 32],
    "stroke width, times": [1.25, 1.5, 2, 3, 4],
    "strokes erased, %": [10, 25, 50, 75, 90],
    "noise, deviation": [0.05, 0.1, 0.2, 0.4, 0.8],
}
ANOTHER = "another scene"
# Which of two a person would call the larger change.
ORDER = [
    *(((change, levels[1]), (ANOTHER, 0)) for change, levels in CHANGES.items()),
    (("shift, % of the side", 2), ("strokes erased, %", 75)),
    (("rotation, degrees", 4), ("strokes erased, %", 75)),
    (("stroke width, times", 1.5), ("strokes erased, %", 75)),
    (("noise, deviation", 0.1), ("strokes erased, %", 75)),
    (("strokes erased, %", 10), ("rotation, degrees", 32)),
]
SHOWN = ("pixels, L1", "lpips, its heads", "DISTS, its weights", "vgg, raw L1, summed: the paper's words")
SHOWN += tuple(f"bundled, {row}" for row in ("raw L1, summed: the paper's words", "soft, balanced", LAYERS_LEARNED))


def change(scene: Scene, kind: str, level: float, side: int) -> Tensor:
    """The drawing of a scene after a change, by a hand that moves as before; a level of 0 is the drawing itself."""
    shapes, stroke = scene.shapes, STROKES["pen"]
    if level and kind.startswith("shift"):
        shapes = [replace(shape, points=shape.points + level / 100) for shape in shapes]
    elif level and kind.startswith("rotation"):
        shapes = [replace(shape, points=turn(shape.points, level, 0.5, 0.5)) for shape in shapes]
    elif level and kind.startswith("stroke width"):
        stroke = replace(stroke, width=level * max(stroke.width, stroke.thinnest / side))
    elif level and kind.startswith("strokes erased"):
        kept = round(len(shapes) * (1 - level / 100))
        shapes = [shapes[index] for index in sorted(random.Random(0).sample(range(len(shapes)), kept))]
    copy = Scene("")
    copy.shapes = shapes
    image = to_tensor(sketch(copy, stroke, side, random.Random(0)))
    if kind.startswith("noise"):
        image = (image + level * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    return image


@torch.inference_mode()
def tolerance(judges: list[Distances], side: int, per_class: int = 3) -> dict[str, dict[tuple[str, float], Tensor]]:
    """Row -> change -> the distance from each drawing to what became of it, in units of another scene's."""
    scenes = [drawings.compose(name, index, 5000) for name in drawings.CLASSES for index in range(per_class)]
    plain = torch.stack([change(scene, "", 0, side) for scene in scenes])
    changed = {(ANOTHER, 0.0): plain.roll(per_class, 0)}
    for kind, levels in CHANGES.items():
        for level in levels:
            changed[kind, level] = torch.stack([change(scene, kind, level, side) for scene in scenes])
    curves: dict[str, dict[tuple[str, float], Tensor]] = {}
    pairs = torch.arange(2 * len(scenes), device=DEVICE).view(2, -1)
    for key, images in tqdm(changed.items(), "tolerance"):
        for judge in judges:
            for row, values in judge(torch.cat([plain, images]).to(DEVICE), pairs).items():
                curves.setdefault(row, {})[key] = values.cpu()
    return {row: {at: x / values[ANOTHER, 0].mean() for at, x in values.items()} for row, values in curves.items()}


def steadiness(curve: dict[tuple[str, float], Tensor]) -> tuple[float, float]:
    """The share of steps from one level to the next that increase, and of ORDER's pairs that are as a person says."""
    steps = [
        curve[kind, more] > (curve[kind, less] if less else 0)
        for kind, levels in CHANGES.items()
        for less, more in zip([0, *levels], levels, strict=False)
    ]
    order = [curve[less] < curve[more] for less, more in ORDER]
    return float(torch.cat(steps).double().mean()), float(torch.cat(order).double().mean())


@torch.inference_mode()
def drift(backbones: dict[str, AttentionVGG16], sides: tuple[int, ...] = (32, 48, 64, 96, 128, 224)) -> str:
    """Table of the loss of unrelated drawings at other sizes than that of the calibration."""
    lines = ["| pixels a side | " + " | ".join(map(str, sides)) + " |", "|---" * (len(sides) + 1) + "|"]
    for name, backbone in backbones.items():
        values = (float(unrelated(PerceptualLoss(backbone), reference_drawings(side).to(DEVICE))) for side in sides)
        lines.append(f"| {name} | " + " | ".join(f"{value:.2f}" for value in values) + " |")
    return "\n".join(lines)


def table(scores: dict[str, dict[str, list[float]]]) -> str:
    rows = list(next(iter(scores.values())))
    lines = ["| distance | " + " | ".join(scores) + " |", "|---" * (len(scores) + 1) + "|"]
    for row in rows:
        cells = (
            f"{share:.1%} ({low:.1%} to {high:.1%})" for share, low, high in (scores[name][row] for name in scores)
        )
        lines.append(f"| {row} | {' | '.join(cells)} |".replace("%", " %"))
    return "\n".join(lines)


def curves_table(curves: dict[str, dict[tuple[str, float], Tensor]]) -> str:
    lines = ["| distance | grows with each step | ordered as a person would |", "|---|---|---|"]
    for row, curve in curves.items():
        if row in SHOWN or "balanced" in row or row.endswith("4_3, soft"):
            grows, ordered = steadiness(curve)
            lines.append(f"| {row} | {grows:.1%} | {ordered:.1%} |".replace("%", " %"))
    return "\n".join(lines)


def plot(curves: dict[str, dict[tuple[str, float], Tensor]]) -> Figure:
    figure = Figure((4 * len(CHANGES), 4), layout="constrained")
    panels = figure.subplots(1, len(CHANGES), sharey=True)
    for axes, (kind, levels) in zip(panels, CHANGES.items(), strict=True):
        for row in (row for row in SHOWN if row in curves):
            means = [float(curves[row][kind, level].mean()) for level in levels]
            axes.plot([float("times" in kind), *levels], [0, *means], ".-", label=row)
        axes.axhline(1, color="grey", linestyle=":")
        axes.set(title=kind, ylim=(0, 1.6))
    panels[0].set_ylabel("distance, in units of another scene's")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


if __name__ == "__main__":
    main()
