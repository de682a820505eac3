"""Labelled sketches and their coloured twins, drawn by rules: as many as asked for, without a download."""

from .folder import write_folder
from .render import STYLES, draw
from .scenes import CLASSES, compose

__all__ = ["CLASSES", "STYLES", "compose", "draw", "write_folder"]
