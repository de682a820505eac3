"""Entry point of every program: run `main`, and turn errors into a message and an exit code."""

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

import torch
from PIL import Image
from safetensors import SafetensorError

from ..errors import InputError, TrainingError, first_line, in_options, is_out_of_memory, printable, program
from . import interruption
from .console import protect_console

LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "gloo")
# Options that affect the use of memory.
BATCHES = ("train_batch_size", "batch_size", "generation_batch_size", "extraction_batch_size")
SAVERS = ("gradient_checkpointing", "pool_after_attention")
PATHS = ("_dir", "_file", "_path", "output", "input", "figure", "index", "checkpoint")
POSITIONALS = ("first", "second", "source", "target")  # arguments that are not options
SIZES = ("perceptual_crop", "resolution", "size")


def run(main: Callable, args: argparse.Namespace, name: str | None = None) -> None:
    """Call `main(args)`. Errors of the user and of the machine end the program with a message, not a traceback.

    Exit codes: 2, a mistake in the input, a file that cannot be read or written, or out of memory; 3, a failed
    training, such as a loss or weights that are not finite; 128 + n, signal n.

    Args:
        name: of the program in its messages; default: the script's.
    """
    protect_console()
    interruption.install()
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # reported with the data

    def end(code: int, message: str) -> NoReturn:
        print(f"{name or program()}: {printable(in_options(message, args))}", file=sys.stderr)
        sys.exit(code)

    try:
        _check_strings(args)
        if getattr(args, "hub_token", None) and (launcher := interruption.launcher()):
            _refuse_token(args, launcher)
        main(args)
    except InputError as error:
        end(2, f"error: {error}")
    except (FloatingPointError, TrainingError) as error:
        end(3, f"training stopped: {error}")
    except interruption.Interrupted as stop:
        end(128 + stop.number, f"interrupted by {signal.Signals(stop.number).name}")
    except Exception as error:
        if is_out_of_memory(error):
            end(2, f"error: {memory_advice(error, args)}")
        if (isinstance(error, OSError) and error.errno) or (
            isinstance(error, SafetensorError) and "os error" in str(error)
        ):
            end(2, f"error: {first_line(error)}")
        if torch.distributed.is_initialized() and any(sign in str(error) for sign in LOST):
            end(1, "error: another process of this run has ended: see its message, unless it was killed")
        raise


def memory_advice(error: BaseException, args: argparse.Namespace) -> str:
    """Return the error on one line, and the options of this program that would save memory."""
    values = vars(args)
    advice = [f"`{name}` 1" for name in BATCHES if (values.get(name) or 1) > 1]
    advice += [f"`{name}`" for name in SAVERS if values.get(name, True) in (False, None)]
    if torch.cuda.is_available() and values.get("mixed_precision", "bf16") in (None, "no"):
        advice.append("`mixed_precision` bf16")
    advice += [f"a smaller `{name}`" for name in SIZES if name in values]
    return f"out of memory ({first_line(error)[:200]})" + (f". Use {', or '.join(advice)}" if advice else "")


def _check_strings(args: argparse.Namespace) -> None:
    """InputError for bytes that are not UTF-8, which no log, card or JSON could contain, and for empty paths."""
    for name, value in vars(args).items():
        if value == "" and name.endswith(PATHS):
            raise InputError(f"`{name}` is empty: name a file or folder, or leave it out")
        for text in value if isinstance(value, list) else [value]:
            try:
                str(text).encode()
            except UnicodeEncodeError:
                option = "" if name in POSITIONALS else f"`{name}` "
                raise InputError(f"{option}{str(text)!a} is not UTF-8: rename it, or use a UTF-8 locale") from None


def _refuse_token(args: argparse.Namespace, launcher: int) -> None:
    """Exit after ending the launcher, which would print the command line of a script that fails."""
    message = (
        "`hub_token` would be printed by the launcher of this script: use `hf auth login` or the variable HF_TOKEN"
    )
    print(f"{program()}: error: {in_options(message, args)}", file=sys.stderr, flush=True)
    os.kill(launcher, signal.SIGTERM)
    os._exit(2)
