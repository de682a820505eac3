"""Lock that reserves a folder for one run and is released when its process ends."""

import os
from pathlib import Path

from ..errors import InputError
from ..files import LOCK

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]


_held: dict[Path, int] = {}


def lock_folder(folder: str | Path) -> None:
    """Create `folder` and lock it until this process ends or calls `unlock_folder`.

    InputError if it cannot be written to, or if another live process holds the lock. Forked workers do not inherit a
    lock of this kind, so it is released however the process ends.
    """
    folder = Path(folder).resolve()
    if folder in _held:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise InputError(f"{folder} cannot be written to: {error.strerror}") from error
    try:
        if fcntl is not None:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(file, 20).decode(errors="replace").strip()
        os.close(file)
        raise InputError(f"{folder} is in use by another run, process {holder or 'unknown'}") from error
    except OSError:  # a file system without locks
        os.close(file)
        return
    os.ftruncate(file, 0)
    os.write(file, str(os.getpid()).encode())
    _held[folder] = file


def unlock_folder(folder: str | Path) -> None:
    """Release the lock of `folder`, if this process holds it."""
    if (file := _held.pop(Path(folder).resolve(), None)) is not None:
        os.close(file)
