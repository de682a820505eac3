"""What goes to the trackers."""

import argparse

import numpy as np
from accelerate import Accelerator
from PIL import Image


def start_trackers(accelerator: Accelerator, name: str, args: argparse.Namespace) -> None:
    """Open the trackers with the options as hyper-parameters, the token left out."""
    options = {k: v for k, v in vars(args).items() if k != "hub_token"}
    plain = (bool, int, float, str)  # TensorBoard takes no lists and no None
    accelerator.init_trackers(name, {k: v if isinstance(v, plain) else str(v) for k, v in options.items()})


def track_images(accelerator: Accelerator, phase: str, images: dict[str, list[Image.Image]], step: int) -> None:
    """Send the pictures to the trackers that take pictures."""
    pictures = [picture for row in images.values() for picture in row]
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            array = np.stack([np.asarray(picture) for picture in pictures])
            tracker.writer.add_images(phase, array, step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({phase: pictures}, step)
