"""Interruption of a run by Ctrl-C, another signal, or the end of its launcher."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
LAUNCHERS = ("accelerate", "torchrun", "torch.distributed")


class Interrupted(BaseException):
    """The signal `number` was received; not an Exception, so that error handlers do not swallow it."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class _State:
    received = 0  # the signal that is deferred to the end of a step
    deferred = False


def install() -> None:
    """Make signals raise `Interrupted`, or wait while they are deferred; start to watch the launcher."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # set by nohup
            signal.signal(number, _note)
    _State.received, _State.deferred = 0, False
    _watch_launcher()


def received() -> int:
    """Return the signal that was received while signals were deferred, 0 for none."""
    return _State.received


def defer(deferred: bool = True) -> None:
    """Set whether signals wait until `received` is called; a second Ctrl-C never waits."""
    _State.deferred = deferred


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Leave the block at once if a signal arrives, as if it had arrived right after the block."""
    deferred, _State.deferred = _State.deferred, False
    try:
        yield
    except Interrupted as stop:
        _State.received = stop.number
    finally:
        _State.deferred = deferred


def launcher() -> int | None:
    """Return the process id of the accelerate or torchrun that started this script, or None."""
    parent = os.getppid()
    try:
        import psutil
    except ImportError:  # accelerate requires psutil, so there is no launcher
        return None
    try:
        words = psutil.Process(parent).cmdline()
    except psutil.Error:
        return None
    return parent if any(name in word for word in words[:4] for name in LAUNCHERS) else None


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Block signals inside the context; child processes started in it inherit the mask."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_in_worker(worker: int) -> None:
    """Ignore signals except the main process's, which still needs the images; for a DataLoader's `worker_init_fn`."""
    for number in set(SIGNALS) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _note(number: int, frame) -> None:
    again = _State.received and number == signal.SIGINT
    if _State.deferred and not again:
        _State.received = number
    else:
        raise Interrupted(number)


def _watch_launcher() -> None:
    parent = launcher()
    if parent is None or any(thread.name == "launcher" for thread in threading.enumerate()):
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="launcher", daemon=True).start()
