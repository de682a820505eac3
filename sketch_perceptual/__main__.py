"""Compare drawings, find them, and turn photos into them.

    sketch-perceptual compare fox.png other-fox.png --figure difference.png
    sketch-perceptual search --query fox.png --gallery drawings --figure found.png
    sketch-perceptual stylize --model sketch-style --input photos --output sketches
    sketch-perceptual env

`env` prints versions and devices, for a bug report. `python -m sketch_perceptual` is the same program.
"""

import argparse
import sys

from . import __version__
from .errors import InputError
from .extras import optional

COMMANDS = {"compare": "compare", "search": "evaluation.search", "stylize": "johnson", "env": "env"}  # their modules


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="sketch-perceptual",
        usage="%(prog)s [-h] [--version] command ...",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", choices=COMMANDS, help="each tells its options with --help")
    argv = sys.argv[1:] if argv is None else argv
    command = parser.parse_args(argv[:1]).command
    try:
        module = optional(f"{__package__}.{COMMANDS[command]}", "search")  # the others need no extra
    except InputError as error:
        parser.exit(2, f"sketch-perceptual {command}: error: {error}\n")
    module.main(argv[1:])


if __name__ == "__main__":
    main()
