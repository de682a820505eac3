"""What all our networks share: saved as safetensors, loaded from a folder or the Hub, told apart by their weights."""

import hashlib
from contextlib import redirect_stdout
from pathlib import Path

from huggingface_hub import PyTorchModelHubMixin
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import InputError


class HubModel(PyTorchModelHubMixin):
    """`save_pretrained`, `from_pretrained`, `push_to_hub`: safetensors only; what does not fit is an `InputError`.

    A subclass says what it is in `noun`.
    """

    noun: str

    @classmethod
    def _from_pretrained(cls, *, model_id, config=None, map_location="cpu", strict=True, **kwargs):
        if config is None:
            raise InputError(f"no {cls.noun} at {model_id}: there is no config.json, which save_pretrained writes")
        try:
            with redirect_stdout(None):  # huggingface_hub prints among our results that it loads from a folder
                return super()._from_pretrained(model_id=model_id, map_location=map_location, strict=strict, **kwargs)
        except (RuntimeError, SafetensorError) as error:
            raise InputError(f"{model_id}: the weights do not fit its config.json: {error}") from error

    @classmethod
    def _load_as_pickle(cls, model, model_file, map_location, strict):
        raise InputError(f"{model_file} is a pickle; only model.safetensors is loaded")


def fingerprint(module: nn.Module) -> str:
    """Which weights these are, whatever file they came in: 12 hex digits of sha256 over names and float32 values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def _read_safetensors(path: str | Path) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise InputError(f"there is no weights file {path}")
    if Path(path).suffix != ".safetensors":
        raise InputError(f"{path} is not a .safetensors file; pickles are not loaded")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path} cannot be read as safetensors: {error}") from error
