"""What the trainers share: options, start, data order, optimizer, checkpoints, resume, interruption."""

import argparse
import json
import logging
import math
import os
import re
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import diffusers
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
from diffusers.optimization import get_scheduler

from .data import Images, Scan, generator, scan
from .errors import InputError

logger = get_logger(__name__, log_level="INFO")

SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
VALIDATION_PATIENCE = timedelta(hours=2)  # the other processes wait while the main one draws or exports
STATE_FILE = "training_state.json"  # written last: a checkpoint without it is not complete


def at_least(minimum, kind=int) -> Callable[[str], int | float]:
    """An argparse type: a finite number no smaller than `minimum`."""

    def number(text: str):
        value = kind(text)
        if not (math.isfinite(value) and value >= minimum):
            raise argparse.ArgumentTypeError(f"must be a number of at least {minimum}, got {text}")
        return value

    number.__name__ = kind.__name__
    return number


def add_training_options(parser: argparse.ArgumentParser, output_dir: str) -> None:
    """The options that diffusers' training scripts share, with their names, defaults and meaning."""
    add = parser.add_argument_group("training").add_argument
    count, natural, rate = at_least(1), at_least(0), at_least(0.0, float)
    add("--output_dir", default=output_dir, help="where the model, the checkpoints and the logs are written")
    add("--seed", type=natural, help="decides every random draw; one is drawn and saved if not given")
    add("--train_batch_size", type=count, default=16, help="images a step and process")
    add("--num_train_epochs", type=count, default=100)
    add("--max_train_steps", type=count, help="optimizer steps in all; overrides --num_train_epochs")
    add("--gradient_accumulation_steps", type=count, default=1, help="batches an optimizer step")
    add("--gradient_checkpointing", action="store_true", help="less memory, a slower backward pass")
    add("--learning_rate", type=rate, default=1e-4)
    add("--scale_lr", action="store_true", help="multiply the rate by processes, accumulation and batch size")
    add("--lr_scheduler", default="constant", choices=SCHEDULES)
    add("--lr_warmup_steps", type=natural, default=500, help="optimizer steps")
    add("--adam_beta1", type=rate, default=0.9)
    add("--adam_beta2", type=rate, default=0.999)
    add("--adam_weight_decay", type=rate, default=1e-2)
    add("--adam_epsilon", type=rate, default=1e-8)
    add("--max_grad_norm", type=at_least(1e-12, float), default=1.0, help="gradients are clipped to this norm")
    add("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere GPUs and newer")
    add("--dataloader_num_workers", type=natural, default=0, help="processes that read images; 0 is the main one")
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="default: what accelerate was told")
    add("--logging_dir", default="logs", help="inside --output_dir")
    add(
        "--report_to",
        default="tensorboard",
        help="tensorboard, wandb, comet_ml, another tracker of accelerate's, all or none",
    )
    add("--local_rank", type=int, default=-1, help="for launchers that pass it; the environment decides")
    add("--checkpointing_steps", type=count, default=500, help="save a checkpoint every so many optimizer steps")
    add("--checkpoints_total_limit", type=count, help="keep only the newest so many")
    add("--resume_from_checkpoint", help='a checkpoint\'s folder or its name in --output_dir, or "latest"')
    add("--push_to_hub", action="store_true", help="upload the result to the Hugging Face Hub")
    add("--hub_token", help="better: hf auth login")
    add("--hub_model_id", help="the Hub repository; default: the name of --output_dir")


def add_data_options(parser: argparse.ArgumentParser) -> Callable:
    """The options that say where pictures come from; returns `add_argument` of their group for more of them."""
    add = parser.add_argument_group("data").add_argument
    add("--dataset_name", help="a data set of the Hub, or a folder that `datasets` can read")
    add("--dataset_config_name")
    add("--image_column", default="image")
    add("--on_bad_image", choices=("error", "skip"), default="error", help="what to do with unreadable images")
    add("--background", default="white", help="colour behind transparent drawings")
    add("--max_train_samples", type=at_least(1), help="use a random choice of so many images")
    add("--cache_dir", help="where downloads are kept")
    return add


