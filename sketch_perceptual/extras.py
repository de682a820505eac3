"""Packages that not everybody needs: the extras of the installation."""

import importlib
import importlib.util
import sys
from importlib.metadata import version
from types import ModuleType

from .errors import InputError, first_line, first_names, program

SCRIPTS = "accelerate datasets diffusers matplotlib peft psutil torchvision transformers".split()


def optional(module: str, extra: str) -> ModuleType:
    """The module; InputError with the extra that installs it, if it or what it needs cannot be imported."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = (error.name or module).split(".")[0]
        if package == __package__:
            raise
        raise InputError(
            f"this needs {package} ({first_line(error)}): pip install 'sketch-perceptual[{extra}]'"
        ) from error


def require(extra: str) -> None:
    """For the top of a script, before it imports: end it with a sentence where something of SCRIPTS will not do."""
    if what := _missing(extra) or _unfit():
        print(f"{program()}: error: {what}", file=sys.stderr)
        sys.exit(2)


def _missing(extra: str) -> str | None:
    missing = [module for module in SCRIPTS if importlib.util.find_spec(module) is None]
    return f"this needs {first_names(missing)}: pip install 'sketch-perceptual[{extra}]'" if missing else None


def _unfit() -> str | None:
    """transformers and peft would blame other modules for it."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:
        found = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision"))
        return (
            f"{found} do not work together ({first_line(error)}): install both from one place, pip install"
            " --force-reinstall torch torchvision"
        )
    return None
