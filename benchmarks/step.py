"""A step of train_lora_sketch.py beside one of diffusers' train_text_to_image_lora.py, in turns in one run.

    git clone https://github.com/huggingface/diffusers
    python -m benchmarks.step --official diffusers/examples/text_to_image/train_text_to_image_lora.py
    python -m benchmarks.step --official ... --sd15 --resolution 128 --batch_size 1

On the tiny pipeline of the demo or, with --sd15, on one of SD-1.5's published size with random weights (4 GB on disk
while it runs). Seconds run from one optimizer step to the next, after the first ones; each turn has its own seed, so
that the gate opens for other rows. TFLOP (2 x multiply-adds) are counted in a run of their own. Options that are not
listed here go to train_lora_sketch.py.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sketch_perceptual.drawings import write_folder
from tools.make_tiny_sd import SIZE, TINY_SD

ROOT = Path(__file__).parent.parent
WARM_UP = 2
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
MEASURED = """
import time
start = time.perf_counter()
import json, resource, runpy, sys
import torch, diffusers.utils
from torch.utils.flop_counter import FlopCounterMode
diffusers.utils.check_min_version = lambda version: None
times, counts, counter = [], [], FlopCounterMode(display=False)
def step(self, *args, step=torch.optim.AdamW.step, **options):
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    times.append(time.perf_counter() - start)
    counts.append(counter.get_total_flops() if count else 0)
    return step(self, *args, **options)
torch.optim.AdamW.step = step
out, count, sys.argv = sys.argv[1], sys.argv[2] == "count", sys.argv[3:]
if count:
    counter.__enter__()
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    if count:
        counter.__exit__(None, None, None)
    cuda = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    json.dump({"times": times, "peak": peak, "counts": counts}, open(out, "w"))
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--official", required=True, help="train_text_to_image_lora.py")
    parser.add_argument("--sd15", action="store_true", help="the size of SD-1.5 in place of the tiny pipeline")
    parser.add_argument("--resolution", type=int, default=SIZE)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each")
    parser.add_argument("--steps", type=int, default=20, help="measured steps of a turn")
    parser.add_argument("--arms", nargs="+", help="only these, and the official script")
    parser.add_argument("--mixed_precision", default="no", help="of all runs")
    parser.add_argument("--count", action=argparse.BooleanOptionalAction, default=True, help="count TFLOP")
    args, options = parser.parse_known_args()
    cache = ["--cache_latents"]  # as a run does by itself that sees its pictures more than once
    no_cache = ["--no-cache_latents", "--no-cache_prompts"]
    side = str(args.resolution)
    whole = ["--perceptual_crop", side]
    gated = ["--perceptual_min_snr", "1"]
    naive = [*whole, "--perceptual_resolution", side]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        arms = {
            "official": None,
            "plain": ["--perceptual_weight", "0", *no_cache],
            "plain, cached": ["--perceptual_weight", "0", *cache],
            "naive": [*naive, *no_cache],
            "gated, whole": [*whole, *gated, *no_cache],
            "gated, whole, cached": [*whole, *gated, *cache],
            "gated": [*gated, *cache],
            "defaults": cache,
            "AutoencoderTiny": [*cache, "--perceptual_decoder", str(root / "tiny-decoder")],
        }
        chosen = {name: arms[name] for name in ["official", *(args.arms or list(arms)[1:])]}
        write_folder(root / "data", per_class=2, size=args.resolution)
        model = make_sd15(root / "sd15") if args.sd15 else TINY_SD
        AutoencoderTiny().save_pretrained(root / "tiny-decoder")
        common = f"""--pretrained_model_name_or_path {model} --train_data_dir {root}/data --output_dir {root}/out
            --resolution {args.resolution} --train_batch_size {args.batch_size}
            --checkpointing_steps 100000 --dataloader_num_workers 1 --mixed_precision {args.mixed_precision}""".split()
        found = {name: [] for name in chosen}
        counted = {}
        for turn in range(0 if args.count else 1, args.rounds + 1):
            for name, own in chosen.items():
                script = args.official if own is None else ROOT / "train_lora_sketch.py"
                own = [] if own is None else [*own, *options, "--feature_dir", str(root / f"features-{turn}-{name}")]
                own += ["--seed", str(turn), "--max_train_steps", str(WARM_UP + args.steps)]
                kind = "time" if turn else "count"
                run = measure(root / "found.json", kind, [str(script), *common, *own])
                if turn:
                    found[name].append(run)
                    print(f"turn {turn}, {name}: {run['seconds']:.3f} s a step", flush=True)
                else:
                    counted[name] = run["operations"]
    columns = ("", "s a step", "to the official script", "start to first step, s", "peak, GB", "TFLOP a step")
    print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name, runs in found.items():
        seconds = [run["seconds"] for run in runs]
        ratios = [run["seconds"] / other["seconds"] for run, other in zip(runs, found["official"], strict=True)]
        tflop = f"{counted[name] / 1e12:.3f}" if counted else ""
        print(
            f"| {name} | {statistics.median(seconds):.3f} | {statistics.median(ratios):.2f} ({min(ratios):.2f} to"
            f" {max(ratios):.2f}) | {statistics.median(run['first'] for run in runs):.1f} |"
            f" {max(run['peak'] for run in runs) / 1e9:.2f} | {tflop} |"
        )


def measure(file: Path, kind: str, command: list[str]) -> dict[str, float]:
    """One training: seconds and operations a step after the first ones, seconds to the first, peak bytes."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(file), kind, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(done.stderr)
    found = json.loads(file.read_text())
    steps = len(found["times"]) - WARM_UP
    times, counts = found["times"][WARM_UP - 1 :], found["counts"][WARM_UP - 1 :]
    return {
        "seconds": (times[-1] - times[0]) / steps,
        "operations": (counts[-1] - counts[0]) / steps,
        "first": found["times"][0],
        "peak": found["peak"],
    }


def make_sd15(folder: Path) -> Path:
    """The parts of stable-diffusion-v1-5 by their published configurations, with random weights."""
    unet, vae = UNet2DConditionModel(**UNET), AutoencoderKL(**VAE)
    text = CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    scheduler = DDIMScheduler.from_pretrained(TINY_SD, subfolder="scheduler")
    tokenizer = CLIPTokenizer.from_pretrained(TINY_SD, subfolder="tokenizer")
    pipeline = StableDiffusionPipeline(
        vae, CLIPTextModel(text), tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
