"""Keep console output from ending a run: closed pipes, full disks, unencodable characters."""

import contextlib
import os
import sys
from errno import EPIPE


class _Console:
    """A text stream that discards its output after the first error."""

    def __init__(self, stream):
        self._stream = stream
        self.error: OSError | None = None  # e.g. a full disk; a closed pipe is ignored

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
        except (OSError, ValueError) as error:  # closed, or the disk is full
            if isinstance(error, OSError) and error.errno != EPIPE:
                self.error = error
            with contextlib.suppress(OSError, ValueError):  # redirected, or the interpreter complains again at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def protect_console() -> None:
    """Escape characters that the console cannot encode from now on, and ignore closed pipes."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, _Console) or not hasattr(stream, "reconfigure"):
            continue
        stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, _Console(stream))


def print_result(text: str) -> None:
    """Print the result of a command; OSError if standard output cannot be written, e.g. to a full disk."""
    print(text, flush=True)
    if error := getattr(sys.stdout, "error", None):
        raise OSError(error.errno, error.strerror, "standard output")
