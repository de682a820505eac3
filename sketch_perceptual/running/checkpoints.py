"""Saving, finding, resuming."""

import argparse
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from safetensors import SafetensorError

from ..errors import InputError, first_line

logger = get_logger(__name__, log_level="INFO")

STATE_FILE = "training_state.json"  # written last: a checkpoint without it is not complete


def keep_whole(accelerator: Accelerator, load: Callable[[str], torch.nn.Module]) -> None:
    """From now on checkpoints hold the model as its `save_pretrained` writes it; `load` reads such a folder."""

    def save_model(models, weights, output_dir):
        weights.clear()
        if accelerator.is_main_process:
            accelerator.unwrap_model(models[0]).save_pretrained(output_dir)

    def load_model(models, input_dir):
        accelerator.unwrap_model(models.pop()).load_state_dict(load(input_dir).state_dict())

    accelerator.register_save_state_pre_hook(save_model)
    accelerator.register_load_state_pre_hook(load_model)


def save_checkpoint(accelerator: Accelerator, args: argparse.Namespace, state: dict) -> Path:
    """Write `checkpoint-N` for `state["global_step"]` aside, rename it when complete, and only then drop old ones.

    Call it on all processes. Returns where it is.
    """
    final = Path(args.output_dir, f"checkpoint-{state['global_step']}")
    partial = final.with_name(f".{final.name}.partial")
    if accelerator.is_main_process:
        for abandoned in final.parent.glob(".checkpoint-*.partial"):
            shutil.rmtree(abandoned)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(partial))
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save's is a RuntimeError
        raise InputError(
            f"{final} could not be written: {first_line(error)}. Older checkpoints are as they were: make room and"
            " go on with --resume_from_checkpoint latest"
        ) from error
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
    return final


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
