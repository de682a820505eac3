"""Kill each trainer with SIGKILL at random moments, resume it, and compare with a run that nobody disturbed.

    python -m benchmarks.kill --kills 50

Small drawings and networks, on one CPU thread: what is tested is what a killed process leaves on disk. Exits with 1
unless every resumed run ends with the very weights of the undisturbed one.
"""

import argparse
import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import torch
from safetensors.torch import load_file

from sketch_perceptual.drawings import write_folder
from sketch_perceptual.networks.backbone import BUNDLED

COMMON = """--seed 0 --report_to none --mixed_precision no --dataloader_num_workers 0 --output_dir out
    --resume_from_checkpoint latest"""
TRAINERS = {
    "train_lora_sketch": f"""--pretrained_model_name_or_path {BUNDLED.parent / "tiny-sd"} --train_data_dir pictures
        --resolution 64 --train_batch_size 2 --max_train_steps 6 --checkpointing_steps 1
        --feature_dir features""",
    "train_backbone": """--train_data_dir classes --init_weights none --pool_after_attention --head linear
        --resolution 32 --train_batch_size 4 --num_train_epochs 3 --validation_share 0.25""",
    "train_johnson": f"""--train_data_dir pictures --style classes --backbone {BUNDLED} --width 8 --resolution 32
        --train_batch_size 2 --max_train_steps 6 --checkpointing_steps 1 --num_validation_images 1""",
    "train_retrieval": f"""--train_data_dir classes --backbone {BUNDLED} --head linear --resolution 32 --num_seeds 2
        --num_train_epochs 3 --validation_share 0.25 --feature_dir features""",
}


def train(name: str, folder: Path) -> None:
    """What a child does: one run in `folder`, silently."""
    os.chdir(folder)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    torch.set_num_threads(1)
    script = importlib.import_module(name)
    script.main(script.parse_args(f"{TRAINERS[name]} {COMMON}".split()))


def start(name: str, folder: Path):
    """Forked, so that torch is not imported anew each time."""
    child = get_context("fork").Process(target=train, args=(name, folder))
    child.start()
    return child


def finish(name: str, folder: Path) -> dict[str, torch.Tensor]:
    """Run to the end; the weights that came out."""
    child = start(name, folder)
    child.join()
    if child.exitcode != 0:
        sys.exit(f"{name} ended with {child.exitcode} in {folder}")
    files = [path for path in (folder / "out").rglob("*.safetensors") if "checkpoint-" not in str(path)]
    return {f"{path.relative_to(folder)} {key}": value for path in files for key, value in load_file(path).items()}


def equal(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    """To the last bit. The files need not be: safetensors writes their metadata in any order."""
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


def make_data(folder: Path) -> None:
    write_folder(folder / "pictures", per_class=1, size=64, classes=("house", "cat", "boat", "tree"))
    write_folder(folder / "classes", per_class=8, size=32, classes=("house", "cat"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of each trainer")
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS))
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    os.environ |= {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    moments, failed = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory() as root:
        for name in args.trainers:
            importlib.import_module(name)
            straight, killed = Path(root, name, "straight"), Path(root, name, "killed")
            make_data(straight)
            began = time.monotonic()
            expected = finish(name, straight)
            seconds, kills, same, saving, lost = time.monotonic() - began, 0, 0, 0, 0
            while kills < args.kills:
                shutil.rmtree(killed, ignore_errors=True)
                make_data(killed)
                child = start(name, killed)
                child.join(moments.uniform(0, seconds))
                if child.exitcode is not None:
                    continue  # it was faster
                os.kill(child.pid, signal.SIGKILL)
                child.join()
                kills += 1
                saving += any((killed / "out").rglob("*.partial"))
                lost += not any((killed / "out").glob("checkpoint-*"))
                same += equal(finish(name, killed), expected)
            failed += same < kills
            print(
                f"{name}: {same} of {kills} killed runs ended as the undisturbed one; {saving} were killed while"
                f" saving, {lost} before their first checkpoint; {seconds:.1f} s a run",
                flush=True,
            )
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
