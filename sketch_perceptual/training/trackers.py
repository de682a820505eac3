"""What goes to the trackers."""

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
    """InputError where a tracker is not installed, which accelerate passes over, or nobody is logged in."""
    available = [str(tracker) for tracker in get_available_trackers()]
    if "all" in names and not available:
        raise InputError("`report_to` all: no tracker is installed: pip install tensorboard, or `report_to` none")
    for name in names:
        if name != "all" and name in LoggerType.list() and name not in available:
            raise InputError(f"`report_to` {name} needs its package: pip install {name}")
    if "wandb" in names and not _knows_wandb():
        raise InputError("`report_to` wandb: nobody is logged in; run `wandb login`, or set WANDB_MODE=offline")
    if "comet_ml" in names and not _knows_comet():
        raise InputError("`report_to` comet_ml: nobody is logged in; run `comet login`, or set COMET_START_ONLINE=0")


def start_trackers(accelerator: Accelerator, name: str, args: argparse.Namespace) -> None:
    """Open the trackers with the options as hyper-parameters, the token left out; InputError if one does not run."""
    options = {k: v for k, v in vars(args).items() if k != "hub_token"}
    plain = (bool, int, float, str)  # TensorBoard takes no lists and no None
    try:
        accelerator.init_trackers(name, {k: v if isinstance(v, plain) else str(v) for k, v in options.items()})
    except Exception as error:  # each tracker has its own
        raise InputError(f"`report_to`: the tracker does not start ({first_line(error)})") from error
    for tracker in accelerator.trackers if accelerator.is_main_process else ():
        if tracker.name == "comet_ml" and not tracker.tracker.alive:  # it has only said so
            raise InputError(
                "`report_to` comet_ml: its server does not answer, or does not know the key, and nothing would be"
                " logged; run `comet login`, or set COMET_START_ONLINE=0"
            )


@contextmanager
def keep_training(accelerator: Accelerator) -> Iterator[None]:
    """A log that cannot be written is said once and costs no training."""
    try:
        yield
    except OSError as error:
        logger.warning(f"{first_line(error)}: the trackers get nothing more")
        accelerator.trackers.clear()


def track_images(accelerator: Accelerator, phase: str, images: dict[str, list[Image.Image]], step: int) -> None:
    """Send pictures and their captions, the keys, to the trackers that take pictures; from the main process."""
    with keep_training(accelerator):
        for tracker in accelerator.trackers:
            if send := SENDERS.get(tracker.name):
                send(tracker, phase, images, step)


def track_text(accelerator: Accelerator, name: str, text: str, step: int) -> None:
    """Send a text, which may be a table in Markdown, to the trackers."""
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


def _knows_wandb() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _knows_comet() -> bool:
    files = (Path("~/.comet.config").expanduser(), Path(".comet.config"))
    return any(map(os.environ.get, COMET_VARIABLES)) or any(path.exists() for path in files)
