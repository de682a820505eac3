"""What went wrong, in words for the user."""

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

# requests.RequestException or httpx.HTTPError, whichever the installed huggingface_hub is built on
HTTP_ERROR = cast(type[Exception], HfHubHTTPError.__mro__[HfHubHTTPError.__mro__.index(OSError) - 1])
# what reading from the Hub or writing to it may raise
HUB_ERRORS: tuple[type[Exception], ...] = (OSError, ValueError, RuntimeError, HTTP_ERROR)
LONGEST = 1000  # letters of a name
# Control characters, line separators, and marks that turn the direction of writing around
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
    """A mistake in what the user gave; the message names the file, argument or value and what to do.

    An argument stands in backticks, as in "`fit` must be one of crop, pad": a script shows it as its option.
    """

    def __init__(self, message: str = ""):
        if message.startswith("Caught "):  # raised again by a DataLoader, with the traceback of its worker
            message = message.rpartition(f"\n{type(self).__module__}.{type(self).__qualname__}: ")[2].rstrip("\n")
        super().__init__(message)


class TooLittleMemory(InputError):
    """Out of memory while reading an image; the image itself may be fine."""


class TrainingError(Exception):
    """A training that led nowhere: nothing was learned, or the file written is not the model that was trained."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, the CPU's allocator or Python had too little memory, however the library words it."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in NO_MEMORY)
    )


def program() -> str:
    """Return the name of the program for its messages: the file of a script, or sketch-perceptual."""
    path = Path(sys.argv[0])
    return "sketch-perceptual" if path.name == "__main__.py" else path.name


def in_options(message: str, args: argparse.Namespace) -> str:
    """The message of a library function, whose arguments stand in backticks, in the words of the command line."""
    return re.sub(r"`(\w+)`", lambda name: f"--{name[1]}" if name[1] in args else name[0], message)


def printable(text: str) -> str:
    """Return `text` as a console or log may show it: control characters, which names of files may hold, are escaped,
    and addresses lose their query, which may be a signature. Lines and tabs stay.
    """
    return ADDRESS.sub(
        r"\1?...", NOT_SHOWN.sub(lambda match: match[0] if match[0] in "\n\t" else _escaped(match), text)
    )


def first_line(error: BaseException) -> str:
    """What an error of a library says, shortly."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def hub_reason(error: BaseException) -> str:
    """Why the Hub could not be read from or written to, and what to do; of any other error what `first_line` says.

    An address loses its query, which may be a signature.
    """
    causes = list(_causes(error))
    for cause in causes:
        if status := getattr(getattr(cause, "response", None), "status_code", None):
            says = getattr(cause, "server_message", None)
            advice = ANSWERS.get(status, "try again later" if status >= 500 else "")
            return ": ".join(filter(None, (f"the Hub answers {status}" + (f", {says!r}" if says else ""), advice)))
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes):
        return "it is not on this machine and nothing is asked of the Hub while HF_HUB_OFFLINE is set: unset it"
    for cause in reversed(causes):
        if isinstance(cause, (HTTP_ERROR, ConnectionError, TimeoutError)):
            says = re.sub(r"\?\S+", "", first_line(cause))
            return f"the Hub cannot be reached ({says}): check the connection and try again"
    return first_line(error)


@contextmanager
def from_hub(sentence: str) -> Iterator[None]:
    """What fails in the block, which reads from the Hub or a folder, is an InputError: the sentence, then why."""
    try:
        yield
    except InputError:
        raise
    except HUB_ERRORS as error:
        raise InputError(f"{sentence}: {hub_reason(error)}") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__  # which `datasets` suppresses


_collected: ContextVar[list[str] | None] = ContextVar("collected", default=None)


def complain(message: str) -> None:
    """Raise InputError, or in `all_troubles` note it and return, for callers that can go on to the next trouble."""
    collected = _collected.get()
    if collected is None:
        raise InputError(message)
    collected.append(message)


def has_complained() -> bool:
    """Whether `all_troubles` has collected anything so far."""
    return bool(_collected.get())


@contextmanager
def all_troubles() -> Iterator[None]:
    """Collect what `complain` says in the block and what ends it early; one InputError lists all of it."""
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
    """Return a name on one line, not endless: line breaks and what `printable` escapes are escaped."""
    line = NOT_SHOWN.sub(_escaped, str(name))
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}..."


def _escaped(match: re.Match) -> str:
    return match[0].encode("unicode_escape").decode()


def first_names(names: Sequence[str], separator: str = ", ", count: int = 10) -> str:
    """The first ten names as they are `shown`, and how many more there are."""
    more = f"{separator}and {len(names) - count} more" if len(names) > count else ""
    return separator.join(map(shown, names[:count])) + more


def check_choice(argument: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise InputError(f"`{argument}` must be one of {', '.join(choices)}, got {value!r}.")
