"""VGG-16 weights in torchvision's names: where they come from, and what they leave new in another network."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..errors import InputError, first_line
from ..extras import optional
from .hub_model import read_safetensors

MAKE = (
    'python -c "from torchvision.models import vgg16; from safetensors.torch import save_file;'
    " save_file(vgg16(weights='IMAGENET1K_V1').state_dict(), 'vgg16.safetensors')\""
)
LAST = "classifier.6."  # its size is the number of classes


def read_vgg16(source: str | Path) -> dict[str, Tensor]:
    """The tensors of "imagenet", torchvision's weights, downloaded once, or of a `.safetensors` file; InputError."""
    if source != "imagenet":
        return read_safetensors(source)
    models = optional("torchvision.models", "train")
    try:
        return models.VGG16_Weights.IMAGENET1K_V1.get_state_dict(check_hash=True, weights_only=True)
    except OSError as error:
        raise InputError(
            f"torchvision's VGG-16 weights could not be downloaded ({first_line(error)}). Make a local .safetensors"
            f" on a machine that can, and pass that instead of imagenet: {MAKE}"
        ) from error


def unknown_to(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Which tensors of a network VGG-16 weights cannot know.

    The attention; the classifier if the file holds `features` alone; its last layer if the classes are others.
    """
    trunk_only = not any(name.startswith("classifier.") for name in weights)
    other_classes = len(weights.get(LAST + "bias", ())) != len(own.get(LAST + "bias", ()))
    prefixes = ("classifier.",) if trunk_only else (LAST,) if other_classes else ()
    return [name for name in own if name.startswith(prefixes) or (".attention." in name and name not in weights)]
