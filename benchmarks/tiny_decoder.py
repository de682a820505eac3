"""Distil an AutoencoderTiny for the demo's pipeline, as TAESD is one for SD-1.5, and see what it does to strokes.

    python -m benchmarks.tiny_decoder --output_dir tiny-decoder

It has TAESD's shape with 16 channels for 64, trains on drawings and photos as the pipeline's VAE did, and goes into
`train_lora_sketch.py --perceptual_decoder tiny-decoder`. Then both decoders are given the same latents, of drawings
that neither was trained on and of single strokes. A second call only compares.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.optimization import get_cosine_schedule_with_warmup
from PIL import Image, ImageDraw
from torch import Tensor

from benchmarks.make_tiny_sd import SIZE, encode, images_of, load_drawings, picture_loss, render
from sketch_perceptual.diffusion import decode
from sketch_perceptual.drawings import CLASSES, STYLES
from sketch_perceptual.networks.backbone import BUNDLED

TINY_SD = BUNDLED.parent / "tiny-sd"
STEPS, BATCH_SIZE, LEARNING_RATE = 4000, 16, 2e-3
WIDTHS = (0.5, 1, 1.5, 2, 3, 4)
HELD_OUT = 10_000  # the number of the first drawing of a class that no training has seen


def make_decoder() -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(16, 16, 16),
        decoder_block_out_channels=(16, 16, 16),
        num_encoder_blocks=(1, 3, 3),
        num_decoder_blocks=(3, 3, 1),
    )


def fit(tiny: AutoencoderTiny, drawings: Tensor, mean: Tensor, std: Tensor) -> None:
    parameters = list(tiny.decoder.parameters())
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE)
    schedule = get_cosine_schedule_with_warmup(optimizer, 100, STEPS)
    start = time.time()
    for step in range(1, STEPS + 1):
        rows = torch.randint(len(drawings), (BATCH_SIZE,))
        images, latents = images_of(drawings[rows]), mean[rows] + std[rows] * torch.randn_like(mean[rows])
        loss = picture_loss(tiny.decode(latents).sample - images)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            print(f"step {step}/{STEPS} loss {loss:.4f} {step / (time.time() - start):.2f} steps/s", flush=True)


def strokes(width: float, count: int = 64, side: int = SIZE) -> Tensor:
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


def held_out(style: str) -> Tensor:
    """(128, 3, 64, 64) uint8 drawings."""
    drawings = np.stack([render((name, HELD_OUT + n, style)) for name in CLASSES for n in range(8)])
    return torch.from_numpy(drawings).permute(0, 3, 1, 2)


@torch.no_grad()
def compare(vae: AutoencoderKL, tiny: AutoencoderTiny) -> None:
    """Error of held-out drawings, and how dark strokes come back: 100 % is the ink they had."""
    pictures = {style: images_of(held_out(style)) for style in ("photo", *STYLES)}
    pictures |= {f"strokes of {width:g} px": strokes(width) for width in WIDTHS}
    print("| | mean absolute error, VAE | tiny | ink kept, VAE | tiny |\n|---|---|---|---|---|")
    for name, images in pictures.items():
        latents = vae.encode(images).latent_dist.mean * vae.config.scaling_factor
        cells = []
        for decoded in (decode(vae, latents), decode(tiny, latents)):
            ink = (1 - images).mean(1)  # on the strokes themselves, weighted by how dark they are
            kept = ((1 - decoded.clamp(-1, 1)).mean(1) * ink).sum() / ink.square().sum()
            cells.append((float((decoded - images).abs().mean() / 2), float(kept)))
        errors, inks = zip(*cells, strict=True)
        print(f"| {name} | {' | '.join(f'{x:.3f}' for x in errors)} | {' | '.join(f'{x:.0%}' for x in inks)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    vae = AutoencoderKL.from_pretrained(TINY_SD, subfolder="vae", torch_dtype=torch.float32)
    if not (args.output_dir / "config.json").exists():
        args.output_dir.mkdir(parents=True, exist_ok=True)
        photos = load_drawings(("photo",), 256, args.output_dir / "photos.npy")
        drawings = torch.cat([photos, load_drawings(STYLES, 96, args.output_dir / "sketches.npy")])
        mean, std = (part * vae.config.scaling_factor for part in encode(vae, drawings))
        tiny = make_decoder()
        fit(tiny, drawings, mean, std)
        tiny.save_pretrained(args.output_dir)
    compare(vae, AutoencoderTiny.from_pretrained(args.output_dir))


if __name__ == "__main__":
    main()
