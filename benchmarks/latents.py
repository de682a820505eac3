"""What SD-1.5's own latents do to strokes, and which target brings a prediction nearer to the truth.

    python -m benchmarks.latents --taesd madebyollin/taesd --openmoji openmoji

TAESD encodes to and decodes from the latents of SD-1.5; its decoder stands in for the VAE's. `--openmoji` is a data
set with OpenMoji's drawings in `line`. Prints what is left of strokes and drawings; then, for latents that are off by
a share of noise or of another drawing, the cosine between the way that a loss pulls them and the way to the truth.
"""

import argparse

import datasets
import numpy as np
import torch
from diffusers import AutoencoderTiny
from PIL import Image, ImageDraw
from torch import Tensor

from benchmarks.make_tiny_sd import images_of
from sketch_perceptual import PerceptualLoss, to_tensor
from sketch_perceptual.diffusion import Latents
from sketch_perceptual.drawings import CLASSES, draw
from sketch_perceptual.losses import PixelLoss, StyleLoss
from sketch_perceptual.seeds import generator

WIDTHS = (0.5, 1, 1.5, 2, 3, 4)
COUNT, CROP = 16, 256
ERRORS = {"noise": (0.1, 0.3, 1.0), "another drawing": (0.1, 0.3)}


def strokes(width: float, count: int, side: int) -> Tensor:
    """(count, 3, side, side) in [-1, 1]: black lines of that many pixels on white, in all directions."""
    images, scale, draws = [], 8, np.random.default_rng(0)
    for angle in np.linspace(0, np.pi, count, endpoint=False):
        x, y = (side / 2 + draws.uniform(-side / 8, side / 8, 2)) * scale
        along = np.array([np.cos(angle), np.sin(angle)]) * side / 3.2 * scale
        paper = Image.new("L", (side * scale, side * scale), "white")
        ends = (x - along[0], y - along[1], x + along[0], y + along[1])
        ImageDraw.Draw(paper).line(ends, "black", round(width * scale))
        images.append(np.asarray(paper.resize((side, side), Image.Resampling.BOX)))
    return images_of(torch.from_numpy(np.stack(images))[:, None].expand(-1, 3, -1, -1))


def drawings(size: int) -> Tensor:
    """(COUNT, 3, size, size) in [-1, 1], embedded ones that no network has seen."""
    return torch.stack([to_tensor(draw(name, 20_000, size=size)) for name in CLASSES[:COUNT]])


def openmoji(folder: str) -> Tensor:
    """(COUNT, 3, 256, 256) in [-1, 1], the first of as many classes."""
    rows = datasets.load_dataset(folder)["train"]
    firsts = {label: row for row, label in reversed(list(enumerate(rows["label"])))}
    return torch.stack([to_tensor(rows[firsts[label]]["line"].convert("RGB")) for label in sorted(firsts)[:COUNT]])


@torch.no_grad()
def what_is_left(vae: AutoencoderTiny, loss: PerceptualLoss, pictures: dict[str, Tensor]) -> None:
    print("| | PSNR, dB | ink kept | chroma | perceptual loss |\n|---|---|---|---|---|")
    for name, images in pictures.items():
        decoded = torch.cat([Latents(vae).decode(vae.encode(part).latents).clamp(-1, 1) for part in images.split(4)])
        psnr = -10 * ((decoded - images) / 2).square().mean((1, 2, 3)).log10()
        ink = (1 - images).mean(1)  # on the strokes themselves, weighted by how dark they are
        kept = ((1 - decoded).mean(1) * ink).sum() / ink.square().sum()
        chroma = (decoded.amax(1) - decoded.amin(1)).mean() / 2
        value = torch.cat([loss(*pair) for pair in zip(decoded.split(4), images.split(4), strict=True)]).mean()
        print(f"| {name} | {psnr.mean():.1f} | {kept:.0%} | {chroma:.3f} | {value:.3f} |", flush=True)


def off(latents: Tensor, kind: str, size: float) -> Tensor:
    """Latents that are off by noise of `size` deviations, or by that share of the way to the next drawing's."""
    if kind == "noise":
        return size * latents.std() * torch.randn(latents.shape, generator=generator("latents", str(size)))
    return size * (latents.roll(1, 0) - latents)


def which_way(vae: AutoencoderTiny, images: Tensor) -> None:
    """The middle CROP pixels of each image, as the term sees a square of it."""
    start = (images.shape[-1] - CROP) // 2
    images = images[..., start:, start:][..., :CROP, :CROP]
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latents for part in images.split(4)])
        targets = {
            "image": images,
            "reconstruction": torch.cat([Latents(vae).decode(z) for z in latents.split(4)]).clamp(-1, 1),
        }
    losses = {"pixel": PixelLoss(), "gram": StyleLoss(), "attention_vgg": PerceptualLoss(resolution=64)}
    for loss in losses.values():
        loss.requires_grad_(False)
    print("| off by | " + " | ".join(f"{name}, {target}" for name in losses for target in targets) + " |")
    print("|---" * (1 + len(losses) * len(targets)) + "|")
    for kind, sizes in ERRORS.items():
        for size in sizes:
            error, cells = off(latents, kind, size), []
            for loss in losses.values():
                for target in targets.values():
                    cosines = []
                    for z, e, goal in zip(latents.split(4), error.split(4), target.split(4), strict=True):
                        own = (z + e).requires_grad_()
                        (pull,) = torch.autograd.grad(loss(Latents(vae).decode(own), goal).sum(), own)
                        cosines.append(torch.cosine_similarity(pull.flatten(1), e.flatten(1)))
                    found = torch.cat(cosines)
                    cells.append(f"{found.mean():.3f} +- {1.96 * found.std() / len(found) ** 0.5:.3f}")
            print(f"| {size:g} of {kind} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--taesd", required=True, help="an AutoencoderTiny, folder or Hub id")
    parser.add_argument("--openmoji", required=True, help="a folder that `datasets` reads")
    args = parser.parse_args()
    vae = AutoencoderTiny.from_pretrained(args.taesd, torch_dtype=torch.float32).eval().requires_grad_(False)
    pictures = {f"strokes of {width:g} px": strokes(width, COUNT, 512) for width in WIDTHS}
    pictures |= {
        "embedded, 512 px": drawings(512),
        "embedded, 256 px": drawings(256),
        "OpenMoji, 256 px": openmoji(args.openmoji),
    }
    what_is_left(vae, PerceptualLoss(resolution=64), pictures)
    for name in ("embedded, 512 px", "OpenMoji, 256 px"):
        print(f"\n{name}:")
        which_way(vae, pictures[name])


if __name__ == "__main__":
    main()
