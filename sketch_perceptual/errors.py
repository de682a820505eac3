"""Errors, and their messages for the user."""

import argparse
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import cast

import torch
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

# requests.RequestException or httpx.HTTPError, whichever the installed huggingface_hub uses
HTTP_ERROR = cast(type[Exception], HfHubHTTPError.__mro__[HfHubHTTPError.__mro__.index(OSError) - 1])
# possible exceptions of reading from the Hub or writing to it
HUB_ERRORS: tuple[type[Exception], ...] = (OSError, ValueError, RuntimeError, HTTP_ERROR)
LONGEST = 1000  # characters of a name
# Control characters, line separators, and marks that change the direction of writing
NOT_SHOWN = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
ANSWERS = {
    401: "log in with `hf auth login`, and check the name",
    403: "access denied: request access to the repository, or log in with a token that has write permission",
    404: "check the name, and log in with `hf auth login` if it is private",
    409: "the repository changed during the request: try again",
    412: "the repository changed during the request: try again",
    429: "rate limited: try again in a few minutes",
}
ADDRESS = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]+")
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "bad alloc", "ALLOC_FAILED")


class InputError(ValueError):
    """A mistake in the user's input; the message names the file, argument or value and says what to do.

    Arguments are in backticks, as in "`fit` must be one of crop, pad": scripts show them as options.
    """

    def __init__(self, message: str = ""):
        if message.startswith("Caught "):  # raised again by a DataLoader, with the traceback of its worker
            message = message.rpartition(f"\n{type(self).__module__}.{type(self).__qualname__}: ")[2].rstrip("\n")
        super().__init__(message)


class TooLittleMemory(InputError):
    """Out of memory while reading an image; the image itself may be fine."""


class TrainingError(Exception):
    """A failed training: nothing was learned, or the written file is not the model that was trained."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a device, the CPU's allocator or Python ran out of memory, however the library words it."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in NO_MEMORY)
    )


def program() -> str:
    """Return the name of the program for its messages: the file of a script, or sketch-perceptual."""
    path = Path(sys.argv[0])
    return "sketch-perceptual" if path.name == "__main__.py" else path.name


def in_options(message: str, args: argparse.Namespace) -> str:
    """Replace the arguments in backticks in a library function's message by command-line options."""
    return re.sub(r"`(\w+)`", lambda name: f"--{name[1]}" if name[1] in args else name[0], message)


def printable(text: str) -> str:
    """Escape control characters (file names may contain them), and drop the queries of URLs (they may be signatures).

    Newlines and tabs stay.
    """
    return ADDRESS.sub(
        r"\1?...", NOT_SHOWN.sub(lambda match: match[0] if match[0] in "\n\t" else _escaped(match), text)
    )


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def hub_reason(error: BaseException) -> str:
    """Explain why reading from or writing to the Hub failed, and what to do; for other errors return `first_line`.

    URLs lose their query, which may be a signature.
    """
    causes = list(_causes(error))
    for cause in causes:
        if status := getattr(getattr(cause, "response", None), "status_code", None):
            answer = getattr(cause, "server_message", None)
            advice = ANSWERS.get(status, "try again later" if status >= 500 else "")
            return ": ".join(filter(None, (f"the Hub answers {status}" + (f", {answer!r}" if answer else ""), advice)))
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes):
        return "it is not on this machine and HF_HUB_OFFLINE is set: unset it"
    for cause in reversed(causes):
        if isinstance(cause, (HTTP_ERROR, ConnectionError, TimeoutError)):
            line = re.sub(r"\?\S+", "", first_line(cause))
            return f"the Hub cannot be reached ({line}): check the connection and try again"
    return first_line(error)


@contextmanager
def from_hub(sentence: str) -> Iterator[None]:
    """Turn errors of the block, which reads from the Hub or a folder, into an InputError: the sentence and why."""
    try:
        yield
    except InputError:
        raise
    except HUB_ERRORS as error:
        raise InputError(f"{sentence}: {hub_reason(error)}") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__  # even if suppressed, as in `datasets`


_collected: ContextVar[list[str] | None] = ContextVar("collected", default=None)


def complain(message: str) -> None:
    """Raise InputError; inside `all_troubles`, collect the message and return, so that the caller can go on."""
    collected = _collected.get()
    if collected is None:
        raise InputError(message)
    collected.append(message)


def has_complained() -> bool:
    """Return whether `all_troubles` has collected anything so far."""
    return bool(_collected.get())


@contextmanager
def all_troubles() -> Iterator[None]:
    """Collect the messages of `complain` and an InputError that ends the block, and raise one InputError for all."""
    collected: list[str] = []
    token = _collected.set(collected)
    try:
        yield
    except InputError as error:
        collected.append(str(error))
    finally:
        _collected.reset(token)
    troubles = list(dict.fromkeys(collected))
    if len(troubles) > 1:
        numbered = [f"{number}. {trouble}" for number, trouble in enumerate(troubles, 1)]
        raise InputError("\n".join([f"{len(troubles)} things are wrong:", *numbered]))
    if troubles:
        raise InputError(troubles[0])


def shown(name: object) -> str:
    """Return a name on one line of limited length, with line breaks and control characters escaped."""
    line = NOT_SHOWN.sub(_escaped, str(name))
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}..."


def _escaped(match: re.Match) -> str:
    return match[0].encode("unicode_escape").decode()


def first_names(names: Sequence[str], separator: str = ", ", count: int = 10) -> str:
    """Join the first ten names, as `shown`, and add how many more there are."""
    more = f"{separator}and {len(names) - count} more" if len(names) > count else ""
    return separator.join(map(shown, names[:count])) + more


def check_choice(argument: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise InputError(f"`{argument}` must be one of {', '.join(choices)}, got {value!r}.")
