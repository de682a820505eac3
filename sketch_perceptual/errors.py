"""What went wrong, in words for the user."""

from collections.abc import Iterable


class InputError(ValueError):
    """A mistake in what the user gave; the message names the file, argument or value and what to do.

    An argument stands in backticks, as in "`fit` must be one of crop, pad": a script shows it as its option, --fit.
    """


def first_line(error: Exception) -> str:
    """What an error of a library says, shortly."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_choice(option: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise InputError(f"{option} must be one of {', '.join(choices)}, got {value!r}.")
