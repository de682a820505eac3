"""Fit how much each layer of a backbone counts to which drawings show the same thing, and write it with that.

    python -m research.learned --dataset_name concepts --output_dir attention-vgg16

Weights that are not negative, so that of triplets the same thing lies nearer: one a layer, which goes into the
backbone's calibration, and one a channel, as LPIPS learned its heads from judgements (Zhang et al. 2018), which goes
into channels.json, for `research.agreement` to judge. Triplets are of the hands that `train_backbone.py
--group_column set` trains on and of redraws of half of the embedded classes, each drawing turned, moved and scaled a
little. Nothing that `research.agreement` tests is seen.
"""

import argparse
import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sketch_perceptual import load_backbone
from sketch_perceptual.drawings import CLASSES
from sketch_perceptual.losses import DEFAULT_LAYERS, calibrate
from sketch_perceptual.losses.calibration import SIDE
from sketch_perceptual.networks.backbone import BUNDLED
from tools.triplets import Triplets, by_hands, load_labelled, redraws, synonyms

FITTED_CLASSES = CLASSES[::2]  # the others are for research.agreement


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--backbone", default=str(BUNDLED))
    add("--dataset_name", required=True, help="drawings of things by hands: columns image, label, set")
    add("--side", type=int, default=SIDE, help="of the drawings in pixels: what the backbone was tuned at")
    add("--triplets", type=int, default=2000)
    add("--redraws", type=int, default=500)
    add("--decay", type=float, default=0.05, help="how strongly weights are held to 1")
    add("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backbone = load_backbone(args.backbone, layers=DEFAULT_LAYERS).requires_grad_(False).to(device)
    backbone.calibration = {}
    calibrate(backbone, DEFAULT_LAYERS)
    data = load_labelled(args.dataset_name)
    same_thing = synonyms(data)
    train, _ = data.sides()
    sets = [
        by_hands(data.select(train), args.triplets, same_thing, seed=1),
        redraws(args.redraws, 2 * args.side, FITTED_CLASSES, seed=1),
    ]
    margins = [measure(backbone, triplets, args.side) for triplets in sets]
    widths = [backbone.features[index - 1].out_channels for index in backbone.find_taps(DEFAULT_LAYERS)]
    by_layer = [torch.stack([part.sum(1) for part in margin.split(widths, 1)], 1) for margin in margins]
    layers, channels = fit(by_layer, args.decay), fit(margins, args.decay)
    for triplets, one, other in zip(sets, by_layer, margins, strict=True):
        shares = (f"{(margin > 0).float().mean():.1%}" for margin in (one.sum(1), one @ layers, other @ channels))
        print(f"{len(triplets.rows)} triplets, equal, layers, channels: {', '.join(shares)}")
    for name, weight in zip(DEFAULT_LAYERS, (layers / layers.sum()).tolist(), strict=True):
        backbone.calibration[name]["weight"] = round(weight, 3)
        print(f"{name}: {weight:.3f}")
    backbone.half().save_pretrained(args.output_dir)
    parts = zip(DEFAULT_LAYERS, channels.split(widths), strict=True)
    rounded = {name: [round(value, 3) for value in part.tolist()] for name, part in parts}
    (args.output_dir / "channels.json").write_text(json.dumps(rounded))


@torch.no_grad()
def measure(backbone, triplets: Triplets, side: int, chunk: int = 32) -> Tensor:
    """Margins by which the other is farther than the same, in each channel of each layer: (triplets, channels)."""
    draw, margins, weight = random.Random(0), [], next(backbone.parameters())
    for start in range(0, len(triplets.rows), chunk):
        rows = range(start, min(start + chunk, len(triplets.rows)))
        images, positions = triplets.tensors(rows, side)
        taps = backbone.walk(torch.stack([jitter(image, draw) for image in images]).to(weight), DEFAULT_LAYERS)
        margins.append(torch.cat([_channels(backbone, name, features, positions) for name, features in taps], 1).cpu())
    return torch.cat(margins)


def _channels(backbone, name: str, features: Tensor, positions: Tensor) -> Tensor:
    values = backbone.calibration[name]
    anchor, same, other = soft_units(features, values["softening"])[positions.T]
    same, other = ((anchor - x).square().mean((2, 3)) for x in (same, other))
    return (other - same) / values["distance"] / len(DEFAULT_LAYERS)


def soft_units(features: Tensor, softening: float) -> Tensor:
    """Soft unit vectors, which `soft_distance` compares."""
    return features * (features.square().sum(1, keepdim=True) + softening**2).rsqrt()


def jitter(image: Tensor, draw: random.Random) -> Tensor:
    angle, scale = torch.tensor(draw.uniform(-0.12, 0.12)), draw.uniform(0.95, 1.2)  # radians; above 1 is smaller
    turn = [[angle.cos(), -angle.sin(), draw.uniform(-0.1, 0.1)], [angle.sin(), angle.cos(), draw.uniform(-0.1, 0.1)]]
    grid = F.affine_grid(scale * torch.tensor(turn)[None], [1, *image.shape], align_corners=False)
    return F.grid_sample(image[None] - 1, grid, align_corners=False)[0] + 1  # paper all around


def fit(margins: list[Tensor], decay: float, temperature: float = 0.1, steps: int = 500) -> Tensor:
    """Weights >= 0 under which the margins, of whatever kind of triplet, are positive: logistic loss, held to 1."""
    weights = torch.ones(margins[0].shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=0.03)
    for _ in range(steps):
        loss = decay * (weights - 1).square().mean()
        for margin in margins:
            loss = loss + F.softplus(-(margin @ weights) / temperature).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            weights.clamp_(min=0)
    return weights.detach()


if __name__ == "__main__":
    main()
