"""Stop each trainer half-way, change something, resume it, and compare what comes of it with what must.

    python tests/stress/resume.py

Prints a table: for each change whether the run went on, bit for bit as an undisturbed one or not, or was refused, and
with which sentence. Small drawings and networks, on one CPU thread. Exits with 1 if a change that alters nothing
alters a result, or if one that alters something goes unnoticed.

In the last full run all four trainers did what CHANGES says of each change.
"""

import argparse
import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import torch
from kill import TRAINERS, equal, make_data, options, weights
from PIL import Image, ImageOps

from sketch_perceptual.cli import entry

SAME, OTHER, REFUSED = "goes on, the same", "goes on with it", "refused"
LENGTH = {
    "train_lora_sketch": "max_train_steps 12",
    "train_backbone": "num_train_epochs 6",
    "train_johnson": "max_train_steps 12",
    "train_retrieval": "num_seeds 3",
}


def move_data(folder: Path) -> None:
    for name in ("pictures", "classes"):
        (folder / name).rename(folder / f"moved-{name}")


def change_data(folder: Path) -> None:
    for path in sorted(folder.glob("[pc]*/**/*.png"))[::3]:
        ImageOps.mirror(Image.open(path)).rotate(20, fillcolor="white").save(path)


def damage_newest(folder: Path) -> None:
    newest = max((folder / "out").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    path = next(newest.glob("optimizer.safetensors"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def damage_all(folder: Path) -> None:
    for path in (folder / "out").glob("checkpoint-*/optimizer.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])


MOVED = [("pictures", "moved-pictures"), ("classes", "moved-classes")]
# What changes; what it does to the folder, what is replaced in and added to the command line, what must come of it.
CHANGES: list[tuple[str, Callable | None, list, str, str]] = [
    ("nothing", None, [], "", SAME),
    ("another learning rate", None, [], "--learning_rate 0.003", REFUSED),
    ("the same, with --resume_with", None, [], "--learning_rate 0.003 --resume_with learning_rate", OTHER),
    ("another seed", None, [("--seed 0", "--seed 1")], "", REFUSED),
    ("another background", None, [], "--background ivory", REFUSED),
    ("bfloat16", None, [("--mixed_precision no", "--mixed_precision bf16")], "", REFUSED),
    ("other pictures", change_data, [], "", REFUSED),
    ("the folder moved", move_data, MOVED, "", SAME),
    ("a slash more", None, [("pictures", "pictures/"), ("classes", "classes/")], "", SAME),
    ("more workers", None, [], "--dataloader_num_workers 2", SAME),
    ("the newest checkpoint damaged by one bit", damage_newest, [], "--checkpoints_total_limit 9", SAME),
    ("all checkpoints cut short", damage_all, [], "", REFUSED),
    ("longer", None, [], "--longer", SAME),
    ("shorter than what is done", None, [], "--shorter", REFUSED),
    ("no --resume_from_checkpoint", None, [("--resume_from_checkpoint latest", "")], "", REFUSED),
]


def train(name: str, folder: Path, arguments: list[str]) -> None:
    """In a child, do one run in `folder`; its last words are in log.txt."""
    os.chdir(folder)
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    sys.argv = [f"{name}.py", *arguments]
    script = importlib.import_module(name)
    entry.run(script.main, script.parse_args(arguments))


def run(name: str, folder: Path, arguments: str) -> int | None:
    child = get_context("fork").Process(target=train, args=(name, folder, arguments.split()))
    child.start()
    child.join()
    return child.exitcode


def lengthen(name: str, arguments: str, half: bool = False) -> str:
    """The options of a run of twice the length, or of a part of the usual one."""
    option, number = LENGTH[name].split()
    number = {"max_train_steps": "3", "num_train_epochs": "2", "num_seeds": "1"}[option] if half else number
    return f"{arguments} --{option} {number}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS))
    args = parser.parse_args()
    os.environ |= {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    rows: dict[str, list[str]] = {change: [] for change, *_ in CHANGES}
    wrong = 0
    with tempfile.TemporaryDirectory() as root:
        for name in args.trainers:
            importlib.import_module(name)
            usual = " ".join(options(name, 0))
            folders = {length: Path(root, name, length) for length in ("usual", "long", "stopped", "resumed")}
            for length in ("usual", "long", "stopped"):
                make_data(folders[length])
            first = usual.replace("--resume_from_checkpoint latest", "--checkpoints_total_limit 9")
            codes = run(name, folders["usual"], first), run(name, folders["long"], lengthen(name, first))
            codes += (run(name, folders["stopped"], lengthen(name, first, half=True)),)
            assert codes == (0, 0, 0), codes
            expected, longer = weights(folders["usual"]), weights(folders["long"])
            for change, edit, replaced, added, must in CHANGES:
                folder = folders["resumed"]
                shutil.rmtree(folder, ignore_errors=True)
                is_short = "shorter" in change
                shutil.copytree(folders["usual" if is_short else "stopped"], folder)
                if edit:
                    edit(folder)
                arguments = usual
                for old, new in replaced:
                    arguments = arguments.replace(f" {old}", f" {new}")
                if added == "--longer":
                    arguments = lengthen(name, arguments)
                elif is_short:
                    arguments = lengthen(name, arguments, half=True)
                else:
                    arguments += f" {added}"
                code = run(name, folder, arguments)
                log = (folder / "log.txt").read_text(errors="replace")
                result = REFUSED if code == 2 and "Traceback" not in log else f"exit code {code}"
                if code == 0:
                    result = SAME if equal(weights(folder), longer if "longer" in change else expected) else OTHER
                wrong += result != must
                rows[change].append(result + ("" if result == must else " (!)"))
                print(f"{name}, {change}: {result}\n    {log.strip().splitlines()[-1][:300]}", flush=True)
    print("| resumed with | " + " | ".join(f"`{name}.py`" for name in args.trainers) + " |")
    print("|---" * (1 + len(args.trainers)) + "|")
    for change, results in rows.items():
        print(f"| {change} | " + " | ".join(results) + " |")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
