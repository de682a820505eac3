"""How a script starts and ends."""

import argparse
import errno
import importlib.metadata
import logging
import os
import platform
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import ModuleType

import torch
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import (
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    set_seed,
)
from safetensors import SafetensorError

from ..errors import InputError, first_line
from .checkpoints import _choose_checkpoint, _read_state

logger = get_logger(__name__, log_level="INFO")

PATIENCE = timedelta(hours=2)  # the other processes wait while the main one draws or exports
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run(main: Callable, args: argparse.Namespace) -> None:
    """Call `main(args)`; a user's mistake ends in a sentence and exit code 2, a loss that stays non-finite in 3."""
    try:
        main(args)
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: error: {in_options(str(error), args)}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:
        print(f"{Path(sys.argv[0]).name}: training stopped: {error}", file=sys.stderr)
        sys.exit(3)
    except (OSError, SafetensorError) as error:
        if not any(os.strerror(number) in str(error) for number in NO_ROOM):
            raise
        print(f"{Path(sys.argv[0]).name}: error: {first_line(error)}", file=sys.stderr)
        sys.exit(2)


def in_options(message: str, args: argparse.Namespace) -> str:
    """The message of a library function, whose arguments stand in backticks, in the words of the command line."""
    return re.sub(r"`(\w+)`", lambda name: f"--{name[1]}" if name[1] in args else name[0], message)


def on_main(accelerator: Accelerator, function: Callable, *arguments):
    """`function(*arguments)` on the main process; its result, or its InputError, on all."""
    outcome = [None, None]
    if accelerator.is_main_process:
        try:
            outcome = [function(*arguments), None]
        except InputError as error:
            outcome = [None, str(error)]
    result, message = broadcast_object_list(outcome)
    if message is not None:
        raise InputError(message)
    return result


def start(args: argparse.Namespace) -> Accelerator:
    """The accelerator, after what can be checked first: trackers, precision, strategy, a folder to write to.

    Seeds every process alike; `args.seed` is drawn, and the same on all, where none was given.
    """
    if args.report_to in ("wandb", "all") and args.hub_token is not None:
        raise InputError("--hub_token would be shown to wandb; use `hf auth login` instead")
    if args.hub_token is not None:  # trackers may keep the command line
        sys.argv = [argument.replace(args.hub_token, "***") for argument in sys.argv]
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            log_with=None if args.report_to == "none" else args.report_to,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
            project_config=ProjectConfiguration(
                args.output_dir, logging_dir=str(Path(args.output_dir, args.logging_dir))
            ),
        )
    except (ValueError, ImportError) as error:
        raise InputError(f"accelerate refuses --mixed_precision or --report_to: {error}") from error
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM):
        raise InputError(
            f"{accelerator.distributed_type.value} shards what these scripts keep whole; use plain data parallelism:"
            " accelerate launch --multi_gpu"
        )
    start_logging(accelerator)
    if args.hub_token is not None:
        logger.warning("--hub_token stands in the list of processes while this runs; use `hf auth login` instead")
    check_writable(Path(args.output_dir))
    if args.seed is None:
        checkpoint = _choose_checkpoint(args)
        args.seed = _read_state(checkpoint)["settings"]["seed"] if checkpoint else secrets.randbelow(2**31)
    args.seed = broadcast_object_list([args.seed])[0]
    set_seed(args.seed)
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    if args.scale_lr:
        args.learning_rate *= args.gradient_accumulation_steps * args.train_batch_size * accelerator.num_processes
    return accelerator


def start_logging(accelerator: Accelerator) -> None:
    """Times and levels on the screen, from the main process; of the libraries only what is wrong."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger().setLevel(logging.INFO if accelerator.is_main_process else logging.WARNING)
    logging.captureWarnings(True)
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    silence(transformers)


def silence(library: ModuleType) -> None:
    """Diffusers or transformers: what matters of their advice is checked by the scripts."""
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()


def check_writable(folder: Path) -> None:
    """Make the folder of `--output_dir`; InputError if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"--output_dir {folder} cannot be written to: {error.strerror}") from error


def check_space(args: argparse.Namespace, saves: int, checkpoint: float, result: float) -> str:
    """How many bytes a run will write and how many are free, in words; InputError if it is too many.

    Args:
        saves: how many checkpoints the run writes if none goes.
        checkpoint, result: bytes of each, and of what stays beside them.
    """
    if args.checkpoints_total_limit is not None:
        saves = min(saves, args.checkpoints_total_limit + 1)  # the oldest goes only when the newest is complete
    needed, free = saves * checkpoint + result, shutil.disk_usage(args.output_dir).free
    if needed > free:
        raise InputError(
            f"--output_dir {args.output_dir} has {free / 1e9:.1f} GB left and this run will write {needed / 1e9:.1f};"
            " lower --checkpoints_total_limit or choose another folder"
        )
    return f"{needed / 1e9:.1f} GB will be written, {free / 1e9:.0f} are free"


def versions() -> dict[str, str]:
    """Of what a result rests on."""
    own = {"python": platform.python_version(), "sketch-perceptual": sys.modules["sketch_perceptual"].__version__}
    names = ("torch", "torchvision", "Pillow", "accelerate", "datasets", "diffusers", "transformers", "peft")
    return own | {name: importlib.metadata.version(name) for name in names}
