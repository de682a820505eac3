"""Start-up of a trainer: checks, accelerator, logging, and the run in its folder."""

import argparse
import importlib.metadata
import importlib.util
import logging
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration, set_seed

from ..cli import interruption
from ..cli.arguments import Options
from ..errors import InputError, all_troubles, in_options, printable
from ..files import Output, check_outputs
from .cards import hub_id
from .distributed import on_main
from .identity import identity_of
from .run import Run
from .trackers import check_trackers

logger = get_logger(__name__, log_level="INFO")

# Options of trainers that name a file or folder to read.
READ = """train_data_dir dataset_name paired_data_dir style backbone init_weights pretrained_model_name_or_path
    perceptual_decoder teacher_lora prompts""".split()
RESULTS = ("best", "last", "model.safetensors", "pytorch_lora_weights.safetensors")  # in `output_dir`
PATIENCE = timedelta(hours=2)  # the other processes wait while the main one samples or exports


def start(args: Options) -> Run:
    """Check trackers, precision, strategy, folder and checkpoint, then return the run.

    Seeds all processes with the same number.
    """
    interruption.install()
    trackers = [] if args.report_to == "none" else [args.report_to]
    if args.report_to in ("wandb", "all") and args.hub_token is not None:
        raise InputError("wandb would record `hub_token`; use `hf auth login` instead")
    check_trackers(trackers)
    if args.hub_token is not None:  # trackers may record the command line
        sys.argv = [argument.replace(args.hub_token, "***") for argument in sys.argv]
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            log_with=trackers or None,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
            project_config=ProjectConfiguration(
                args.output_dir, logging_dir=str(Path(args.output_dir, args.logging_dir))
            ),
        )
    except (ValueError, ImportError) as error:
        raise InputError(f"accelerate refuses `mixed_precision` or `report_to`: {error}") from error
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM):
        raise InputError(
            f"{accelerator.distributed_type.value} shards the model; these scripts need plain data parallelism:"
            " accelerate launch --multi_gpu"
        )
    start_logging(accelerator, args)
    if args.hub_token is not None:
        logger.warning("`hub_token` is visible in the process list while this runs; use `hf auth login` instead")
    check_apart(args)
    check_writable(Path(args.output_dir))
    run = Run(
        accelerator,
        args.output_dir,
        identity_of(args, accelerator),
        resume_from=args.resume_from_checkpoint,
        resume_with=args.resume_with,
        fixed=args.fixed,
        total_limit=args.checkpoints_total_limit,
    )
    dataset = hub_id(vars(args).get("dataset_name"))
    run.card_data = {"license": args.license, "datasets": [dataset] if dataset else None}
    set_seed(run.seed)
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return run


def dry_run(args: argparse.Namespace, show: Callable[[int], object]) -> bool:
    """Call `show(seed)` on the main process if `dry_run` is set; return whether it is.

    `figure_data` is checked in any case. InputError lists every problem that `show` finds.
    """
    if args.figure_data:
        check_outputs([Output("figure_data", args.figure_data, (".png",))], inputs_of(args))
    if args.dry_run:
        accelerator = Accelerator()
        start_logging(accelerator, args)
        on_main(accelerator, partial(_show_all_troubles, show), args.seed or 0)
        accelerator.end_training()
    return args.dry_run


def _show_all_troubles(show: Callable[[int], object], seed: int) -> None:
    with all_troubles():
        show(seed)


class _InOptions(logging.Formatter):
    """Formatter that writes arguments in backticks as command-line options."""

    def __init__(self, args: argparse.Namespace):
        super().__init__("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")
        self.args = args

    def format(self, record: logging.LogRecord) -> str:
        return printable(in_options(super().format(record), self.args))


def start_logging(accelerator: Accelerator, args: argparse.Namespace) -> None:
    """Log to the console with times and levels: INFO from the main process, warnings from the rest and libraries."""
    logging.raiseExceptions = False  # a closed console must not end the run
    console = logging.StreamHandler()
    console.setFormatter(_InOptions(args))
    logging.basicConfig(handlers=[console])
    logging.getLogger().setLevel(logging.INFO if accelerator.is_main_process else logging.WARNING)
    logging.captureWarnings(True)
    for name in ("accelerate", "httpx", "httpx2", "matplotlib"):  # they log URLs and fonts
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").propagate = False  # it prints its warnings itself
    if importlib.util.find_spec("transformers"):  # search does not need it
        silence(importlib.import_module("transformers"))


def silence(library: ModuleType) -> None:
    """Restrict diffusers or transformers to errors; the scripts check what their warnings are about."""
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()


def check_writable(folder: Path) -> None:
    """Create `output_dir`; InputError if it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"`output_dir` {folder} cannot be written to: {error.strerror}") from error


def inputs_of(args: argparse.Namespace) -> list[str]:
    """Return the files, folders and Hub ids that a trainer's options name for reading."""
    values = (vars(args).get(name) for name in READ)
    return [str(item) for value in values if value for item in (value if isinstance(value, list) else [value])]


def check_apart(args: argparse.Namespace) -> None:
    """Raise InputError if an output would replace an input or be read as one.

    An output folder inside a folder of images is skipped when the images are read, but not by `datasets`.
    """
    folder, data = Path(args.output_dir), vars(args).get("dataset_name")
    check_outputs(
        [Output("output_dir", path) for path in (folder, *(folder / name for name in RESULTS))], inputs_of(args)
    )
    if data and Path(data).is_dir() and Path(data).resolve() in folder.resolve().parents:
        raise InputError(f"`output_dir` {folder} is inside `dataset_name`, which is read: choose another folder")


def check_space(output_dir: str | Path, saves: int, total_limit: int | None, checkpoint: float, result: float) -> str:
    """Return how much a run will write and how much is free, as text; InputError if it does not fit.

    Args:
        saves: number of checkpoints the run writes; `total_limit`: number of those it keeps.
        checkpoint, result: size in bytes of a checkpoint, and of all other files.
    """
    if total_limit is not None:
        saves = min(saves, total_limit + 1)  # the oldest is deleted only when the newest is complete
    needed, free = saves * checkpoint + result, shutil.disk_usage(output_dir).free
    if needed > free:
        raise InputError(
            f"`output_dir` {output_dir} has {free / 1e9:.1f} GB left and this run will write {needed / 1e9:.1f}; lower"
            " `checkpoints_total_limit` or choose another folder"
        )
    return f"{needed / 1e9:.1f} GB will be written, {free / 1e9:.0f} are free"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result depends on."""
    base = {"python": platform.python_version(), "sketch-perceptual": sys.modules["sketch_perceptual"].__version__}
    names = ("torch", "torchvision", "Pillow", "accelerate", "datasets", "diffusers", "transformers", "peft")
    return base | {name: importlib.metadata.version(name) for name in names}
