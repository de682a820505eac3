"""Stopping in order."""

import signal
from collections.abc import Callable


def catch_signals() -> Callable[[], int]:
    """From now on Ctrl-C and SIGTERM only take note; returns a function that tells which came, 0 for none.

    A second Ctrl-C interrupts at once.
    """
    received = 0

    def note(number, frame):
        nonlocal received
        received = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return lambda: received
