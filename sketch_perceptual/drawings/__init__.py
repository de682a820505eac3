"""Procedural sketches with labels and coloured counterparts: any number of them, without a download."""

from .folder import write_folder
from .render import STYLES, draw
from .scenes import CLASSES, compose

__all__ = ["CLASSES", "STYLES", "compose", "draw", "write_folder"]
