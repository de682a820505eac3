"""Experiment trackers: checks, start-up, images and texts."""

import argparse
import netrc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from PIL import Image

from ..errors import InputError, first_line

logger = get_logger(__name__, log_level="INFO")

COMET_VARIABLES = ("COMET_API_KEY", "COMET_CONFIG", "COMET_START_ONLINE")


def check_trackers(names: list[str]) -> None:
    """Raise InputError if a tracker is not installed, which accelerate ignores, or not logged in."""
    available = [str(tracker) for tracker in get_available_trackers()]
    if "all" in names and not available:
        raise InputError("`report_to` all: no tracker is installed: pip install tensorboard, or `report_to` none")
    for name in names:
        if name != "all" and name in LoggerType.list() and name not in available:
            raise InputError(f"`report_to` {name} needs its package: pip install {name}")
    if "wandb" in names and not _is_wandb_ready():
        raise InputError("`report_to` wandb: not logged in; run `wandb login`, or set WANDB_MODE=offline")
    if "comet_ml" in names and not _is_comet_ready():
        raise InputError("`report_to` comet_ml: not logged in; run `comet login`, or set COMET_START_ONLINE=0")


def start_trackers(accelerator: Accelerator, name: str, args: argparse.Namespace) -> None:
    """Start the trackers with the options as hyper-parameters, except the token; InputError if one does not start."""
    options = {k: v for k, v in vars(args).items() if k != "hub_token"}
    plain = (bool, int, float, str)  # TensorBoard takes no lists and no None
    try:
        accelerator.init_trackers(name, {k: v if isinstance(v, plain) else str(v) for k, v in options.items()})
    except Exception as error:  # each tracker raises its own
        raise InputError(f"`report_to`: the tracker does not start ({first_line(error)})") from error
    for tracker in accelerator.trackers if accelerator.is_main_process else ():
        if tracker.name == "comet_ml" and not tracker.tracker.alive:  # it only logs that
            raise InputError(
                "`report_to` comet_ml: the server does not answer or rejects the key, so nothing would be logged; run"
                " `comet login`, or set COMET_START_ONLINE=0"
            )


@contextmanager
def keep_training(accelerator: Accelerator) -> Iterator[None]:
    """Warn once and turn off the trackers, instead of ending the run, if a log cannot be written."""
    try:
        yield
    except OSError as error:
        logger.warning(f"{first_line(error)}: the trackers are turned off")
        accelerator.trackers.clear()


def track_images(accelerator: Accelerator, phase: str, images: dict[str, list[Image.Image]], step: int) -> None:
    """Send pictures by caption to the trackers that take pictures; call it on the main process."""
    with keep_training(accelerator):
        for tracker in accelerator.trackers:
            if send := SENDERS.get(tracker.name):
                send(tracker, phase, images, step)


def track_text(accelerator: Accelerator, name: str, text: str, step: int) -> None:
    """Send a text, e.g. a Markdown table, to the trackers."""
    with keep_training(accelerator):
        accelerator.log({name: text}, step=step)


def _to_tensorboard(tracker, phase: str, images: dict[str, list[Image.Image]], step: int) -> None:
    for caption, pictures in images.items():
        array = np.stack([np.asarray(picture) for picture in pictures])
        tracker.writer.add_images(f"{phase}/{caption}", array, step, dataformats="NHWC")


def _to_wandb(tracker, phase: str, images: dict[str, list[Image.Image]], step: int) -> None:
    import wandb

    captioned = [wandb.Image(picture, caption=caption) for caption, row in images.items() for picture in row]
    tracker.log({phase: captioned}, step=step)


def _to_trackio(tracker, phase: str, images: dict[str, list[Image.Image]], step: int) -> None:
    import trackio

    for caption, row in images.items():
        for number, picture in enumerate(row):  # it takes no lists
            tracker.log({f"{phase}/{caption}/{number}": trackio.Image(picture, caption=caption)}, step=step)


def _to_comet(tracker, phase: str, images: dict[str, list[Image.Image]], step: int) -> None:
    for caption, row in images.items():
        for number, picture in enumerate(row):
            tracker.writer.log_image(picture, name=f"{phase}: {caption} ({number})", step=step)


SENDERS = {"tensorboard": _to_tensorboard, "wandb": _to_wandb, "trackio": _to_trackio, "comet_ml": _to_comet}


def _is_wandb_ready() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _is_comet_ready() -> bool:
    files = (Path("~/.comet.config").expanduser(), Path(".comet.config"))
    return any(map(os.environ.get, COMET_VARIABLES)) or any(path.exists() for path in files)
