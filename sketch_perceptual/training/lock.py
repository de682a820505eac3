"""One run in a folder: a lock that dies with its process."""

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
    """Make `folder` and hold it until this process ends or calls `unlock_folder`.

    InputError if nothing can be written there, or if another live process holds it. A lock of this kind is not handed
    down to forked workers, so that nothing holds it once the process is gone, however it went.
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
    """Let others in; nothing happens where the folder is not held."""
    if (file := _held.pop(Path(folder).resolve(), None)) is not None:
        os.close(file)
