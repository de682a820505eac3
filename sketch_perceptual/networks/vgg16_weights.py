"""VGG-16 weights with torchvision's names."""

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
    """Return the tensors of "imagenet" (torchvision's, downloaded once) or of a `.safetensors` file; InputError."""
    if source != "imagenet":
        return read_safetensors(source)
    models = optional("torchvision.models", "train")
    try:
        return models.VGG16_Weights.IMAGENET1K_V1.get_state_dict(check_hash=True, weights_only=True)
    except OSError as error:
        raise InputError(
            f"torchvision's VGG-16 weights could not be downloaded ({first_line(error)}). Make a .safetensors file"
            f" on a machine with a connection, and pass that instead of imagenet: {MAKE}"
        ) from error


def unknown_to(weights: Mapping[str, Tensor], network: Mapping[str, Tensor]) -> list[str]:
    """Return the names of a network's tensors that VGG-16 weights cannot contain.

    The attention; the classifier if the file holds only `features`; its last layer if the number of classes differs.
    """
    trunk_only = not any(name.startswith("classifier.") for name in weights)
    other_classes = len(weights.get(LAST + "bias", ())) != len(network.get(LAST + "bias", ()))
    prefixes = ("classifier.",) if trunk_only else (LAST,) if other_classes else ()
    return [name for name in network if name.startswith(prefixes) or (".attention." in name and name not in weights)]
