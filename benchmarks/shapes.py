"""Drawings twice as wide as high, cropped, padded or in buckets: what is drawn, and the time of a step.

    python -m benchmarks.judge --output judge.safetensors
    python -m benchmarks.shapes --judge judge.safetensors --figure shapes.png

Each page has two drawings of one thing side by side. A LoRA of the demo's pipeline is trained on them by each `--fit`,
with equal steps, and draws pages of the shape that it was trained at. `both` is the share of pages whose two halves
the judge recognises; `whole` that of pages that it recognises as one drawing, which is what a cropped page is.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from benchmarks.judge import SIZE, load_judge
from benchmarks.term import COMMON, prompt
from benchmarks.tiny_decoder import TINY_SD
from sketch_perceptual import to_pil, to_tensor
from sketch_perceptual.drawings import CLASSES, draw
from sketch_perceptual.figures import image_grid
from sketch_perceptual.seeds import generator

PAGES, DRAWN = 12, 4  # of each thing
SHAPES = {"crop": (64, 64), "pad": (64, 64), "bucket": (80, 40)}  # width, height of what each is trained at


def write_pages(folder: Path) -> None:
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for number in range(PAGES):
            page = Image.new("RGB", (256, 128))
            for half in (0, 1):
                page.paste(draw(name, 2 * number + half, size=128), (128 * half, 0))
            page.save(folder / name / f"{number}.png")


def train(fit: str, data: Path, output: Path, steps: str) -> float:
    """Seconds of a whole training."""
    command = f"""train_lora_sketch.py --pretrained_model_name_or_path {TINY_SD} {COMMON} --train_data_dir {data}
        --fit {fit} --resolution 64 --output_dir {output} --seed 1 --lr_warmup_steps 0 --report_to none
        --snr_gamma 5 --feature_dir {output}/features --max_train_steps {steps}""".split()
    start = time.monotonic()
    subprocess.run([sys.executable, *command], check=True)
    return time.monotonic() - start


@torch.no_grad()
def pictures(lora: Path, fit: str) -> Tensor:
    """(16 x DRAWN, 3, height, width) of the pages' own proportions, but for what was cropped."""
    pipeline = StableDiffusionPipeline.from_pretrained(TINY_SD, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.load_lora_weights(lora)
    width, height = SHAPES[fit]
    found = []
    for name in CLASSES:
        draws = [generator("shapes", name, number) for number in range(DRAWN)]
        images = pipeline(
            [prompt(name)] * DRAWN,
            generator=draws,
            guidance_scale=4,
            num_inference_steps=25,
            width=width,
            height=height,
        ).images
        found += [to_tensor(image) for image in images]
    images = torch.stack(found)
    return images[:, :, height // 4 : -height // 4] if fit == "pad" else images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", required=True, help="of benchmarks.judge")
    parser.add_argument("--figure", type=Path, required=True)
    parser.add_argument("--steps", default="300", help="of training")
    args = parser.parse_args()
    judge, labels = load_judge(args.judge), torch.arange(len(CLASSES)).repeat_interleave(DRAWN)
    rows: dict[str, list[Image.Image]] = {name: [] for name in CLASSES}

    @torch.no_grad()
    def recognised(images: Tensor) -> Tensor:
        return judge(F.interpolate(images, (SIZE, SIZE), mode="bicubic").clamp(-1, 1)).argmax(1) == labels

    print("| | seconds a step | both | whole |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        write_pages(Path(folder, "pages"))
        for fit in SHAPES:
            output = Path(folder, fit)
            runs = ("1", "1", args.steps)  # the first one encodes
            _, one, all_steps = (train(fit, Path(folder, "pages"), output, steps) for steps in runs)
            images = pictures(output, fit)
            both = recognised(images.chunk(2, 3)[0]) & recognised(images.chunk(2, 3)[1])
            seconds = (all_steps - one) / (int(args.steps) - 1)
            whole = recognised(images).float().mean()
            print(f"| {fit} | {seconds:.2f} | {both.float().mean():.0%} | {whole:.0%} |", flush=True)
            for name, image in zip(CLASSES, images[::DRAWN], strict=True):
                rows[name].append(to_pil(image))
    image_grid(rows, list(SHAPES), 96).save(args.figure)


if __name__ == "__main__":
    main()
