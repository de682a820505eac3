"""Run a function on the main process and broadcast its result."""

from collections.abc import Callable

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..errors import InputError


def on_main(accelerator: Accelerator, function: Callable, *arguments):
    """Call `function(*arguments)` on the main process; all processes get its result or its InputError."""
    outcome = [None, None]
    if accelerator.is_main_process:
        try:
            outcome = [function(*arguments), None]
        except InputError as error:
            outcome = [None, str(error)]
    result, message = broadcast_object_list(outcome)
    if message is not None:
        raise InputError(message)
    return result
