"""The one exception that scripts print as a sentence instead of a traceback, and what goes into it."""


class InputError(ValueError):
    """A mistake in what the user gave; the message names the file, option or value and what to do."""


def first_line(error: Exception) -> str:
    """What an error of a library says, shortly."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
