"""Start of a trainer: checks, accelerator, logging, the run in its folder."""

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

# Options of trainers that name a file or a folder that is read.
READ = """train_data_dir dataset_name paired_data_dir style backbone init_weights pretrained_model_name_or_path
    perceptual_decoder""".split()
RESULTS = ("best", "last", "model.safetensors", "pytorch_lora_weights.safetensors")  # what trainers write there
PATIENCE = timedelta(hours=2)  # the other processes wait while the main one draws or exports


def start(args: Options) -> Run:
    """The run of a trainer, after what can be checked first: trackers, precision, strategy, the folder, a resume.

    Seeds every process alike.
    """
    interruption.install()
    trackers = [] if args.report_to == "none" else [args.report_to]
    if args.report_to in ("wandb", "all") and args.hub_token is not None:
        raise InputError("`hub_token` would be shown to wandb; use `hf auth login` instead")
    check_trackers(trackers)
    if args.hub_token is not None:  # trackers may keep the command line
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
            f"{accelerator.distributed_type.value} shards what these scripts keep whole; use plain data parallelism:"
            " accelerate launch --multi_gpu"
        )
    start_logging(accelerator, args)
    if args.hub_token is not None:
        logger.warning("`hub_token` stands in the list of processes while this runs; use `hf auth login` instead")
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
    dataset = hub_id(args.dataset_name)
    run.card_data = {"license": args.license, "datasets": [dataset] if dataset else None}
    set_seed(run.seed)
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return run


def dry_run(args: argparse.Namespace, show: Callable[[int], object]) -> bool:
    """Whether this is one: then all of it is `show(seed)` on the main process. Checks `figure_data` for any run.

    InputError lists all that `show` complains of.
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
    """Arguments in backticks as options of the command line."""

    def __init__(self, args: argparse.Namespace):
        super().__init__("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")
        self.args = args

    def format(self, record: logging.LogRecord) -> str:
        return printable(in_options(super().format(record), self.args))


def start_logging(accelerator: Accelerator, args: argparse.Namespace) -> None:
    """Times and levels on the screen, from the main process; of the libraries only what is wrong."""
    logging.raiseExceptions = False  # a console that has gone ends nothing
    screen = logging.StreamHandler()
    screen.setFormatter(_InOptions(args))
    logging.basicConfig(handlers=[screen])
    logging.getLogger().setLevel(logging.INFO if accelerator.is_main_process else logging.WARNING)
    logging.captureWarnings(True)
    for name in ("accelerate", "httpx", "httpx2", "matplotlib"):  # they tell addresses, and of fonts
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").propagate = False  # it shows its warnings itself
    if importlib.util.find_spec("transformers"):  # searching does without
        silence(importlib.import_module("transformers"))


def silence(library: ModuleType) -> None:
    """Diffusers or transformers: what matters of their advice is checked by the scripts."""
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()


def check_writable(folder: Path) -> None:
    """Make the folder of `output_dir`; InputError if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"`output_dir` {folder} cannot be written to: {error.strerror}") from error


def inputs_of(args: argparse.Namespace) -> list[str]:
    """The files, folders and names elsewhere that a trainer's options say it reads."""
    values = (vars(args).get(name) for name in READ)
    return [str(item) for value in values if value for item in (value if isinstance(value, list) else [value])]


def check_apart(args: argparse.Namespace) -> None:
    """InputError if what is written would lie among what is read, or be it.

    An output folder inside a folder of images is left out where that is read, but not by `datasets`.
    """
    folder, data = Path(args.output_dir), vars(args).get("dataset_name")
    check_outputs(
        [Output("output_dir", path) for path in (folder, *(folder / name for name in RESULTS))], inputs_of(args)
    )
    if data and Path(data).is_dir() and Path(data).resolve() in folder.resolve().parents:
        raise InputError(f"`output_dir` {folder} lies in `dataset_name`, which is read: choose another folder")


def check_space(output_dir: str | Path, saves: int, total_limit: int | None, checkpoint: float, result: float) -> str:
    """How many bytes a run will write and how many are free, in words; InputError if it is too many.

    Args:
        saves: how many checkpoints the run writes if none goes; `total_limit`, how many stay.
        checkpoint, result: bytes of each, and of what stays beside them.
    """
    if total_limit is not None:
        saves = min(saves, total_limit + 1)  # the oldest goes only when the newest is complete
    needed, free = saves * checkpoint + result, shutil.disk_usage(output_dir).free
    if needed > free:
        raise InputError(
            f"`output_dir` {output_dir} has {free / 1e9:.1f} GB left and this run will write {needed / 1e9:.1f}; lower"
            " `checkpoints_total_limit` or choose another folder"
        )
    return f"{needed / 1e9:.1f} GB will be written, {free / 1e9:.0f} are free"


def versions() -> dict[str, str]:
    """Of what a result rests on."""
    own = {"python": platform.python_version(), "sketch-perceptual": sys.modules["sketch_perceptual"].__version__}
    names = ("torch", "torchvision", "Pillow", "accelerate", "datasets", "diffusers", "transformers", "peft")
    return own | {name: importlib.metadata.version(name) for name in names}
