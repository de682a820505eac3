"""Signals: at once where nothing is lost, at the end of a step where something would be; never to workers."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT

from sketch_perceptual.cli import interruption
from sketch_perceptual.cli.interruption import Interrupted
from sketch_perceptual.training.checkpoints import find_checkpoints
from sketch_perceptual.training.lock import lock_folder, unlock_folder


@pytest.fixture
def installed(signals):
    interruption.install()


@pytest.mark.parametrize("number", interruption.SIGNALS)
def test_a_signal_interrupts_at_once_unless_it_is_deferred(installed, number):
    with pytest.raises(Interrupted) as stop:
        os.kill(os.getpid(), number)
    assert stop.value.number == number
    interruption.defer()
    os.kill(os.getpid(), number)
    assert interruption.received() == number


def test_a_second_ctrl_c_does_not_wait(installed):
    interruption.defer()
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(Interrupted):
        os.kill(os.getpid(), signal.SIGINT)


def test_what_is_optional_is_left_early_and_the_signal_kept(installed):
    interruption.defer()
    reached = []
    with interruption.interruptible():
        os.kill(os.getpid(), signal.SIGTERM)
        reached.append("the end")
    assert (reached, interruption.received()) == ([], signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)  # deferred again


def test_nohup_stays_nohup(signals):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    interruption.install()
    os.kill(os.getpid(), signal.SIGHUP)


WORKER = """
import os, signal, sys, time
from multiprocessing import get_context
from sketch_perceptual.cli.interruption import held_back, ignore_in_worker, install

def work(ready):
    ignore_in_worker(0)
    ready.set()
    time.sleep(60)

if __name__ == "__main__":
    install()
    context = get_context(sys.argv[1])
    ready = context.Event()
    child = context.Process(target=work, args=(ready,), daemon=True)
    with held_back():
        child.start()
    ready.wait()
    print(child.pid, flush=True)
    input()
    child.terminate()
    child.join(10)
    print(child.exitcode, flush=True)
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_only_its_own_process_ends_a_worker(method, tmp_path):
    (tmp_path / "driver.py").write_text(WORKER)
    driver = subprocess.Popen(
        [sys.executable, tmp_path / "driver.py", method],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
    )
    worker = int(driver.stdout.readline())
    for number in interruption.SIGNALS:
        os.kill(worker, number)
    time.sleep(0.5)
    assert psutil.Process(worker).status() != psutil.STATUS_ZOMBIE
    answer, _ = driver.communicate("\n")
    assert answer.split()[-1] == "0"


LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
TRAINING = """
import multiprocessing
import train_lora_sketch as script
from sketch_perceptual.cli import entry

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    entry.run(script.main, script.parse_args())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "name", "code"), [("launcher", "SIGTERM", -15), ("launcher", "SIGKILL", -9), ("group", "SIGINT", None)]
)
def test_a_launched_run_saves_however_it_is_stopped(tiny_sd, drawings, tmp_path, target, name, code):
    """Under accelerate launch, with workers that are spawned."""
    (tmp_path / "driver.py").write_text(TRAINING)
    out = tmp_path / "out"
    options = f"""--pretrained_model_name_or_path {tiny_sd} --train_data_dir {drawings} --resolution 32 --seed 0
        --perceptual_loss pixel --train_batch_size 1 --report_to none --max_train_steps 100000 --output_dir {out}
        --dataloader_num_workers 1 --checkpointing_steps 3 --checkpoints_total_limit 2 --no-cache_latents
        --feature_dir {tmp_path / "features"}"""
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(
            [*LAUNCH, tmp_path / "driver.py", *options.split()],
            env=os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    deadline = time.monotonic() + 240
    while not find_checkpoints(out):
        assert launcher.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    (script,) = psutil.Process(launcher.pid).children()
    (os.killpg if target == "group" else os.kill)(launcher.pid, getattr(signal, name))
    launcher.wait(60)
    script.wait(60)
    assert code is None or launcher.returncode == code
    text = (tmp_path / "log").read_text()
    step = int(text.split("interrupted after step ")[1].split(";")[0])
    assert find_checkpoints(out)[-1].name == f"checkpoint-{step}"
    lock_folder(out)
    unlock_folder(out)
    assert "DataLoader worker" not in text
