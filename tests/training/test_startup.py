"""How scripts start and end: sentences, exit codes, consoles."""

import argparse
import io
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from sketch_perceptual.cli import entry
from sketch_perceptual.cli.arguments import Parser
from sketch_perceptual.cli.console import protect_console
from sketch_perceptual.errors import InputError, TrainingError
from sketch_perceptual.training import startup
from sketch_perceptual.training.options import add_training_options

ARGS = argparse.Namespace(learning_rate=1.0)


def ends(error):
    def main(args):
        raise error

    with pytest.raises(SystemExit) as exit:
        entry.run(main, ARGS)
    return exit.value.code


@pytest.mark.parametrize(
    ("name", "says"), [("first", "error: 'caf\\udce9'"), ("figure", "error: --figure 'caf\\udce9'")]
)
def test_a_value_that_is_not_utf8_is_named_by_its_option_where_it_has_one(name, says, capsys):
    with pytest.raises(SystemExit):
        entry.run(print, argparse.Namespace(**{name: os.fsdecode(b"caf\xe9")}))
    assert f"{says} is not UTF-8: rename it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (InputError("`learning_rate` is odd, `other` too"), 2, "error: --learning_rate is odd, `other` too"),
        (FloatingPointError("lower `learning_rate`"), 3, "training stopped: lower --learning_rate"),
        (OSError(28, "No space left on device", "x.png"), 2, "error: [Errno 28] No space left on device: 'x.png'"),
        (OSError(36, "File name too long", "y" * 999), 2, "error: [Errno 36] File name too long"),
        (OSError(5, "Input/output error", "x.png"), 2, "Input/output error: 'x.png'"),
        (TrainingError("nothing was learned"), 3, "training stopped: nothing was learned"),
        (InputError("x\x1b[2J\u202e.png"), 2, "error: x\\x1b[2J\\u202e.png"),
        (MemoryError(), 2, "error: out of memory (MemoryError)"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 2, "Tried to allocate 2 GiB"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"),
            2,
            "out of memory",
        ),
    ],
)
def test_what_ends_a_script_is_a_sentence_and_a_code(error, code, says, signals, capsys):
    assert ends(error) == code
    answer = capsys.readouterr().err
    assert says in answer
    assert "Traceback" not in answer


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_anywhere_is_a_sentence_and_its_code(name, signals, capsys):
    def main(args):
        os.kill(os.getpid(), getattr(signal, name))

    with pytest.raises(SystemExit) as exit:
        entry.run(main, ARGS)
    assert exit.value.code == 128 + getattr(signal, name)
    assert f"interrupted by {name}" in capsys.readouterr().err


def test_out_of_memory_names_the_options_that_help():
    args = argparse.Namespace(train_batch_size=4, gradient_checkpointing=False, perceptual_crop=256, resolution=512)
    advice = entry.memory_advice(MemoryError(), args)
    assert all(f"`{name}`" in advice for name in vars(args))
    args.train_batch_size, args.gradient_checkpointing = 1, True
    advice = entry.memory_advice(MemoryError(), args)
    assert "batch" not in advice
    assert "checkpointing" not in advice


@pytest.mark.parametrize("name", ["output_dir", "train_data_dir", "figure"])
def test_empty_paths_are_refused(name, signals, capsys):
    with pytest.raises(SystemExit, match="2"):
        entry.run(lambda args: None, argparse.Namespace(**{name: "", "negative_prompt": ""}))
    assert f"--{name} is empty" in capsys.readouterr().err


def test_arguments_that_are_not_utf8_are_refused(signals, capsys):
    with pytest.raises(SystemExit) as exit:
        entry.run(lambda args: None, argparse.Namespace(trigger_word="caf\udce9"))
    assert exit.value.code == 2
    assert "--trigger_word 'caf\\udce9'" in capsys.readouterr().err


def test_bugs_keep_their_traceback(signals):
    with pytest.raises(OSError, match="odd"):
        entry.run(lambda args: (_ for _ in ()).throw(OSError("odd")), ARGS)
    with pytest.raises(RuntimeError, match="gloo"):  # of one process alone this is no lost connection
        entry.run(lambda args: (_ for _ in ()).throw(RuntimeError("gloo")), ARGS)


def test_letters_that_the_console_lacks_are_escaped(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    protect_console()
    print("Büro \ud83d")
    sys.stdout.flush()
    assert raw.getvalue() == b"B\\xfcro \\ud83d\n"


TALKS = """
from sketch_perceptual.cli.console import protect_console

protect_console()
for number in range(99999):
    print(number)
open("done", "w").close()
"""


def test_a_closed_pipe_ends_nothing(tmp_path):
    (tmp_path / "talks.py").write_text(TALKS)
    done = subprocess.run(
        f"{sys.executable} talks.py | head -1",
        shell=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("0\n", "")
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize(
    "option", ["--adam_beta1 1", "--adam_beta2 1.5", "--learning_rate 0", "--learning_rate nan", "--max_grad_norm 0"]
)
def test_numbers_that_cannot_train_are_refused_by_name(option, capsys):
    parser = Parser()
    add_training_options(parser, "out")
    with pytest.raises(SystemExit):
        parser.parse_args(option.split())
    assert f"argument {option.split()[0]}: must be a number" in capsys.readouterr().err


def test_an_empty_token_is_none():
    parser = Parser()
    add_training_options(parser, "out")
    assert parser.parse_args(["--hub_token", ""]).hub_token is None


LAUNCHED = """
import sys
from sketch_perceptual.cli import entry
import argparse
entry.run(lambda args: print("trains"), argparse.Namespace(hub_token="hf_secret"))
"""


@pytest.mark.slow
def test_a_launcher_never_prints_a_token(tmp_path):
    (tmp_path / "driver.py").write_text(LAUNCHED)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "driver.py"]
    done = subprocess.run(
        [*command, "--hub_token", "hf_secret"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "--hub_token would be printed" in done.stderr and "`hf auth login`" in done.stderr
    assert "hf_secret" not in done.stdout + done.stderr
    assert "trains" not in done.stdout


@pytest.mark.parametrize("option", startup.READ)
def test_what_is_written_is_not_what_is_read(option, tmp_path):
    args = argparse.Namespace(output_dir=str(tmp_path / "x" / ".."), **{option: str(tmp_path)})
    with pytest.raises(InputError, match=f"`output_dir` .* would replace {tmp_path}"):
        startup.check_apart(args)
    args.output_dir = str(tmp_path / "out")
    if option == "dataset_name":  # whose files `datasets` finds by itself
        with pytest.raises(InputError, match=r"`output_dir` .*`dataset_name`"):
            startup.check_apart(args)
    else:
        startup.check_apart(args)


def test_a_result_is_not_what_it_is_made_from(tmp_path):
    (tmp_path / "best").mkdir()
    args = argparse.Namespace(output_dir=str(tmp_path), init_weights=str(tmp_path / "best"))
    with pytest.raises(InputError, match=r"`output_dir` .*best would replace .*best, which is read"):
        startup.check_apart(args)


@pytest.mark.slow
def test_results_that_are_lost_end_with_a_sentence(signals, capsys):
    """Not those that nobody wants to read, as into a closed pipe."""
    code = "import argparse; from sketch_perceptual.cli import console, entry;"
    code += "entry.run(lambda args: console.print_result('0.123'), argparse.Namespace(), 'compare')"
    command = [sys.executable, "-c", code]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "compare: error: [Errno 28] No space left on device: 'standard output'\n"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
