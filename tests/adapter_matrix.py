"""Do our LoRA files load wherever people work? Writes them in two environments and reads them in five.

    make test-adapters

The newest versions, the oldest supported ones, each with the PEFT of the other, and diffusers 0.32, which reads no
metadata. A reader must find every module and predict what the writer predicted, by each file and by the weights alone.
"""

import argparse
import importlib.metadata
import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent
SD = ROOT / "sketch_perceptual/assets/tiny-sd"
WRITERS = ("newest", "oldest")
TOLERANCE = 1e-4  # of predictions of size 1
KINDS = {
    "default": "",
    "alpha": "--rank 2 --lora_alpha 8",
    "text": "--rank 2 --lora_alpha 8 --use_rslora --train_text_encoder",
    "dora": "--rank 2 --lora_alpha 8 --use_dora --train_text_encoder",
}


def environments() -> dict[str, tuple[str, list[str]]]:
    """Name -> virtual environment, and what goes before its packages."""
    peft = importlib.metadata.version("peft")
    return {
        "newest": (".venv", []),
        "newest, PEFT 0.19": (
            ".venv",
            ["peft==0.19.0"],
        ),  # the oldest with which transformers 5.24 loads text encoders
        "oldest": (".venv-oldest", []),
        "oldest, newest PEFT": (".venv-oldest", [f"peft=={peft}"]),
        "oldest, diffusers 0.32": (".venv-oldest", ["diffusers==0.32.2"]),
    }


def load():
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(SD, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def predict(pipeline) -> dict[str, torch.Tensor]:
    """What both models say, and how many modules of them have an adapter."""
    from peft.tuners.lora import LoraLayer

    draw = torch.Generator().manual_seed(0)
    embeds = pipeline.text_encoder(torch.arange(77)[None])[0]
    image = pipeline.unet(torch.randn(1, 4, 16, 16, generator=draw), 200, torch.randn(1, 77, 64, generator=draw))[0]
    layers = [module for m in (pipeline.unet, pipeline.text_encoder) for module in m.modules()]
    return {
        "embeds": embeds,
        "image": image,
        "modules": torch.tensor(sum(isinstance(layer, LoraLayer) for layer in layers)),
    }


def write(folder: Path) -> None:
    """An adapter of each kind, as a training exports it, and what it predicts."""
    import train_lora_sketch as script

    for kind, options in KINDS.items():
        command = f"--pretrained_model_name_or_path {SD} --train_data_dir x --output_dir {folder / kind} {options}"
        args, pipeline = script.parse_args(command.split()), load()
        pipeline.unet.requires_grad_(False)
        pipeline.text_encoder.requires_grad_(False)
        weights = script.add_lora(args, pipeline.unet, 0)
        if args.train_text_encoder:
            weights += script.add_text_lora(args, pipeline.text_encoder)
        with torch.no_grad():
            for weight in weights:
                weight += weight.abs().mean().clamp(min=0.02) * torch.randn(weight.shape)
        steps = SimpleNamespace(total=1, epochs=1)
        script.export(args, SimpleNamespace(record=lambda args=args: vars(args), steps=steps), pipeline)
        save_file(predict(pipeline), folder / kind / "expected")


def read(folder: Path, versions: str) -> bool:
    """Print how each file of each adapter loads here, without its metadata too; whether all are right."""
    right = True
    for writer, kind in itertools.product(WRITERS, KINDS):
        place = folder / writer / kind
        expected = load_file(place / "expected")
        ours, kohya = place / "pytorch_lora_weights.safetensors", place / f"{kind}.safetensors"
        ways = {"diffusers'": ours, "diffusers', no metadata": load_file(ours), "kohya's": kohya}
        if kind == "dora":
            del ways["kohya's"]  # whose magnitudes diffusers drops
        for way, source in ways.items():
            pipeline = load()
            if isinstance(source, Path):
                pipeline.load_lora_weights(source.parent, weight_name=source.name)
            else:
                pipeline.load_lora_weights(source)
            found = predict(pipeline)
            difference = max(float((found[name] - expected[name]).abs().max()) for name in ("embeds", "image"))
            count, total = int(found["modules"]), int(expected["modules"])
            right &= difference < TOLERANCE and count == total
            print(f"| {versions} | {writer} | {kind} | {way} | {count} of {total} | {difference:.1e} |", flush=True)
    return right


def run(environment: str, action: str, folder: Path) -> bool:
    """Whether `action` succeeds in an environment, which is made of what is in `folder` beside the adapters."""
    venv, packages = environments()[environment]
    python = ROOT / venv / "bin/python"
    for package in packages:
        if not (folder / package).exists():
            install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder / package, package]
            subprocess.run(list(map(str, install)), check=True)
    paths = [*(folder / package for package in packages), ROOT]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "HF_HUB_OFFLINE": "1"}
    command = [python, "-W", "ignore", __file__, action, "--folder", folder, "--versions", environment]
    return subprocess.run(list(map(str, command)), env=variables, check=False).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("all", "write", "read"), nargs="?", default="all")
    parser.add_argument("--folder", type=Path, default=ROOT / ".adapters", help="where all is written")
    parser.add_argument("--versions", default="", help="what this environment is called")
    args = parser.parse_args()
    if args.action == "write":
        write(args.folder / args.versions)
    elif args.action == "read":
        sys.exit(not read(args.folder, args.versions))
    else:
        wrote = [run(writer, "write", args.folder) for writer in WRITERS]
        print("| read by | written by | adapter | file | modules | largest difference |\n|---|---|---|---|---|---|")
        sys.exit(not all([*wrote, *(run(reader, "read", args.folder) for reader in environments())]))


if __name__ == "__main__":
    main()
