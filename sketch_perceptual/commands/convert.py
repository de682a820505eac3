"""Convert a LoRA of Stable Diffusion 1 or 2 to kohya's names, or from kohya's names to diffusers'.

    sketch-perceptual convert pytorch_lora_weights.safetensors fox.safetensors

A file in kohya's names is written in diffusers', any other (diffusers' of all versions, PEFT's, the original model's
names) in kohya's. The text encoder's weights, DoRA's magnitudes and the training metadata are kept. Alphas keep their
effect: kohya's file stores them beside the weights, diffusers' weights include them.
"""

import argparse
import os
import tempfile
from pathlib import Path

from ..cli.arguments import Parser
from ..cli.console import print_result
from ..cli.entry import run
from ..errors import InputError
from ..files import Output, check_outputs
from ..lora import files as lora_files


def convert(source: Path, target: Path, overwrite: bool = False) -> str:
    """Write `target` atomically, in kohya's names or, if `source` has those, diffusers'; return a summary.

    Raises:
        InputError: if `source` is not a sound LoRA, or `target` cannot be written or exists without `overwrite`.
    """
    file = lora_files.read(source)
    if target.exists() and not overwrite:
        raise InputError(f"{target} exists: choose another name, or replace it with `overwrite`")
    try:
        with tempfile.TemporaryDirectory(prefix=".convert_lora", dir=target.parent) as folder:
            written = Path(folder, target.name)
            _write(file, written)
            lora_files.read(written)
            os.replace(written, target)
    except OSError as error:
        raise InputError(f"{target} cannot be written: {error.strerror}") from error
    except InputError as error:
        raise InputError(f"{source} cannot be converted: {error}") from error
    summary = f"{target}: {len(file.layers)} modules in the names of {'diffusers' if file.is_kohya else 'kohya'}"
    return "\n".join((summary, *file.notes))


def _write(file: lora_files.LoraFile, target: Path) -> None:
    metadata = {key: text for key, text in file.metadata.items() if key.startswith(("ss_", "modelspec."))}
    if file.is_kohya:
        lora_files.write_diffusers(target, lora_files.folded(file.layers), metadata)
    else:
        layers = lora_files.with_common_alphas(file.layers)
        lora_files.write_kohya(target, layers, metadata | {"ss_output_name": target.stem})


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="sketch-perceptual convert", usage="%(prog)s input output [options]", description=__doc__)
    add = parser.add_argument
    add("source", metavar="input", type=Path, help="a .safetensors of any trainer, or a folder with one")
    add("target", metavar="output", type=Path, help="the .safetensors to write, in the other names")
    add("--overwrite", action="store_true", help="replace output if it exists")
    run(convert_file, parser.parse_args(argv), "sketch-perceptual convert")


def convert_file(args: argparse.Namespace) -> None:
    check_outputs([Output("output", args.target, (".safetensors",))], [lora_files.find_file(args.source)])
    print_result(convert(args.source, args.target, args.overwrite))
