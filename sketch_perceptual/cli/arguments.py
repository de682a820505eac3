"""Types of command-line arguments, and how their help is shown."""

import argparse
import math
from collections.abc import Callable


class Help(argparse.RawDescriptionHelpFormatter):
    """Descriptions as they are written, and defaults behind the helps that do not name them."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help or "", action.default
        shown = " ".join(default) if isinstance(default, list) else str(default)
        hides = default is None or isinstance(default, bool) or default == argparse.SUPPRESS or "/" in shown
        if hides or "default" in text or not action.option_strings:
            return action.help
        return f"{text}; default: {shown}"


def at_least(minimum, kind=int) -> Callable[[str], int | float]:
    """An argparse type: a finite number no smaller than `minimum`."""
    return _number(kind, lambda value: value >= minimum, f"of at least {minimum}")


def above(minimum: float) -> Callable[[str], float]:
    """An argparse type: a finite number greater than `minimum`."""
    return _number(float, lambda value: value > minimum, f"above {minimum:g}")


def fraction(text: str) -> float:
    """An argparse type: a number from 0 to below 1."""
    return _number(float, lambda value: 0 <= value < 1, "from 0 to below 1")(text)


def size(text: str) -> tuple[int, int]:
    """An argparse type: width and height, as in 768x512."""
    width, _, height = text.partition("x")
    return int(width), int(height)


def _number(kind, is_right: Callable, words: str) -> Callable[[str], int | float]:
    def number(text: str):
        value = kind(text)
        if not (math.isfinite(value) and is_right(value)):
            raise argparse.ArgumentTypeError(f"must be a number {words}, got {text}")
        return value

    number.__name__ = kind.__name__
    return number
