"""Drawings twice as wide as high, cropped, padded or in buckets: what is drawn, and the time of a step.

    python -m benchmarks.judge --output judge.safetensors
    OMP_NUM_THREADS=1 python -m benchmarks.shapes --judge judge.safetensors --figure shapes.png

Each page is one drawing, stretched to twice its width. A LoRA of the demo's pipeline is trained on the pages by each
`--fit` and each seed, with equal steps, and draws in the shape that it was trained at. `recognised` is the share that
the judge names once a picture is where it belongs on its page, white where `crop` left it out, and the page is made
square again; `pages` is the same for the drawings after that fit. Time is the processor's, which other work on the
machine does not lengthen much.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageOps
from torch import Tensor

from benchmarks.judge import SEED, SIZE, load_judge
from benchmarks.make_tiny_sd import TINY_SD
from benchmarks.term import COMMON, prompt
from sketch_perceptual import to_pil, to_tensor
from sketch_perceptual.drawings import CLASSES, draw
from sketch_perceptual.figures import image_grid
from sketch_perceptual.seeds import generator

PAGES, DRAWN = 24, 4  # of each thing
SHAPES = {"crop": (128, 128), "pad": (128, 128), "bucket": (160, 80)}  # width, height of what each is trained at


def page(name: str, number: int, seed: int = 0) -> Image.Image:
    return draw(name, number, seed, size=256).resize((256, 128), Image.Resampling.LANCZOS)


def write_pages(folder: Path) -> None:
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for number in range(PAGES):
            page(name, number).save(folder / name / f"{number}.png")


def fitted(fit: str, image: Image.Image) -> Tensor:
    """A page as a LoRA sees it, (3, height, width)."""
    if fit == "crop":
        image = image.crop((64, 0, 192, 128))
    if fit == "pad":
        image = ImageOps.pad(image, (256, 256), color="white")
    return to_tensor(image.resize(SHAPES[fit], Image.Resampling.LANCZOS))


def on_page(fit: str, images: Tensor) -> Tensor:
    """Pictures (N, 3, height, width) of a fit back on their pages, made square, (N, 3, SIZE, SIZE)."""
    height, width = images.shape[-2:]
    if fit == "crop":
        images = F.pad(images, (width // 2, width // 2), value=1.0)
    if fit == "pad":
        images = images[:, :, height // 4 : -height // 4]
    return F.interpolate(images, (SIZE, SIZE), mode="bicubic", antialias=True).clamp(-1, 1)


def train(fit: str, data: Path, output: Path, steps: str, seed: str) -> float:
    """Seconds of the processor that a whole training takes."""
    command = f"""train_lora_sketch.py --pretrained_model_name_or_path {TINY_SD} {COMMON} --train_data_dir {data}
        --fit {fit} --resolution 128 --output_dir {output} --seed {seed} --lr_warmup_steps 0 --report_to none
        --snr_gamma 1 --feature_dir {output.parent}/features --max_train_steps {steps}""".split()
    start = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    subprocess.run([sys.executable, *command], check=True)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - start


@torch.no_grad()
def pictures(lora: Path, fit: str) -> Tensor:
    """(16 x DRAWN, 3, height, width), in the shape of training."""
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
    return torch.stack(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", required=True, help="of benchmarks.judge")
    parser.add_argument("--figure", type=Path, required=True, help="what the last seed draws")
    parser.add_argument("--steps", default="300", help="of training")
    parser.add_argument("--seeds", nargs="+", default=["1", "2"])
    args = parser.parse_args()
    judge, labels = load_judge(args.judge), torch.arange(len(CLASSES)).repeat_interleave(DRAWN)
    rows: dict[str, list[Image.Image]] = {}

    @torch.no_grad()
    def recognised(images: Tensor) -> float:
        return float((judge(images).argmax(1) == labels).float().mean())

    print("| fit | seed | seconds a step | recognised | pages |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        write_pages(Path(folder, "pages"))
        for seed in args.seeds:
            for fit in SHAPES:
                output = Path(folder, f"{fit}-{seed}")
                runs = ("1", "1", args.steps)  # the first one encodes
                _, one, whole = (train(fit, Path(folder, "pages"), output, steps, seed) for steps in runs)
                images = on_page(fit, pictures(output, fit))
                true = [fitted(fit, page(name, n, SEED + 2)) for name in CLASSES for n in range(DRAWN)]
                seconds = (whole - one) / (int(args.steps) - 1)
                shares = [f"{recognised(x):.0%}" for x in (images, on_page(fit, torch.stack(true)))]
                print("|", " | ".join([fit, seed, f"{seconds:.2f}", *shares]), "|", flush=True)
                rows[fit] = [to_pil(image).resize((128, 64)) for image in images[::DRAWN]]
    columns = {name: [rows[fit][place] for fit in SHAPES] for place, name in enumerate(CLASSES)}
    image_grid(columns, list(SHAPES), 96).save(args.figure)


if __name__ == "__main__":
    main()
