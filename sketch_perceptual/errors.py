"""What went wrong, in words for the user."""

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path


class InputError(ValueError):
    """A mistake in what the user gave; the message names the file, argument or value and what to do.

    An argument stands in backticks, as in "`fit` must be one of crop, pad": a script shows it as its option.
    """


class TooLittleMemory(InputError):
    """Which says nothing about the image that was to be read."""


def program() -> str:
    """What a script calls itself in its messages: its file, or the package that `python -m` was given."""
    path = Path(sys.argv[0])
    return path.parent.name if path.name == "__main__.py" else path.name


def in_options(message: str, args: argparse.Namespace) -> str:
    """The message of a library function, whose arguments stand in backticks, in the words of the command line."""
    return re.sub(r"`(\w+)`", lambda name: f"--{name[1]}" if name[1] in args else name[0], message)


def first_line(error: BaseException) -> str:
    """What an error of a library says, shortly."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def first_names(names: Sequence[str], separator: str = ", ", count: int = 10) -> str:
    """The first ten names, and how many more there are."""
    more = f"{separator}and {len(names) - count} more" if len(names) > count else ""
    return separator.join(names[:count]) + more


def check_choice(argument: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise InputError(f"`{argument}` must be one of {', '.join(choices)}, got {value!r}.")
