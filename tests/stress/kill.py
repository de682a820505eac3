"""Stop each trainer by random signals at random moments, resume it, and compare with a run that nobody disturbed.

    python tests/stress/kill.py --kills 50                       # forked from here, SIGKILL: seconds a kill
    python tests/stress/kill.py --kills 50 --launch --workers 1  # accelerate launch, spawned workers, all signals

Small drawings and networks, on one CPU thread: what is tested is what a stopped process leaves on disk. With --launch
the signal (KILL, TERM, INT, HUP in turn) goes to the script, the launcher or the whole process group. The resumed run
is forked, which is quicker. Exits with 1 unless every resumed run ends with the very weights of the undisturbed one.

2026-11-26, the second command, two cores that ran other things too:

    trainer                 the same weights   before the first checkpoint   s a run
    train_lora_sketch.py    50 of 50           21                            72
    train_backbone.py       50 of 50           13                            74
    train_johnson.py        50 of 50           18                            33
    train_retrieval.py      50 of 50           31                            24

Most of a run is imports, in which a signal ends Python as it ends any program.
"""

import argparse
import importlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from multiprocessing import get_context
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from sketch_perceptual.drawings import write_folder
from sketch_perceptual.errors import InputError
from sketch_perceptual.networks.backbone import BUNDLED
from sketch_perceptual.training.lock import lock_folder, unlock_folder

ROOT = Path(__file__).resolve().parents[2]
COMMON = "--seed 0 --report_to none --mixed_precision no --output_dir out --resume_from_checkpoint latest"
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
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")
TARGETS = ("script", "launcher", "group")
DRIVER = """if __name__ == "__main__":
    import multiprocessing

    import {name} as script
    from sketch_perceptual.cli import entry

    multiprocessing.set_start_method("spawn")
    entry.run(script.main, script.parse_args())
"""


class Forked:
    """A trainer in a fork of this process, so that torch is not imported anew each time."""

    def __init__(self, name: str, folder: Path, workers: int):
        self.child = get_context("fork").Process(target=self.train, args=(name, folder, workers))
        self.child.start()

    @staticmethod
    def train(name: str, folder: Path, workers: int) -> None:
        os.chdir(folder)
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        torch.set_num_threads(1)
        script = importlib.import_module(name)
        script.main(script.parse_args(options(name, workers)))

    def wait(self, seconds: float | None = None) -> int | None:
        self.child.join(seconds)
        return self.child.exitcode

    def kill(self, turn: int) -> str:
        self.child.kill()
        self.child.join()
        return "SIGKILL"


class Launched:
    """A trainer as users start it, whose workers are spawned."""

    def __init__(self, name: str, folder: Path, workers: int):
        (folder / "driver.py").write_text(DRIVER.format(name=name))
        command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "driver.py"]
        with (folder / "log.txt").open("a") as log:
            self.process = subprocess.Popen(
                [*command, *options(name, workers)],
                cwd=folder,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.folder = folder

    def wait(self, seconds: float | None = None) -> int | None:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def kill(self, turn: int) -> str:
        name, target = SIGNALS[turn % len(SIGNALS)], TARGETS[turn // len(SIGNALS) % len(TARGETS)]
        number, scripts = getattr(signal, name), psutil.Process(self.process.pid).children()
        if target == "script" and scripts:
            os.kill(scripts[0].pid, number)
        elif target == "group":
            os.killpg(self.process.pid, number)
        else:
            target = "launcher"
            os.kill(self.process.pid, number)
        self.process.wait()
        psutil.wait_procs(scripts, timeout=60)  # an orphan saves and ends by itself
        if any(script.is_running() for script in scripts):
            sys.exit(f"{name} to the {target} did not end the script; see {self.folder}")
        return f"{name} to the {target}"


def options(name: str, workers: int) -> list[str]:
    return [*f"{TRAINERS[name]} {COMMON}".split(), "--dataloader_num_workers", str(workers)]


def finish(start, name: str, folder: Path, workers: int) -> dict[str, torch.Tensor]:
    """Run to the end; the weights that came out."""
    code = start(name, folder, workers).wait()
    if code != 0:
        sys.exit(f"{name} ended with {code} in {folder}")
    return weights(folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All that came out of a run in `folder`."""
    files = [path for path in (folder / "out").rglob("*.safetensors") if "checkpoint-" not in str(path)]
    return {f"{path.relative_to(folder)} {key}": value for path in files for key, value in load_file(path).items()}


def equal(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    """To the last bit. The files need not be: safetensors writes their metadata in any order."""
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


def is_free(folder: Path) -> bool:
    try:
        lock_folder(folder)
    except InputError:
        return False
    unlock_folder(folder)
    return True


def make_data(folder: Path) -> None:
    write_folder(folder / "pictures", per_class=1, size=64, classes=("house", "cat", "boat", "tree"))
    write_folder(folder / "classes", per_class=8, size=32, classes=("house", "cat"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of each trainer")
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS))
    parser.add_argument("--launch", action="store_true", help="by accelerate launch, and by all signals")
    parser.add_argument("--workers", type=int, default=0, help="of the DataLoader")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    os.environ |= {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    start = Launched if args.launch else Forked
    moments, failed = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory() as root:
        for name in args.trainers:
            importlib.import_module(name)
            straight, killed = Path(root, name, "straight"), Path(root, name, "killed")
            make_data(straight)
            began = time.monotonic()
            expected = finish(start, name, straight, args.workers)
            seconds, kills, same, lost, ways = time.monotonic() - began, 0, 0, 0, Counter()
            while kills < args.kills:
                shutil.rmtree(killed, ignore_errors=True)
                make_data(killed)
                child = start(name, killed, args.workers)
                if child.wait(moments.uniform(0, seconds)) is not None:
                    continue  # it was faster
                way = child.kill(kills)
                if not is_free(killed / "out"):
                    sys.exit(f"{way} left a run behind in {killed}")
                kills += 1
                lost += not any((killed / "out").glob("checkpoint-*"))
                if equal(finish(Forked, name, killed, 0), expected):
                    same += 1
                else:
                    ways[way] += 1
            failed += same < kills
            print(
                f"{name}: {same} of {kills} stopped runs ended as the undisturbed one; {lost} were stopped before"
                f" their first checkpoint; {seconds:.1f} s a run; not the same after {dict(ways) or 'none'}",
                flush=True,
            )
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
