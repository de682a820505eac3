"""The one exception that scripts print as a sentence instead of a traceback."""


class InputError(ValueError):
    """A mistake in what the user gave; the message names the file, option or value and what to do."""
