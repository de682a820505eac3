"""Print versions and devices, for a bug report.

    sketch-perceptual env

Paths, names of machines and users, and settings that could be secret are not printed.
"""

import argparse
import importlib.metadata
import os
import platform

import torch

from .. import __version__
from ..cli.arguments import Parser
from ..cli.console import print_result
from ..cli.entry import run

PACKAGES = """torch torchvision numpy Pillow safetensors huggingface_hub accelerate datasets diffusers peft
    transformers bitsandbytes faiss-cpu lpips torch-fidelity torchmetrics""".split()


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="sketch-perceptual env", description=__doc__)
    run(print_environment, parser.parse_args(argv), "sketch-perceptual env")


def print_environment(args: argparse.Namespace) -> None:
    print_result("\n".join(f"- {name}: {value}" for name, value in environment().items()))


def environment() -> dict[str, str]:
    """Return versions and devices by name."""
    base = {"sketch-perceptual": __version__, "python": platform.python_version(), "platform": platform.platform()}
    packages = {name: version(name) for name in PACKAGES}
    return base | packages | {"CPUs": str(os.cpu_count()), "accelerators": ", ".join(accelerators()) or "none"}


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def accelerators() -> list[str]:
    """Return names and memory of the devices other than the CPU; only the kind if torch has no properties for it."""
    if not torch.accelerator.is_available():
        return []
    kind = torch.accelerator.current_accelerator()
    devices = torch.get_device_module(kind)
    if not hasattr(devices, "get_device_properties"):  # Apple's
        return [str(kind)]
    properties = map(devices.get_device_properties, range(torch.accelerator.device_count()))
    return [f"{kind} {device.name} {device.total_memory / 2**30:.0f} GiB" for device in properties]
