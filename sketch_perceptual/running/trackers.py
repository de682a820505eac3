"""What goes to the trackers."""

import argparse
import importlib.util
import netrc
import os
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image

from ..errors import InputError, first_line

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet_ml": "comet_ml", "trackio": "trackio"}


def check_trackers(names: list[str]) -> None:
    """InputError where a tracker is not installed or nobody is logged in: before training, not after."""
    for name in names:
        if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
            raise InputError(f"`report_to` {name} needs its package: pip install {PACKAGES[name]}")
    if "wandb" in names and not _knows_wandb():
        raise InputError("`report_to` wandb: nobody is logged in; run `wandb login`, or set WANDB_MODE=offline")
    if "comet_ml" in names and not (os.environ.get("COMET_API_KEY") or Path("~/.comet.config").expanduser().exists()):
        raise InputError("`report_to` comet_ml: nobody is logged in; run `comet login`, or set COMET_API_KEY")


def start_trackers(accelerator: Accelerator, name: str, args: argparse.Namespace) -> None:
    """Open the trackers with the options as hyper-parameters, the token left out."""
    options = {k: v for k, v in vars(args).items() if k != "hub_token"}
    plain = (bool, int, float, str)  # TensorBoard takes no lists and no None
    try:
        accelerator.init_trackers(name, {k: v if isinstance(v, plain) else str(v) for k, v in options.items()})
    except Exception as error:  # each tracker has its own
        raise InputError(f"`report_to`: the tracker does not start ({first_line(error)})") from error


def track_images(accelerator: Accelerator, phase: str, images: dict[str, list[Image.Image]], step: int) -> None:
    """Send the pictures to the trackers that take pictures."""
    pictures = [picture for row in images.values() for picture in row]
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            array = np.stack([np.asarray(picture) for picture in pictures])
            tracker.writer.add_images(phase, array, step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({phase: pictures}, step)


def _knows_wandb() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
