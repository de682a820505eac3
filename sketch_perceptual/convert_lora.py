"""A LoRA of Stable Diffusion 1 or 2 from the names of diffusers and PEFT into kohya's, or back.

    python -m sketch_perceptual.convert_lora pytorch_lora_weights.safetensors fox.safetensors

A file in kohya's names is written in diffusers', any other in kohya's. The text encoder's weights, DoRA's magnitudes
and what the file tells of its training come along. Alphas count the same: kohya's file has them beside the weights, in
diffusers' they are part of the weights.
"""

import argparse
from pathlib import Path

from . import lora_files
from .arguments import Help
from .errors import InputError, escaped
from .running.console import print_result
from .running.entry import run
from .running.files import Output, check_outputs


def convert(source: Path, target: Path) -> str:
    """Write `target` in the names that `source` does not have; what was done, in words. InputError."""
    file = lora_files.read(source)
    if target.exists() and target.samefile(source):
        raise InputError(f"`output` {target} is the file that is read: choose another name")
    layers, told = file.layers, {k: v for k, v in file.metadata.items() if k.startswith(("ss_", "modelspec."))}
    try:
        if file.is_kohya:
            layers = {module: layer.folded() for module, layer in layers.items()}
            lora_files.write_diffusers(target, layers, told)
        else:
            lora_files.write_kohya(target, layers, told | {"ss_output_name": target.stem})
    except OSError as error:
        raise InputError(f"`output` {target} cannot be written: {error.strerror}") from error
    return f"{target}: {len(layers)} modules in the names of {'diffusers' if file.is_kohya else 'kohya'}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m sketch_perceptual.convert_lora",
        description=__doc__,
        formatter_class=Help,
    )
    parser.add_argument("source", metavar="input", type=Path, help="a .safetensors in either form")
    parser.add_argument("target", metavar="output", type=Path, help="a .safetensors, written in the other")
    run(convert_file, parser.parse_args(argv), "python -m sketch_perceptual.convert_lora")


def convert_file(args: argparse.Namespace) -> None:
    check_outputs([Output("output", args.target, (".safetensors",))], [args.source])
    print_result(escaped(convert(args.source, args.target)))


if __name__ == "__main__":
    main()
