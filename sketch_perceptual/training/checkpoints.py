"""Write, find and verify checkpoints."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.logging import get_logger

from ..errors import InputError
from ..files import checksum, files_in

logger = get_logger(__name__, log_level="INFO")

STATE_FILE = "training_state.json"  # written last: a checkpoint without it is incomplete
OPTIMIZER_FILE = "optimizer.safetensors"
CHECKPOINT = re.compile(r"checkpoint-(\d+)(\.replaced)?")
VERSION = 2  # of the checkpoint layout


def write_checkpoint(final: Path, write_weights: Callable[[Path], None], state: dict) -> None:
    """Write to a temporary folder, with a checksum of each file, and rename it to `final` once complete."""
    partial = final.with_name(f".{final.name}.partial")
    for abandoned in final.parent.glob(".checkpoint-*.partial"):
        shutil.rmtree(abandoned)
    partial.mkdir()
    write_weights(partial)
    files = {str(path.relative_to(partial)): checksum(path) for path in files_in(partial)}
    text = json.dumps({"version": VERSION} | state | {"files": files}, indent=1)
    check = hashlib.sha256(text.encode()).hexdigest()
    (partial / STATE_FILE).write_text(f"{check}\n{text}", encoding="utf-8")
    for path in files_in(partial):
        with path.open("r+b") as file:
            os.fsync(file.fileno())
    replaced = final.with_name(f"{final.name}.replaced")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)  # `find_checkpoints` falls back to it until the next line
    partial.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)


def find_checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the complete checkpoints of a folder, oldest first."""
    by_step = {}
    for path in sorted(Path(output_dir).glob("checkpoint-*"), reverse=True):  # .replaced first
        name = CHECKPOINT.fullmatch(path.name)
        if name and (path / STATE_FILE).is_file():
            by_step[int(name[1])] = path
    return [by_step[step] for step in sorted(by_step)]


def read_checkpoint(path: Path) -> dict:
    """Return the state of a checkpoint after verifying each file's checksum; InputError names a damaged file."""
    try:
        check, _, text = (path / STATE_FILE).read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path / STATE_FILE} cannot be read: {error}") from error
    if check.strip() == "{":
        raise InputError(f"{path} was written by an older version and cannot be resumed; start again")
    if hashlib.sha256(text.encode()).hexdigest() != check:
        raise InputError(f"{path / STATE_FILE} is damaged")
    state = json.loads(text)
    if state["version"] != VERSION:
        raise InputError(f"{path} has layout {state['version']}, this version reads {VERSION}")
    for name, check in state["files"].items():
        if not (path / name).is_file():
            raise InputError(f"{path / name} is missing")
        if checksum(path / name) != check:
            raise InputError(f"{path / name} is damaged")
    return state


def set_learning_rate(lr_scheduler: torch.optim.lr_scheduler.LambdaLR, step: int) -> None:
    """Set the learning rates of `step`, from the schedule and the base rates of this run."""
    lr_scheduler.last_epoch = step
    rates = [base * factor(step) for base, factor in zip(lr_scheduler.base_lrs, lr_scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(lr_scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    lr_scheduler._last_lr = rates


def flatten(state: dict) -> tuple[dict[str, torch.Tensor], dict]:
    """Split an optimizer's state into tensors by name and values that are not tensors."""
    tensors, numbers = {}, {}
    for weight, values in state.items():
        for name, value in values.items():
            if torch.is_tensor(value):
                tensors[f"{weight}.{name}"] = value.detach().cpu().contiguous()
            else:
                numbers[f"{weight}.{name}"] = value
    return tensors, numbers


def unflatten(tensors: dict[str, torch.Tensor], numbers: dict) -> dict:
    """Invert `flatten`."""
    state: dict[int, dict] = {}
    for key, value in (tensors | numbers).items():
        weight, name = key.split(".", 1)
        state.setdefault(int(weight), {})[name] = value
    return state


def choose(folder: Path, resume_from: str | None) -> tuple[Path | None, dict | None]:
    """Return the checkpoint to resume from and its state; None for a new run, which needs an unused folder."""
    complete = find_checkpoints(folder)
    _refuse_foreign(folder)
    if resume_from is None:
        _check_unused(folder, complete)
        return None, None
    if resume_from == "latest":
        for path in reversed(complete):
            try:
                return path, read_checkpoint(path)
            except InputError as error:
                logger.warning(f"{error}: trying the previous checkpoint")
        if complete:
            raise InputError(f"no checkpoint in {folder} can be read; start again in another folder")
        logger.warning(f"no complete checkpoint in {folder}: starting from the beginning")
        return None, None
    for path in (Path(resume_from), folder / resume_from):
        if (path / STATE_FILE).is_file():
            if path.resolve().parent != folder.resolve():
                _check_unused(folder, complete)
            return path, read_checkpoint(path)
    names = ", ".join(path.name for path in complete) or "none"
    raise InputError(f"`resume_from_checkpoint` {resume_from} is not a complete checkpoint; {folder} has {names}")


def _refuse_foreign(folder: Path) -> None:
    """Raise InputError for a checkpoint-N of another program, which a checkpoint of this run could replace."""
    for path in sorted(folder.glob("checkpoint-*")):
        is_ours = any((path / name).exists() for name in (STATE_FILE, OPTIMIZER_FILE))
        if CHECKPOINT.fullmatch(path.name) and not is_ours:
            raise InputError(
                f"{path} was not written by this program and cannot be resumed: move it away, or choose another"
                " `output_dir`. To start from its LoRA, fuse it into the pipeline first"
            )


def _check_unused(folder: Path, complete: list[Path]) -> None:
    if complete:
        raise InputError(
            f"`output_dir` {folder} contains {complete[-1].name} of a previous run: continue it with"
            " `resume_from_checkpoint` latest, or choose another folder"
        )
    results = [path.relative_to(folder) for path in folder.rglob("*.safetensors")]
    if names := sorted(str(path) for path in results if not path.parts[0].startswith(".")):
        logger.warning(f"{folder} contains {names[0]} of a previous run; it will be overwritten")
