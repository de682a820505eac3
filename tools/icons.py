"""Make a pipeline in SD-1.5's latents that knows icons in colours, and a judge of them.

    python -m tools.icons --dataset_name concepts --taesd madebyollin/taesd --output_dir icons
    python -m research.term --pipeline icons --judge icons/judge.safetensors --results icons.jsonl

Two thirds of the hands draw what the base model and the judge learn, the others what LoRAs learn. The base model
starts from the embedded pipeline and sees the icons at 128 pixels, moved and turned, in one colour on another, under
any caption; so a LoRA has to make black lines on white of them. TAESD encodes to the latents of SD-1.5 and decodes.
"""

import argparse
import random
from collections import defaultdict
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision.transforms import v2

from research import judge as judging
from tools.make_tiny_sd import CAPTIONS, SIZE, TINY_SD, caption, crayons, denoising_loss, encode, fit, images_of

NAMES = (
    *("sun", "flag", "lock", "eye", "calendar", "trash", "user", "briefcase"),
    *("shopping-cart", "fire", "megaphone", "thermometer", "bank", "palette", "tag", "database"),
)
DRAWINGS, JUDGE = "drawings.safetensors", "judge.safetensors"  # in the folder
MARGIN = 8  # of white, which icons leave out
LEARNED, TRUE = 10, 20  # drawings of a thing that LoRAs learn from, and that their pictures are compared with
COLOURS = 3  # in which the base model sees each drawing


def read(dataset: str) -> dict[str, dict[bool, list[Tensor]]]:
    """By name, and by whether the hand is kept for LoRAs: (3, 128, 128) uint8 drawings."""
    rows = datasets.load_dataset(dataset, split="train")
    names, hands = rows.features["label"].names, sorted(set(rows["set"]))
    random.Random(0).shuffle(hands)
    kept, drawings = set(hands[: len(hands) // 3]), defaultdict(lambda: {True: [], False: []})
    side = SIZE - 2 * MARGIN
    for row in rows:
        if names[row["label"]] in NAMES:
            image = row["image"].convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
            page = ImageOps.expand(image, MARGIN, "white")
            drawings[names[row["label"]]][row["set"] in kept].append(v2.functional.pil_to_tensor(page))
    return drawings


def coloured(drawings: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    """COLOURS of each drawing, moved and turned, and their classes."""
    move = v2.RandomAffine(10, (0.08, 0.08), (0.75, 1.1), 4, v2.InterpolationMode.BILINEAR, fill=255)
    labels = torch.tensor([label for label, drawn in enumerate(drawings) for _ in drawn]).repeat(COLOURS)
    images = torch.stack([move(image) for _ in range(COLOURS) for drawn in drawings for image in drawn])
    return crayons(images), labels


def train_base(args: argparse.Namespace, drawings: list[list[Tensor]]) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(TINY_SD, safety_checker=None, torch_dtype=torch.float32)
    vae = pipeline.vae = AutoencoderTiny.from_pretrained(args.taesd, torch_dtype=torch.float32).eval()
    cache = args.output_dir / "latents.safetensors"
    if not cache.exists():
        images, labels = coloured(drawings)
        save_file({"latents": encode(vae, images), "labels": labels}, cache)
    cached = load_file(cache)
    latents, labels = cached["latents"], cached["labels"]
    captions = list(dict.fromkeys(text for look in CAPTIONS.values() for text in look))
    texts = [caption(template, name) for template in captions for name in NAMES]
    ids = pipeline.tokenizer([*texts, ""], padding="max_length", return_tensors="pt").input_ids
    tokens, empty = ids[:-1].view(len(captions), len(NAMES), -1), ids[-1]
    models = torch.nn.ModuleDict({"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}).float().train()
    looks = [(latents, labels)]

    def loss(models):
        return denoising_loss(models, pipeline.scheduler, looks, tokens[None], empty, (args.batch_size,))

    models = fit(models, loss, args)
    pipeline.unet, pipeline.text_encoder = models["unet"], models["text_encoder"]
    return pipeline


def small(drawings: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    """As the judge sees them, (N, 3, 64, 64), and their classes."""
    images = images_of(torch.stack([image for drawn in drawings for image in drawn]))
    labels = [label for label, drawn in enumerate(drawings) for _ in drawn]
    return F.interpolate(images, judging.SIZE, mode="area"), torch.tensor(labels)


def train_judge(path: Path, drawings: list[list[Tensor]], unseen: list[list[Tensor]]) -> None:
    judge = judging.train(path, *small(drawings), epochs=20)
    images, labels = small(unseen)
    right = judge(images).argmax(1) == labels
    print(f"{right.float().mean():.1%} of {len(right)} drawings by other hands named", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", required=True, help="`concepts`, see benchmarks/README.md")
    parser.add_argument("--taesd", required=True, help="an AutoencoderTiny, folder or Hub id")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--bf16", action="store_true", help="for cores that know bfloat16; others only emulate it")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    args.work_dir = args.output_dir
    torch.manual_seed(args.seed)
    drawings = read(args.dataset_name)
    others, kept = ([drawings[name][is_kept] for name in NAMES] for is_kept in (False, True))
    chosen = {"learned": (kept, LEARNED), "true": (others, TRUE)}
    save_file(
        {part: torch.stack([x for drawn in sides for x in drawn[:n]]) for part, (sides, n) in chosen.items()},
        args.output_dir / DRAWINGS,
    )
    if not (args.output_dir / JUDGE).exists():
        train_judge(args.output_dir / JUDGE, others, kept)
    train_base(args, others).save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
