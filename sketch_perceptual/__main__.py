"""Compare and find drawings, turn photos into drawings, and evaluate models.

    sketch-perceptual compare fox.png other-fox.png --figure difference.png
    sketch-perceptual search --query fox.png --gallery drawings --figure found.png
    sketch-perceptual stylize --model sketch-style --input photos --output sketches
    sketch-perceptual convert pytorch_lora_weights.safetensors fox.safetensors
    sketch-perceptual evaluate generation --train_data_dir drawings --models lora=sketch-lora ...
    sketch-perceptual env

`env` prints versions and devices, for a bug report. `python -m sketch_perceptual` is the same program.
"""

import argparse
import difflib
import sys

from . import __version__
from .cli.arguments import Parser
from .cli.entry import run
from .extras import optional

COMMANDS = ("compare", "search", "stylize", "convert", "evaluate", "env")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="sketch-perceptual",
        usage="%(prog)s [-h] [--version] command ...",
        description=__doc__,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", choices=COMMANDS, help="run %(prog)s COMMAND --help for its options")
    argv = sys.argv[1:] if argv is None else argv
    if argv and (near := difflib.get_close_matches(argv[0], COMMANDS, 1)) and argv[0] not in COMMANDS:
        parser.error(f"there is no command {argv[0]!r}: did you mean {near[0]}?")
    args = parser.parse_args(argv[:1])

    def start(args: argparse.Namespace) -> None:
        module = optional(f"{__package__}.commands.{args.command}", "search")  # only search needs an extra
        module.main(argv[1:])

    run(start, args, f"sketch-perceptual {args.command}")  # also reports a signal during the import


if __name__ == "__main__":
    main()