def run(main: Callable, args: argparse.Namespace) -> None:
    """Call `main(args)`; a user's mistake ends in a sentence and exit code 2, a loss that stays non-finite in 3."""
    try:
        main(args)
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:
        print(f"{Path(sys.argv[0]).name}: training stopped: {error}", file=sys.stderr)
        sys.exit(3)


def start(args: argparse.Namespace) -> Accelerator:
    """The accelerator, after what can be checked first: trackers, precision, strategy, a folder to write to.

    Seeds every process alike; `args.seed` is drawn, and the same on all, where none was given.
    """
    if args.report_to == "wandb" and args.hub_token is not None:
        raise InputError("--hub_token would be shown to wandb; use `hf auth login` instead")
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            log_with=None if args.report_to == "none" else args.report_to,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=VALIDATION_PATIENCE)],
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
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger().setLevel(logging.INFO if accelerator.is_main_process else logging.WARNING)
    logging.captureWarnings(True)
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    for library in (diffusers, transformers):  # what matters of their advice is checked by the scripts
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    _check_writable(Path(args.output_dir))
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


def start_trackers(accelerator: Accelerator, name: str, args: argparse.Namespace) -> None:
    """Open the trackers with the options as hyper-parameters, the token left out."""
    options = {k: v for k, v in vars(args).items() if k != "hub_token"}
    plain = (bool, int, float, str)  # TensorBoard takes no lists and no None
    accelerator.init_trackers(name, {k: v if isinstance(v, plain) else str(v) for k, v in options.items()})


class EpochSampler(torch.utils.data.Sampler):
    """Yields (epoch, index) in an order drawn from (seed, epoch) alone; set `epoch` before each pass."""

    def __init__(self, length: int, seed: int):
        self.length, self.seed, self.epoch = length, seed, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self):
        order = torch.randperm(self.length, generator=generator(self.seed, "order", self.epoch))
        return iter([(self.epoch, index) for index in order.tolist()])


def make_loader(args: argparse.Namespace, data, collate: Callable) -> tuple[EpochSampler, torch.utils.data.DataLoader]:
    """Batches of `data`, which is indexed by (epoch, index), and the sampler that orders them."""
    sampler = EpochSampler(len(data), args.seed)
    loader = torch.utils.data.DataLoader(
        data,
        args.train_batch_size,
        sampler=sampler,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        persistent_workers=args.dataloader_num_workers > 0,
    )
    return sampler, loader


def plan_steps(args: argparse.Namespace, batches: int) -> None:
    """Settle `max_train_steps` and `num_train_epochs` for epochs of `batches` batches a process."""
    steps_per_epoch = math.ceil(batches / args.gradient_accumulation_steps)
    if args.max_train_steps is None:
        args.max_train_steps = args.num_train_epochs * steps_per_epoch
    args.num_train_epochs = math.ceil(args.max_train_steps / steps_per_epoch)


def choose_samples(args: argparse.Namespace, data: Images) -> Images:
    """The random `--max_train_samples` of `data`, or all."""
    if args.max_train_samples is None or args.max_train_samples >= len(data):
        return data
    chosen = torch.randperm(len(data), generator=generator(args.seed, "samples"))[: args.max_train_samples]
    return data.select(sorted(chosen.tolist()))


def scan_images(accelerator: Accelerator, data: Images, visit: Callable | None = None) -> Scan:
    """`scan` on the main process; its result on all."""
    return broadcast_object_list([scan(data, visit) if accelerator.is_main_process else None])[0]


def make_optimizer(
    args: argparse.Namespace, parameters: list[torch.nn.Parameter], optimizer_class=torch.optim.AdamW, **options
) -> torch.optim.Optimizer:
    """AdamW as diffusers' scripts set it up; without weight decay it is Adam."""
    return optimizer_class(
        parameters,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
        **options,
    )


def make_lr_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer):
    """The schedule in optimizer steps: step it once for each; accelerate would count processes as well."""
    return get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )


