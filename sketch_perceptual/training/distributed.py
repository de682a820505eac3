"""What one process finds out, all know."""

from collections.abc import Callable

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..errors import InputError


def on_main(accelerator: Accelerator, function: Callable, *arguments):
    """`function(*arguments)` on the main process; its result, or its InputError, on all."""
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
