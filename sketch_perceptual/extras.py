"""Optional packages: the extras of the installation."""

import importlib
import importlib.util
import sys
from importlib.metadata import version
from types import ModuleType

from .errors import InputError, first_line, first_names, program

SCRIPTS = "accelerate datasets diffusers matplotlib peft psutil torchvision transformers".split()


def optional(module: str, extra: str) -> ModuleType:
    """Import a module; InputError with the extra that installs it, if it or a dependency cannot be imported."""
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
    """Exit with a message if a package of SCRIPTS is missing or broken; call it before a script's other imports."""
    if message := _missing(extra) or _unfit():
        print(f"{program()}: error: {message}", file=sys.stderr)
        sys.exit(2)


def _missing(extra: str) -> str | None:
    missing = [module for module in SCRIPTS if importlib.util.find_spec(module) is None]
    return f"this needs {first_names(missing)}: pip install 'sketch-perceptual[{extra}]'" if missing else None


def _unfit() -> str | None:
    """Check that torchvision fits torch; if not, transformers and peft would blame other modules."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:
        versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision"))
        return (
            f"{versions} do not work together ({first_line(error)}): install both from the same index, pip install"
            " --force-reinstall torch torchvision"
        )
    return None
