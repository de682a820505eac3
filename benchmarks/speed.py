"""Measure the time and memory of the trainers, losses and searches, beside what others take, in turns in one run.

    python -m benchmarks.speed step --official diffusers/examples/text_to_image/train_text_to_image_lora.py
    python -m benchmarks.speed step --official ... --sd15 --resolution 128 --batch_size 1 --steps 8 --rounds 2
    python -m benchmarks.speed backbone --train_data_dir drawings --resolution 64 --pool_after_attention --head linear
    python -m benchmarks.speed style --examples examples/fast_neural_style/neural_style --resolution 128
    python -m benchmarks.speed losses --resolution 224
    python -m benchmarks.speed ranking
    python -m benchmarks.speed scan --count 50889
    python -m benchmarks.speed memory

`step`, `backbone` and `style` hand options that they do not know to the trainer. Ratios are of the times of one turn,
their median with the least and the most; below 1 is quicker than the first row. The tables are in research/speed.md.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count, islice
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import train_backbone
import train_lora_sketch
from sketch_perceptual import AttentionVGG16, PerceptualLoss
from sketch_perceptual.data import scan as scans
from sketch_perceptual.data.datasets import Images
from sketch_perceptual.diffusion.term import MARGIN
from sketch_perceptual.drawings import CLASSES, draw, write_folder
from sketch_perceptual.losses import DEFAULT_LAYERS, named_networks
from sketch_perceptual.measures.ranking import rank, search
from sketch_perceptual.networks.backbone import BUNDLED
from sketch_perceptual.networks.style_net import UPSAMPLING, JohnsonNet

ROOT = Path(__file__).resolve().parent.parent
TINY_SD = BUNDLED.parent / "tiny-sd"
WARM_UP = 3  # steps of a training that are not counted; compilation comes with the first
# SD-1.5's published configuration.
UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "sample_size": 512,
}
# Runs a script and leaves behind when its optimizer stepped, since the start, its peak memory, and its operations.
RECORDED = """
import time
start = time.perf_counter()
import contextlib, json, resource, runpy, sys
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.flop_counter import FlopCounterMode
times, operations, counter = [], [], FlopCounterMode(display=False)
cuda = torch.cuda.is_available()
def note(*call):
    if cuda:
        torch.cuda.synchronize()
    times.append(time.perf_counter() - start)
    operations.append(counter.get_total_flops() if counts else 0)
register_optimizer_step_pre_hook(note)
out, counts, before, sys.argv = sys.argv[1], sys.argv[2] == "True", sys.argv[3], sys.argv[4:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
exec(before)
with counter if counts else contextlib.nullcontext():
    runpy.run_path(sys.argv[0], run_name="__main__")
peak = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
json.dump({"times": times, "operations": operations, "peak": peak}, open(out, "w"))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs: dict[str, Callable] = {}

    def command(run: Callable, rounds: int = 3) -> Callable:
        name = run.__name__
        runs[name] = run
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__, allow_abbrev=False)
        command.add_argument("--rounds", type=int, default=rounds, help="turns of each row")
        return command.add_argument

    add = command(step)
    add("--official", required=True, help="diffusers' train_text_to_image_lora.py")
    add("--sd15", action="store_true", help="the size of SD-1.5, 4 GB on disk while it runs, in place of the demo's")
    add("--resolution", type=int, default=128)
    add("--batch_size", type=int, default=4)
    add("--steps", type=int, default=20, help="measured steps of a turn")
    add("--arms", nargs="+", help="only these rows, and the official script's")
    add("--mixed_precision", default="no", help="of all rows")
    add("--count", action=argparse.BooleanOptionalAction, default=True, help="count TFLOP in a run of their own")
    command(backbone)("--steps", type=int, default=40, help="measured steps of a turn, all of one epoch")
    add = command(style)
    add("--examples", required=True, help="the folder of neural_style.py")
    add("--resolution", type=int, default=256)
    add("--batch_size", type=int, default=4)
    add("--steps", type=int, default=20, help="measured steps of a turn")
    add = command(losses, rounds=5)
    add("--resolution", type=int, default=224)
    add("--batch_size", type=int, default=1)
    command(ranking)
    add = command(scan, rounds=1)
    add("--count", type=int, default=50889, help="number of drawings; default: as ImageNet-Sketch")
    add("--size", type=int, default=256, help="of a drawing in pixels")
    command(memory)
    args, options = parser.parse_known_args()
    if options and args.command not in ("step", "backbone", "style"):
        parser.error(f"unrecognized arguments: {' '.join(options)}")
    with tempfile.TemporaryDirectory() as folder:
        args.folder, args.options = Path(folder), options
        runs[args.command](args)