def save_checkpoint(accelerator: Accelerator, args: argparse.Namespace, state: dict) -> None:
    """Write `checkpoint-N` for `state["global_step"]` aside, rename it when complete, and only then drop old ones.

    Call it on all processes.
    """
    final = Path(args.output_dir, f"checkpoint-{state['global_step']}")
    partial = final.with_name(f".{final.name}.partial")
    if accelerator.is_main_process:
        for abandoned in final.parent.glob(".checkpoint-*.partial"):
            shutil.rmtree(abandoned)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / STATE_FILE).write_text(json.dumps(state, indent=2), encoding="utf-8")
        for path in filter(Path.is_file, partial.rglob("*")):
            with path.open("r+b") as file:
                os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        if args.checkpoints_total_limit is not None:
            others = [path for path in find_checkpoints(args.output_dir) if path != final]
            for old in others[: max(0, len(others) + 1 - args.checkpoints_total_limit)]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()
    logger.info(f"saved {final}")


def load_checkpoint(accelerator: Accelerator, args: argparse.Namespace, settings: dict) -> dict | None:
    """Resume as `--resume_from_checkpoint` says; the saved state, or None to start from the beginning.

    `settings` are the options that a resumed run must share with the saved one.
    """
    path = _choose_checkpoint(args)
    if path is None:
        return None
    state = _read_state(path)
    for name, now in settings.items():
        if (saved := state["settings"].get(name)) != now:
            raise InputError(
                f"{path} was trained with {name}={saved}, this run has {name}={now}; they must be the same"
            )
    accelerator.load_state(str(path))
    logger.info(f"resumed from {path}")
    return state


def find_checkpoints(output_dir: str | Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    complete = [path for path in found if (path / STATE_FILE).is_file()]
    return sorted(complete, key=lambda path: int(path.name.split("-")[1]))


def catch_signals() -> Callable[[], int]:
    """From now on Ctrl-C and SIGTERM only take note; returns a function that tells which came, 0 for none.

    A second Ctrl-C interrupts at once.
    """
    received = 0

    def note(number, frame):
        nonlocal received
        received = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return lambda: received


class NonFiniteGuard:
    """Counts the optimizer steps whose loss or gradient was not finite, and ends the run after a few in a row.

    `scaled` says that a gradient scaler is at work: it overflows while it settles, and skips those steps by itself.
    """

    def __init__(self, total: int = 0, scaled: bool = False):
        self.total, self.scaled, self.in_a_row = total, scaled, 0
        self.limit = 25 if scaled else 5

    def is_finite(self, step: int, values: list[float], seen: list[tuple]) -> bool:
        """Whether all `values` are finite; if not, names the step and, of `seen`, what this process had in it.

        Args:
            seen: for each batch of the step the images' names, their losses (B,) and, for diffusion, timesteps (B,).
        """
        if all(map(math.isfinite, values)):
            self.in_a_row = 0
            return True
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        rows = [
            " at timestep ".join([name, *map(str, timestep)])
            for names, losses, *timesteps in seen
            for name, loss, *timestep in zip(names, losses.tolist(), *(t.tolist() for t in timesteps), strict=True)
            if not math.isfinite(loss)
        ]
        blame = f"loss of {', '.join(rows)}" if rows else "gradient"
        logger.warning(f"step {step} skipped, not finite: {blame}", main_process_only=False)
        if self.in_a_row >= self.limit:
            raise FloatingPointError(
                f"{self.in_a_row} steps in a row were not finite, the last at step {step}: {blame}. No such step was"
                " saved. Lower --learning_rate or a weight of the loss, or use --mixed_precision bf16."
            )
        return False


def _choose_checkpoint(args: argparse.Namespace) -> Path | None:
    if args.resume_from_checkpoint is None:
        return None
    complete = find_checkpoints(args.output_dir)
    if args.resume_from_checkpoint == "latest":
        if not complete:
            logger.warning(f"no complete checkpoint in {args.output_dir}: starting from the beginning")
        return complete[-1] if complete else None
    for path in (Path(args.resume_from_checkpoint), Path(args.output_dir, args.resume_from_checkpoint)):
        if (path / STATE_FILE).is_file():
            return path
    names = ", ".join(path.name for path in complete) or "none"
    name = args.resume_from_checkpoint
    raise InputError(f"--resume_from_checkpoint {name} is no complete checkpoint; {args.output_dir} has {names}")


def _read_state(checkpoint: Path) -> dict:
    return json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"--output_dir {folder} cannot be written to: {error.strerror}") from error
