"""Load networks of diffusers and transformers without trusting their files.

Their own loaders fill missing weights at random, accept int8 and NaN, and raise any exception for an invalid config.
Here all of these are an `InputError`.
"""

import json
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from safetensors import SafetensorError, safe_open
from torch import nn

from ..errors import HUB_ERRORS, InputError, first_line, first_names, hub_reason, is_out_of_memory
from .hub_model import check_finite, is_counter

LARGEST, MOST_LAYERS = 10**6, 1000  # larger numbers in a config would fill the memory before a weight is read
FLOATS = ("F16", "BF16", "F32", "F64")  # names in safetensors
OTHER_HALF = {"vision_model", "visual_projection", "text_projection", "logit_scale"}  # of a CLIP, besides its texts
READABLE = ["*.json", "*.txt", "model*.safetensors", "diffusion_pytorch_model*.safetensors"]


@contextmanager
def naming(sentence: str) -> Iterator[None]:
    """Turn exceptions of the block, except out of memory, into an InputError that begins with `sentence`."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{sentence}: {error}") from error
    except Exception as error:
        if is_out_of_memory(error):
            raise
        kind = "" if isinstance(error, HUB_ERRORS) else f"{type(error).__name__}: "
        raise InputError(f"{sentence}: {kind}{textwrap.shorten(hub_reason(error), 300)}") from error


def find_file(source: str | Path, name: str, **options) -> Path:
    """Return the path of a file in a folder, or download it from the Hub; `options` are `hf_hub_download`'s."""
    return Path(source, name) if Path(source).is_dir() else Path(hf_hub_download(str(source), name, **options))


def find_folder(source: str | Path, **options) -> Path:
    """Return the folder, or download the readable files of a Hub id; `options` are `snapshot_download`'s."""
    if Path(source).is_dir():
        return Path(source)
    return Path(snapshot_download(str(source), allow_patterns=READABLE, **options))


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; InputError if it does not hold one."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {first_line(error)}") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} must hold an object, got {json.dumps(config)[:80]}")
    return config


def read_config(path: Path) -> dict[str, Any]:
    """Return the config of a network or scheduler; InputError for a number that is too large."""
    config = read_json(path)
    for name, value in config.items():
        most = MOST_LAYERS if re.search("layers|blocks", name) else LARGEST
        if wrong := [number for number in _numbers(value) if not abs(number) <= most]:
            raise InputError(f"{path}: {name[:80]!r} must be a number of at most {most:g}, got {wrong[0]:g}")
    return config


def load_model(kind: type, folder: Path, variant: str | None = None, **options) -> Any:
    """Load a network; InputError unless all of its weights are in its files, floating and finite.

    Args:
        kind: its class, from diffusers or transformers.
        folder: with its config.json and safetensors.
        variant: of its files, such as "fp16".
        options: keywords of its `from_pretrained`.
    """
    read_config(folder / "config.json")
    for path in weight_files(folder, variant):
        _check_dtypes(path)
    with naming(str(folder)):
        loaded = kind.from_pretrained(  # type: ignore[attr-defined]
            str(folder), variant=variant, use_safetensors=True, output_loading_info=True, **options
        )
    model, info = loaded
    _check_keys(model, info, folder)
    check_finite(folder, model.state_dict())
    return model


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """Return the safetensors of a network, one file or its shards; InputError if there are none."""
    ending, shard = f".{variant}" if variant else "", r"(-\d+-of-\d+)?"
    ending = re.escape(ending)
    pattern = re.compile(rf"(diffusion_pytorch_)?model({ending}{shard}|{shard}{ending})\.safetensors")
    files = sorted(path for path in folder.glob("*.safetensors") if pattern.fullmatch(path.name))
    if not files:
        names = first_names(sorted(path.name for path in folder.glob("*.*")), count=5)
        raise InputError(
            f"{folder} holds no .safetensors weights{f' of the `variant` {variant}' if variant else ''}, only"
            f" {names or 'nothing'}; pickles (.bin) are not loaded"
        )
    return files


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)


def _check_dtypes(path: Path) -> None:
    """InputError for weights that are not floating-point, which loaders would silently convert."""
    try:
        with safe_open(path, "pt") as file:
            for name in list(file.keys()):
                dtype = file.get_slice(name).get_dtype()
                if not (dtype in FLOATS or is_counter(name)):
                    raise InputError(
                        f"{path}: {name!r} is {dtype}, but weights must be floating numbers of 16 bits or more"
                    )
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read as safetensors: {first_line(error)}") from error


def _check_keys(model: nn.Module, info: dict[str, Any], folder: Path) -> None:
    """InputError unless the files hold each weight of the network and nothing else, except a CLIP's other half."""
    parts = {name.split(".")[0] for name in model.state_dict()}
    extra = [n for n in info["unexpected_keys"] if not is_counter(n) and (n.split(".")[0] not in OTHER_HALF - parts)]
    errors = {"missing": info["missing_keys"], "of another shape": info["mismatched_keys"], "unexpected": extra}
    for kind, names in errors.items():
        if names:
            first = first_names(sorted(str(name) for name in names), count=3)
            raise InputError(
                f"{folder} does not hold the weights of a {type(model).__name__} as its config.json describes it:"
                f" {len(names)} of the tensors are {kind}: {first}"
            )
