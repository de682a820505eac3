"""Argument parser, and types of options."""

import argparse
import difflib
import math
import re
from collections.abc import Callable
from typing import Any, NoReturn


class Options(argparse.Namespace):
    """Parsed options.

    Attributes:
        shared: names of the options that must not differ in a resumed run.
        fixed: names of those among them that change the shape or number of weights, which no resumed run can override.
    """

    __slots__ = ("fixed", "shared")
    shared: set[str]
    fixed: set[str]


class Help(argparse.RawDescriptionHelpFormatter):
    """Formatter that keeps descriptions as they are, and adds defaults to help texts that do not name them."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help or "", action.default
        shown = " ".join(default) if isinstance(default, list) else str(default)
        hides = default is None or isinstance(default, bool) or default == argparse.SUPPRESS or "/" in shown
        if hides or "default" in text or not action.option_strings:
            return action.help
        return f"{text}; default: {shown}"


class Parser(argparse.ArgumentParser):
    """`ArgumentParser` with short usage, defaults in the help, and suggestions for misspelt options."""

    def __init__(self, **options: Any):
        self.shared: set[str] = set()
        self.fixed: set[str] = set()
        options.setdefault("usage", "%(prog)s [options]")
        super().__init__(**options, formatter_class=Help)

    def add_argument(self, *flags: str, shared: bool = True, fixed: bool = False, **options) -> argparse.Action:
        """`ArgumentParser.add_argument` with two more keywords.

        Args:
            shared: whether a resumed run must have the same value. False for options that only change paths, speed or
                display, and for data that are compared by their contents.
            fixed: whether another value would change the shape or number of weights.
        """
        return self._add(super().add_argument, flags, shared, fixed, options)

    def group(self, title: str) -> Callable:
        """Return `add_argument` of a new group, with the same keywords."""
        add = self.add_argument_group(title).add_argument

        def add_argument(*flags: str, shared: bool = True, fixed: bool = False, **options) -> argparse.Action:
            return self._add(add, flags, shared, fixed, options)

        return add_argument

    def _add(self, add: Callable, flags: tuple[str, ...], shared: bool, fixed: bool, options: dict) -> argparse.Action:
        default = options.get("default")
        if default is not None and not isinstance(default, bool):  # shown by `Help` only behind other text
            options.setdefault("help", f"default: {' '.join(default) if isinstance(default, list) else '%(default)s'}")
        action = add(*flags, **options)
        self.shared |= {action.dest} if shared else set()
        self.fixed |= {action.dest} if fixed else set()
        return action

    def parse_args(self, args=None, namespace=None) -> Options:  # type: ignore[override]
        options = super().parse_args(args, Options())
        options.shared, options.fixed = self.shared, self.fixed
        return options

    def parse_known_args(self, args=None, namespace=None):
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:  # here, so that a subparser names its options
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return options, unknown

    def error(self, message: str) -> NoReturn:
        choices = list(self._option_string_actions)
        wrong = re.search(r"unrecognized arguments: .*?(--\w+)", message)
        if choice := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            wrong, choices = choice, re.findall(r"[\w.-]+", choice[2])
        if wrong and (near := difflib.get_close_matches(wrong[1], choices, 1)):
            message += f"; did you mean {near[0]}?"
        super().error(message)


def at_least(minimum, kind=int) -> Callable[[str], int | float]:
    """Return an argparse type: a finite number of at least `minimum`."""
    return _number(kind, lambda value: value >= minimum, f"of at least {minimum}")


def above(minimum: float) -> Callable[[str], float]:
    """Return an argparse type: a finite number greater than `minimum`."""
    return _number(float, lambda value: value > minimum, f"above {minimum:g}")


def fraction(text: str) -> float:
    """Parse a number from 0 to below 1."""
    return _number(float, lambda value: 0 <= value < 1, "from 0 to below 1")(text)


def size(text: str) -> tuple[int, int]:
    """Parse width and height, as in 768x512."""
    width, _, height = text.partition("x")
    return int(width), int(height)


def _number(kind, is_valid: Callable, description: str) -> Callable[[str], int | float]:
    def number(text: str):
        value = kind(text)
        if not (math.isfinite(value) and is_valid(value)):
            raise argparse.ArgumentTypeError(f"must be a number {description}, got {text}")
        return value

    number.__name__ = kind.__name__
    return number