def record(folder: Path, command: list[str], before: str = "", counts: bool = False) -> dict[str, float]:
    """One training: seconds and operations a step after the first ones, seconds to the first, peak bytes."""
    file = folder / "recorded.json"
    run = [sys.executable, "-c", RECORDED, str(file), str(counts), before, *command]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    recorded = json.loads(file.read_text())
    times, operations = recorded["times"][WARM_UP - 1 :], recorded["operations"][WARM_UP - 1 :]
    return {
        "seconds": (times[-1] - times[0]) / (len(times) - 1),
        "operations": (operations[-1] - operations[0]) / (len(times) - 1),
        "first": recorded["times"][0],
        "peak": recorded["peak"],
    }


def seconds_of(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def take_turns(rows: Mapping[str, Callable[[], float]], rounds: int, warm_up: int = 0) -> dict[str, list[float]]:
    """Seconds of each row in each turn except the first `warm_up`."""
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for turn in range(warm_up + rounds):
        for name, run in rows.items():
            seconds[name].append(run())
            print(f"turn {turn + 1}, {name}: {seconds[name][-1]:.4g} s", file=sys.stderr, flush=True)
    return {name: values[warm_up:] for name, values in seconds.items()}


def show(seconds: dict[str, list[float]], unit: str = "s", **columns: dict[str, str]) -> None:
    """Print a table: the median of each row, its ratio to the first row, and other columns."""
    first = next(iter(seconds))
    titles = ["", unit, f"to {first}", *(name.replace("_", " ") for name in columns)]
    print(f"\n| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
    for name, values in seconds.items():
        ratios = [value / other for value, other in zip(values, seconds[first], strict=True)]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        others = [column[name] for column in columns.values()]
        print(f"| {' | '.join([name, f'{statistics.median(values):.4g}', ratio, *others])} |")


def step(args: argparse.Namespace) -> None:
    """a step of train_lora_sketch.py beside one of diffusers' script"""
    side, root = str(args.resolution), args.folder
    cache = ["--cache_latents"]  # as a run does by itself that sees its pictures more than once
    no_cache = ["--no-cache_latents", "--no-cache_prompts"]
    whole = ["--perceptual_crop", side]
    arms = {
        "plain": ["--perceptual_weight", "0", *no_cache],
        "plain, cached": ["--perceptual_weight", "0", *cache],
        "naive": [*whole, *no_cache],
        "whole, cached": [*whole, *cache],
        "defaults": cache,
        "AutoencoderTiny": [*cache, "--perceptual_decoder", str(root / "tiny-decoder")],
    }
    write_folder(root / "data", per_class=2, size=args.resolution)
    model = make_sd15(root / "sd15") if args.sd15 else TINY_SD
    AutoencoderTiny().save_pretrained(root / "tiny-decoder")
    common = f"""--pretrained_model_name_or_path {model} --train_data_dir {root}/data --output_dir {root}/out
        --resolution {side} --train_batch_size {args.batch_size} --max_train_steps {WARM_UP + args.steps}
        --checkpointing_steps 100000 --dataloader_num_workers 1 --mixed_precision {args.mixed_precision}""".split()
    any_version = "import diffusers.utils; diffusers.utils.check_min_version = lambda version: None"
    runs: dict[str, list] = {}

    def train(name: str, counts: bool = False) -> dict[str, float]:
        turn = len(runs.setdefault(name, []))  # each has its own seed, so that the gate opens for other rows
        script, options = [args.official], []
        if name != "official":
            features = root / f"features-{counts}-{turn}-{name}"
            script, options = [str(ROOT / "train_lora_sketch.py")], [*arms[name], *args.options]
            options += ["--feature_dir", str(features)]
        return record(root, [*script, *common, *options, "--seed", str(turn)], any_version, counts)

    def seconds(name: str) -> float:
        recorded = train(name)
        runs[name].append(recorded)
        return recorded["seconds"]

    names = ["official", *(args.arms or arms)]
    tflop = {name: f"{train(name, True)['operations'] / 1e12:.3f}" if args.count else "" for name in names}
    times = take_turns({name: partial(seconds, name) for name in names}, args.rounds)
    first = {name: f"{statistics.median(run['first'] for run in runs[name]):.1f}" for name in names}
    peak = {name: f"{max(run['peak'] for run in runs[name]) / 1e9:.2f}" for name in names}
    show(times, "s a step", s_to_first_step=first, peak_GB=peak, TFLOP_a_step=tflop)


def make_sd15(folder: Path) -> Path:
    """The parts of stable-diffusion-v1-5 by their published configurations, with random weights."""
    text = CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    scheduler = DDIMScheduler.from_pretrained(TINY_SD, subfolder="scheduler")
    tokenizer = CLIPTokenizer.from_pretrained(TINY_SD, subfolder="tokenizer")
    networks = AutoencoderKL(**VAE), CLIPTextModel(text), tokenizer, UNet2DConditionModel(**UNET)
    StableDiffusionPipeline(*networks, scheduler, None, None, requires_safety_checker=False).save_pretrained(folder)
    return folder


def backbone(args: argparse.Namespace) -> None:
    """an image of train_backbone.py beside the float32 loop over ImageFolder that one would write first"""
    options = [*args.options, "--init_weights", "none", "--max_train_steps", str(WARM_UP + args.steps), "--seed", "0"]
    config = train_backbone.parse_args([*options, "--output_dir", str(args.folder / "out")])
    command = [train_backbone.__file__, *options, "--report_to", "none", "--output_dir"]
    turn = count()

    def trainer() -> float:
        run = record(args.folder, [*command, str(args.folder / f"out-{next(turn)}")])
        return run["seconds"] / config.train_batch_size

    rows: dict[str, Callable[[], float]] = {
        "the plain loop": partial(plain_loop, config, args.steps),
        "train_backbone.py": trainer,
    }
    show(take_turns(rows, args.rounds), "s an image")


def plain_loop(config: argparse.Namespace, steps: int) -> float:
    """Seconds an image after the warm-up, with torchvision's ImageFolder and transforms and torch's own Adam."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    device = "cuda" if torch.cuda.is_available() else "cpu"
    augment = [
        transforms.RandomResizedCrop(config.resolution),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize([0.5] * 3, [0.5] * 3),
    ]
    data = ImageFolder(config.train_data_dir, transforms.Compose(augment))
    loader = torch.utils.data.DataLoader(
        data, config.train_batch_size, shuffle=True, drop_last=True, num_workers=config.dataloader_num_workers
    )
    names = ("attention", "pool_after_attention", "spatial_kernel", "reduction", "head", "open_gates")
    chosen = {name: value for name in names if (value := getattr(config, name)) is not None}
    network = AttentionVGG16(num_classes=len(data.classes), **chosen).to(device)
    optimizer = torch.optim.Adam(network.parameters(), config.learning_rate)
    for number, (images, labels) in enumerate(islice((batch for _ in count() for batch in loader), WARM_UP + steps)):
        if number == WARM_UP:
            start = time.perf_counter()
        optimizer.zero_grad()
        loss = F.cross_entropy(network(images.to(device)), labels.to(device))
        loss.backward()
        optimizer.step()
        loss.item()
    return (time.perf_counter() - start) / steps / config.train_batch_size


def style(args: argparse.Namespace) -> None:
    """an image of train_johnson.py, and a picture through its network, beside pytorch/examples' fast_neural_style"""
    root, photos = args.folder, args.folder / "photos" / "all"
    photos.mkdir(parents=True)
    noise = torch.Generator().manual_seed(0)
    for number in range(args.batch_size * (WARM_UP + args.steps)):
        pixels = torch.randint(256, (args.resolution, args.resolution, 3), generator=noise, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(photos / f"{number:04d}.png")
    network = AttentionVGG16("none", num_classes=0, last_layer="relu4_3")  # costs what a trained one does
    network.save_pretrained(root / "vgg")
    theirs = f"""{args.examples}/neural_style.py train --dataset {photos.parent} --style-image {photos}/0000.png
        --epochs 1 --save-model-dir {root}/theirs --image-size {args.resolution}
        --batch-size {args.batch_size}""".split()
    ours = f"""{ROOT}/train_johnson.py --train_data_dir {photos.parent} --style {photos}/0000.png
        --backbone {root}/vgg --resolution {args.resolution} --train_batch_size {args.batch_size} --seed 0
        --max_train_steps {WARM_UP + args.steps} --report_to none --output_dir {root}/ours-""".split()
    no_download = "from torchvision import models; vgg16 = models.vgg16; models.vgg16 = lambda **_: vgg16()"
    turn = count()

    def train_ours() -> float:
        command = [*ours[:-1], f"{ours[-1]}{next(turn)}", *args.options]
        return record(root, command, no_download)["seconds"] / args.batch_size

    rows: dict[str, Callable[[], float]] = {
        "fast_neural_style": lambda: record(root, theirs, no_download)["seconds"] / args.batch_size,
        "train_johnson.py": train_ours,
    }
    show(take_turns(rows, args.rounds), "s an image of the training")
    sys.path.insert(0, args.examples)
    from transformer_net import TransformerNet

    networks = {"fast_neural_style": TransformerNet()} | {name: JohnsonNet(upsampling=name) for name in UPSAMPLING}
    images = torch.rand(1, 3, 512, 512)
    with torch.inference_mode():
        draws = {name: partial(seconds_of, partial(network.eval(), images)) for name, network in networks.items()}
        show(take_turns(draws, args.rounds, warm_up=1), "s a picture of 512 px")


def losses(args: argparse.Namespace) -> None:
    """losses beside the lpips package: forward and backward, and what is kept for the backward pass"""
    import lpips

    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain = partial(AttentionVGG16, "none", num_classes=0)
    attention = partial(AttentionVGG16, num_classes=0, last_layer="relu4_3")
    networks = {  # with random weights, which cost what trained ones cost
        "lpips": lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).requires_grad_(False).eval(),
        "VGG-16, lpips' layers": PerceptualLoss(plain(last_layer="relu5_3"), [*DEFAULT_LAYERS, "relu5_3"]),
        "VGG-16": PerceptualLoss(plain(last_layer="relu4_3")),
        "attention, pools kept": PerceptualLoss(attention(pool_after_attention=True)),
        "attention, the paper's": PerceptualLoss(attention()),
    }
    images, target = (torch.rand(2, args.batch_size, 3, args.resolution, args.resolution) * 2 - 1).to(device)
    images.requires_grad_()

    def once(loss: nn.Module) -> None:
        images.grad = None
        loss(images, target).sum().backward()

    rows = {name: partial(seconds_of, partial(once, loss.to(device))) for name, loss in networks.items()}
    times = take_turns(rows, args.rounds, warm_up=1)
    bytes_kept = {name: kept(partial(loss, images, target), loss) for name, loss in networks.items()}
    show(times, kept_MB={name: f"{number / 1e6:.0f}" for name, number in bytes_kept.items()})


def kept(forward: Callable[[], object], module: nn.Module) -> int:
    """Bytes that a forward pass keeps for the backward one, each tensor once, weights left out."""
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage  # held, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    weights = {
        parameter.untyped_storage()._cdata for _, part in named_networks(module) for parameter in part.parameters()
    }
    return sum(storage.nbytes() for address, storage in storages.items() if address not in weights)


def ranking(args: argparse.Namespace) -> None:
    """rankings beside torchmetrics' average precision, and a search beside FAISS' flat index, filled before"""
    import faiss
    from torchmetrics.functional.retrieval import retrieval_average_precision

    labels, centres = torch.arange(7445) % 163, torch.randn(163, 512)
    vectors = F.normalize(centres[labels] + 3 * torch.randn(7445, 512))
    queries, gallery, query_labels, gallery_labels = vectors[:830], vectors[830:], labels[:830], labels[830:]

    def torchmetrics() -> None:
        for row, label in zip(queries @ gallery.T + 2, query_labels, strict=True):  # it leaves out what is negative
            retrieval_average_precision(row, gallery_labels == label)

    ours = partial(rank, queries, gallery, query_labels.tolist(), gallery_labels.tolist())
    rows = {"torchmetrics": partial(seconds_of, torchmetrics), "rank": partial(seconds_of, ours)}
    show(take_turns(rows, args.rounds), "s for 830 queries in 6,615")
    many = F.normalize(torch.randn(50_889, 512))
    index = faiss.IndexFlatIP(512)
    index.add(many.numpy())
    searches = {
        "FAISS": partial(seconds_of, lambda: index.search(many[:1].numpy(), 5)),
        "search": partial(seconds_of, lambda: search(many[0], many, 5)),
    }
    show(take_turns(searches, args.rounds), "s for one query in 50,889")


def scan(args: argparse.Namespace) -> None:
    """the scan of a data set before a training, first and second, beside bare opening with Pillow"""
    drawings = []
    for name in CLASSES:
        draw(name, 0, size=args.size).save(args.folder / "drawing.png")
        drawings.append((args.folder / "drawing.png").read_bytes())
    paths = [args.folder / f"{number:06}.png" for number in range(args.count)]
    for number, path in enumerate(paths):  # the same drawings with other bytes behind their end
        path.write_bytes(drawings[number % len(drawings)] + number.to_bytes(4, "big"))
    data = Images(paths, list(map(str, paths)))
    data.scan_folder = args.folder / "scans"

    def convert(path: Path) -> None:
        with Image.open(path) as image:
            image.convert("RGB")

    def open_all() -> None:
        with ThreadPoolExecutor(8) as pool:
            for _ in pool.map(convert, paths):
                pass

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def look() -> None:
        scans.scan(data, thumbnails=True, workers=8)

    before, bare = peak(), seconds_of(open_all)
    first, grown = seconds_of(look), peak() - before
    bare = (bare + seconds_of(open_all)) / 2  # before and after
    (file,) = data.scan_folder.iterdir()
    print(f"first scan   {args.count / first:.0f} images/s, {first / bare:.2f} times as long as Pillow by itself")
    print(f"second scan  {seconds_of(look):.2f} s")
    print(f"memory       {grown / 2**20:.0f} MiB more at its peak, {grown / args.count / 1024:.1f} KiB an image")
    print(f"on disk      {file.stat().st_size / 2**20:.1f} MiB")


class FusedAttention(torch.autograd.Function):
    """Attention that keeps what flash attention does; shapes would be computed as matrices of all pairs."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out)
        return out


def memory(args: argparse.Namespace) -> None:
    """the least memory of a step at SD-1.5's size at 512 px, counted from shapes: weights, and what is kept"""
    from peft import LoraConfig

    # The U-Net is in bfloat16, decoder and backbone in float32 for the square of one row, both caches on.
    side = 512
    torch.set_default_device("meta")
    F.scaled_dot_product_attention = lambda query, key, value, **_: FusedAttention.apply(query, key, value)
    torch.set_default_dtype(torch.bfloat16)
    print("| | frozen weights, GB | kept for the backward pass, GB |\n|---|---|---|")

    def line(name: str, module: nn.Module, forward: Callable[[], object], whole: nn.Module | None = None) -> None:
        weights = sum(p.nbytes for _, part in named_networks(module) for p in part.parameters(recurse=False))
        print(f"| {name} | {weights / 1e9:.2f} | {kept(forward, whole or module) / 1e9:.2f} |")

    for batch_size in (1, 4):
        for ending in ("", ", gradient checkpointing"):
            unet = UNet2DConditionModel(**UNET).requires_grad_(False).train()
            unet.add_adapter(LoraConfig(r=4, target_modules=train_lora_sketch.TARGETS["unet"]))
            if ending:
                unet.enable_gradient_checkpointing()
            latents, text = torch.randn(batch_size, 4, side // 8, side // 8), torch.randn(batch_size, 77, 768)
            line(f"U-Net, batch {batch_size}{ending}", unet, partial(unet, latents, torch.zeros(batch_size), text))
    torch.set_default_dtype(torch.float32)
    scored = 64
    for pixels in (side, scored + 2 * MARGIN):
        latents = torch.randn(1, 4, pixels // 8, pixels // 8, requires_grad=True)
        vae, tiny = AutoencoderKL(**VAE).requires_grad_(False), AutoencoderTiny().requires_grad_(False)
        line(f"decoder, {pixels} px", vae.decoder, partial(vae.decode, latents), vae)
        vae.enable_gradient_checkpointing()
        line(f"decoder, {pixels} px, gradient checkpointing", vae.decoder, partial(vae.decode, latents), vae)
        line(f"AutoencoderTiny, {pixels} px", tiny.decoder, partial(tiny.decode, latents), tiny)
    images = torch.randn(1, 3, scored, scored, requires_grad=True)
    for name, pools in {"pools kept": True, "the paper's": False}.items():
        network = AttentionVGG16(
            pool_after_attention=pools,
            num_classes=0,
            last_layer="relu4_3",
            calibration={layer: dict.fromkeys(("softening", "distance", "gram"), 1.0) for layer in DEFAULT_LAYERS},
        )
        loss = PerceptualLoss(network)
        line(f"attention-VGG, {name}, {scored} px", loss, partial(loss.compare, images, images, False))


if __name__ == "__main__":
    main()
