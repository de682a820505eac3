"""Keep console output from ending a run: closed pipes, full disks, letters that the console does not have."""

import contextlib
import os
import sys
from errno import EPIPE


class _Console:
    """A text stream that goes silent when nobody reads it any more."""

    def __init__(self, stream):
        self._stream = stream
        self.error: OSError | None = None  # that a disk is full, say; a closed pipe is no loss

    def write(self, text: str) -> int:
        with self._guard():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._guard():
            self._stream.flush()

    @contextlib.contextmanager
    def _guard(self):
        try:
            yield
        except (OSError, ValueError) as error:  # closed, or no room in its file
            if isinstance(error, OSError) and error.errno != EPIPE:
                self.error = error
            with contextlib.suppress(OSError, ValueError):  # or the interpreter complains once more at its end
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def protect_console() -> None:
    """Letters that the console does not have are escaped from now on, and a closed pipe is no error."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, _Console) or not hasattr(stream, "reconfigure"):
            continue
        stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, _Console(stream))


def print_result(text: str) -> None:
    """Print what a command was asked for; OSError where standard output is a file and has no room."""
    print(text, flush=True)
    if error := getattr(sys.stdout, "error", None):
        raise OSError(error.errno, error.strerror, "standard output")
