"""Scripts in new processes, forked from one that has imported what they import: that takes ten seconds each time."""

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

FORKED = multiprocessing.get_context("forkserver")
TRAINERS = ["train_lora_sketch", "distill_lora_sketch", "train_backbone", "train_johnson", "train_retrieval"]
FORKED.set_forkserver_preload([*TRAINERS, "sketch_perceptual.commands.evaluate"])


def run(script: str, options: list[str], environment: dict[str, str], folder: str) -> None:
    """Run a script as `python script options` would, with its output in files of `folder`."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    os.environ.update(environment)
    sys.argv, sys.path[:] = [script, *options], [str(Path(script).parent), *sys.path]
    runpy.run_path(script, run_name="__main__")


def start(script: Path, options: tuple, folder: str, **environment: str):
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1"} | environment
    process = FORKED.Process(target=run, args=(str(script), list(map(str, options)), environment, folder))
    process.start()
    return process


def result(exitcode: int | None, folder: str) -> SimpleNamespace:
    stdout, stderr = (Path(folder, name).read_text() for name in ("stdout", "stderr"))
    return SimpleNamespace(returncode=exitcode, stdout=stdout, stderr=stderr)


def one_process(script: Path, *options) -> SimpleNamespace:
    with tempfile.TemporaryDirectory() as folder:
        process = start(script, options, folder)
        process.join()
        return result(process.exitcode, folder)


def run_killed(script: Path, *options) -> None:
    """Run a script that kills itself."""
    killed = one_process(script, *options)
    assert killed.returncode == -signal.SIGKILL, killed.stderr


def two_processes(script: Path, *options) -> SimpleNamespace:
    """Run a script in two CPU processes, as torchrun would; if one fails, the other is ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        world |= {"ACCELERATE_USE_CPU": "true"}
        both = [start(script, options, folder, RANK=rank, LOCAL_RANK=rank, **world) for rank in "01"]
        end = time.monotonic() + 300
        while any(process.is_alive() for process in both):
            if any(process.exitcode for process in both) or time.monotonic() > end:
                for process in both:
                    process.kill()
            time.sleep(0.05)
        return result(both[0].exitcode or both[1].exitcode, folder)
