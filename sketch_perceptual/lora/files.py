"""Read, check and write LoRA files in the names of diffusers, kohya's trainers and others.

diffusers: `unet.<module>.lora.down.weight`, with alphas in the metadata, which diffusers before 0.35 does not read.
kohya: `lora_unet_<module>.lora_down.weight`, each module with its alpha; read by AUTOMATIC1111, Forge, ComfyUI,
sd-scripts and diffusers, none of which computes DoRA as PEFT and LyCORIS do (see research/compatibility.md).
"""

import hashlib
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from ..errors import InputError, first_line, first_names, shown
from .names import KINDS, WIDEST, description, kohya_name, locate

PEFT_CONFIG = "lora_adapter_metadata"  # diffusers' key for it
FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # diffusers' and PEFT's, in a folder
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)

# First bytes of files that are not safetensors.
PICKLE = "a pickle, which can run code when it is read: save its tensors with `safetensors.torch.save_file`"
BEGINNINGS = {
    b"PK": PICKLE,
    b"\x80": PICKLE,
    b"GGUF": "a GGUF file",
    b"version https://git-lfs": "a pointer of Git LFS, without the file: run `git lfs pull`",
    b"<": "a web page instead of the file: download it again",
}

# Options that have the same names in sd-scripts' metadata, or only in ours.
SAME = """learning_rate text_encoder_lr lr_scheduler lr_warmup_steps gradient_accumulation_steps max_grad_norm
    mixed_precision seed noise_offset steps use_dora use_rslora"""


@dataclass(frozen=True)
class Layer:
    """A LoRA of one module, whose weight W becomes W + alpha / rank * up @ down.

    Args:
        down, up: (rank, in) and (out, rank), of convolutions (rank, in, height, width) and (out, rank, 1, 1).
        magnitude: (out,), DoRA (Liu et al. 2024): the length that each row of the sum is given.

    Raises:
        InputError: for other shapes or dtypes, weights that are not finite, an alpha that is 0 or not finite.
    """

    down: torch.Tensor
    up: torch.Tensor
    alpha: float
    magnitude: torch.Tensor | None = None

    def __post_init__(self) -> None:
        down, up = tuple(self.down.shape), tuple(self.up.shape)
        if len(down) not in (2, 4) or len(up) != len(down) or up[1] != down[0] or up[2:] != (1,) * len(up[2:]):
            raise InputError(f"down of {down} and up of {up} are not (rank, in, ...) and (out, rank, ...)")
        if 0 in down + up:
            raise InputError(f"down of {down} and up of {up} are empty")
        if not math.isfinite(self.alpha) or self.alpha == 0:
            raise InputError(f"alpha is {self.alpha:g}")
        if self.magnitude is not None and self.magnitude.shape != up[:1]:
            raise InputError(f"magnitudes of {tuple(self.magnitude.shape)} do not fit up of {up}")
        for name in ("down", "up", "magnitude"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.dtype not in FLOATS:
                raise InputError(f"{name} is {_dtype(tensor)}, not floating-point weights")
            if tensor is not None and not tensor.isfinite().all():
                raise InputError(f"{name} has values that are NaN or infinite")

    @property
    def rank(self) -> int:
        return len(self.down)

    def folded(self, alpha: float | None = None) -> "Layer":
        """Return the same change with another alpha: the rank, the default where a file stores none.

        `up` becomes float32 where its own precision would round it.
        """
        alpha = float(self.rank) if alpha is None else alpha
        scaled = self.up.to(torch.promote_types(self.up.dtype, torch.float32)) * (self.alpha / alpha)
        rounded = scaled.to(self.up.dtype)
        return replace(self, up=rounded if torch.equal(rounded.to(scaled.dtype), scaled) else scaled, alpha=alpha)


def to_layers(tensors: Mapping[str, torch.Tensor]) -> dict[str, Layer]:
    """Return the layers by module; a missing alpha is the rank.

    Raises:
        InputError: names what does not belong to a LoRA of Stable Diffusion 1 or 2, occurs twice, or does not fit.
    """
    parts: dict[str, dict[str, str]] = {}
    unknown = []
    for key in tensors:
        module, part = locate(key)
        if not module:
            unknown.append(key)
        elif (other := parts.setdefault(module, {}).setdefault(part, key)) != key:
            raise InputError(f"{module} occurs twice, as {shown(other)} and as {shown(key)}")
    if unknown or not parts:
        raise InputError(_refusal(unknown))
    layers = {}
    for module, keys in sorted(parts.items()):
        try:
            layers[module] = _layer({part: tensors[key].detach() for part, key in keys.items()}, keys)
        except InputError as error:
            raise InputError(f"{module}: {error}") from error
    check_widths(layers)
    return layers


def _refusal(keys: list[str]) -> str:
    """Describe why unknown keys cannot be read."""
    for pattern, kind in KINDS.items():
        if named := [shown(key) for key in keys[:1000] if re.search(pattern, key)]:
            return f"{kind} is not supported, only LoRA of Stable Diffusion 1 and 2: {first_names(named, count=3)}"
    names = first_names([key or "''" for key in keys]) or "no weights"
    return f"not a LoRA of Stable Diffusion 1 or 2: {names}"


def _layer(tensors: dict[str, torch.Tensor], keys: Mapping[str, str]) -> Layer:
    """Make the layer of these parts, in at least half precision."""
    if missing := {"down", "up"} - tensors.keys():
        raise InputError(f"{' and '.join(sorted(missing))} of the LoRA is missing")
    tensors = {part: tensor.float() if tensor.dtype in EIGHT_BITS else tensor for part, tensor in tensors.items()}
    alpha, magnitude = tensors.get("alpha", torch.tensor(tensors["down"].shape[:1].numel())), tensors.get("magnitude")
    if alpha.numel() != 1 or alpha.is_complex() or alpha.dtype == torch.bool:
        raise InputError(f"alpha is not a number but {_dtype(alpha)} of {tuple(alpha.shape)}")
    if magnitude is not None:
        of_columns = keys["magnitude"].endswith(".dora_scale") and magnitude.ndim > 1 and len(magnitude) == 1
        if of_columns and len(tensors["up"]) > 1:
            raise InputError("DoRA of columns (LyCORIS without wd_on_out), which PEFT and diffusers do not support")
        magnitude = magnitude.flatten()
    return Layer(tensors["down"], tensors["up"], float(alpha), magnitude)


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def check_widths(layers: Mapping[str, Layer]) -> None:
    """Check that layers are of one model, with kernels and widths that Stable Diffusion 1 or 2 can have."""
    widths: dict[tuple[str, str], tuple[int, str]] = {}
    for module, layer in layers.items():
        described = description(module)
        if described is None:
            raise InputError(f"Stable Diffusion 1 and 2 have no {module}")
        block, (before, after, kernels) = described
        if layer.down.shape[2:] not in kernels:
            raise InputError(f"{module} has no kernel for down of {tuple(layer.down.shape)}")
        for spec, width in ((before, layer.down.shape[1]), (after, len(layer.up))):
            name, _, factor = spec.partition("*")
            key = (block if name in ("block", "inner") else "", name)
            known, other = widths.setdefault(key, (width // int(factor or 1), module)) if name else (width, module)
            if known * int(factor or 1) != width:
                raise InputError(f"{module} has a width of {width}, but {other} fits {known * int(factor or 1)}")
        if layer.rank in (320, 640, 768, 1024, 1280) and layer.rank > max(layer.down.shape[1], len(layer.up)):
            raise InputError(f"{module} has a rank of {layer.rank}: its down and up are transposed")
    for (_, name), (width, module) in widths.items():
        if width > WIDEST[name]:
            raise InputError(f"{module} is for a width of {width}, Stable Diffusion 1 and 2 have {WIDEST[name]} there")


def check_model(layers: Mapping[str, Layer], models: Mapping[str, torch.nn.Module]) -> None:
    """Check that `models`, by their names in a pipeline, have the modules of these layers, in their shapes."""
    for module, layer in layers.items():
        model, _, name = module.partition(".")
        shape = (len(layer.up), *layer.down.shape[1:])
        try:
            weight = _submodule(models[model], name).get_parameter("weight")
        except (KeyError, AttributeError):
            raise InputError(f"the model has no {module}") from None
        if weight.shape != shape:
            raise InputError(f"{module} is {tuple(weight.shape)} in the model, {shape} in the LoRA")


def _submodule(model: torch.nn.Module, name: str) -> torch.nn.Module:
    """Find a module by diffusers' name; transformers from 5.6 have no `text_model` around a text encoder."""
    return model.get_submodule(name if hasattr(model, "text_model") else name.removeprefix("text_model."))


def to_tensors(layers: Mapping[str, Layer]) -> dict[str, torch.Tensor]:
    """Return the layers in diffusers' names, without their alphas."""
    tensors = {}
    for module, layer in layers.items():
        lora, magnitude = "lora", "lora_magnitude_vector"
        if module.startswith("text_encoder."):
            lora, magnitude = "lora_linear_layer", "lora_magnitude_vector.weight"  # all that transformers 5.24 knows
        tensors |= {f"{module}.{lora}.down.weight": layer.down, f"{module}.{lora}.up.weight": layer.up}
        if layer.magnitude is not None:
            shape = (1, -1, 1, 1) if layer.up.ndim == 4 else (-1,)
            tensors[f"{module}.{magnitude}"] = layer.magnitude.view(shape)
    return tensors


def peft_config(layers: Mapping[str, Layer]) -> dict:
    """Return the minimal configuration that every PEFT needs, in diffusers' names.

    An older PEFT would reject fields that it does not know.
    """
    config: dict = {}
    for model in sorted({module.split(".")[0] for module in layers}):
        part = {
            re.sub(rf"^{model}\.(text_model\.)?", "", module): layer
            for module, layer in layers.items()
            if module.startswith(f"{model}.")
        }
        ranks = {module: layer.rank for module, layer in part.items()}
        alphas = {module: int(a) if (a := float(layer.alpha)).is_integer() else a for module, layer in part.items()}
        r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
        config |= {
            f"{model}.r": r,
            f"{model}.lora_alpha": alpha,
            f"{model}.rank_pattern": {module: value for module, value in ranks.items() if value != r},
            f"{model}.alpha_pattern": {module: value for module, value in alphas.items() if value != alpha},
            f"{model}.target_modules": sorted(part),
        }
        plain = [module for module, layer in part.items() if layer.magnitude is None]
        if plain and len(plain) < len(part):
            raise InputError(f"{model}.{plain[0]} is not DoRA but other layers are, which diffusers cannot mix")
        if not plain:
            config[f"{model}.use_dora"] = True  # known to every PEFT that can read it
    return config


def with_alphas(layers: Mapping[str, Layer], config: Mapping) -> dict[str, Layer]:
    """Return the layers with the alphas of PEFT's configuration.

    Args:
        config: `lora_alpha`, `alpha_pattern` (regular expressions of modules with another alpha) and
            `use_rslora` (rank-stabilised: alpha is multiplied by the root of the rank), each for a model, as in
            `unet.lora_alpha`, or for all.

    Raises:
        InputError: if they are not what PEFT writes.
    """
    models = sorted({module.split(".")[0] for module in layers})
    options = {model: _alpha_options(config, model) for model in models}

    def with_alpha(module: str, layer: Layer) -> Layer:
        model, _, name = module.partition(".")
        alpha, patterns, is_stabilised = options[model]
        names = (name, name.removeprefix("text_model."))  # its name in transformers from 5.6
        matching = [value for pattern, value in patterns if any(map(pattern.match, names))]
        alpha = matching[0] if matching else layer.alpha if alpha is None else alpha
        return replace(layer, alpha=alpha * (layer.rank**0.5 if is_stabilised else 1.0))

    return _changed(layers, with_alpha)


def folded(layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """Return the layers with alpha = rank, as in a file without alphas."""
    return _changed(layers, lambda _, layer: layer.folded())


def with_common_alphas(layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """Return the layers with the most common alpha of their model.

    diffusers 0.42 gives all attention of a kohya file this alpha, since its alpha patterns do not match there.
    """
    models = {module: module.split(".")[0] for module in layers}
    alphas = {
        model: Counter(layer.alpha for module, layer in layers.items() if models[module] == model).most_common(1)[0][0]
        for model in set(models.values())
    }
    return _changed(layers, lambda module, layer: layer.folded(alphas[models[module]]))


def _changed(layers: Mapping[str, Layer], change: Callable[[str, Layer], Layer]) -> dict[str, Layer]:
    """Apply `change` to each layer; an InputError names its module."""
    changed = {}
    for module, layer in layers.items():
        try:
            changed[module] = change(module, layer)
        except InputError as error:
            raise InputError(f"{module}: {error}") from error
    return changed


def _alpha_options(config: Mapping, model: str) -> tuple[float | None, list[tuple[re.Pattern, float]], bool]:
    alpha, patterns, is_stabilised = (
        config.get(f"{model}.{key}", config.get(key)) for key in ("lora_alpha", "alpha_pattern", "use_rslora")
    )
    patterns = {} if patterns is None else patterns
    if not isinstance(patterns, Mapping):
        raise InputError(f"its alpha_pattern is {_short(patterns)}, not modules and their alphas")
    numbers = [(_pattern(key), _number(value)) for key, value in patterns.items()]
    return None if alpha is None else _number(alpha), numbers, bool(is_stabilised)


def _number(alpha: object) -> float:
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or abs(alpha) > sys.float_info.max:
        raise InputError(f"its configuration has an alpha of {_short(alpha)}, which is not a number")
    return float(alpha)


def _pattern(key: str) -> re.Pattern:
    """Compile PEFT's pattern of modules, except one that may match for minutes."""
    repeated, options = len(re.findall(r"(?:\.|\]|\\[wWDSs])[*+{]", key)), len(re.findall(r"[|?]", key))
    if re.search(r"\)[*+{]", key) or 5 * repeated + options > 12:
        raise InputError(f"its alpha_pattern {_short(key)} repeats too much")
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(f"its alpha_pattern {_short(key)} is not a regular expression: {error}") from error


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def to_kohya(layers: Mapping[str, Layer]) -> dict[str, torch.Tensor]:
    """Return the layers in kohya's names, each with its alpha."""
    tensors = {}
    for module, layer in layers.items():
        name = kohya_name(module)
        tensors |= {f"{name}.lora_down.weight": layer.down, f"{name}.lora_up.weight": layer.up}
        tensors[f"{name}.alpha"] = torch.tensor(layer.alpha)
        if layer.magnitude is not None:
            tensors[f"{name}.dora_scale"] = layer.magnitude.view(-1, *[1] * (layer.up.ndim - 1))
    return tensors


@dataclass(frozen=True)
class LoraFile:
    """Contents of a LoRA file.

    Args:
        layers: by module, as diffusers calls it.
        is_kohya: the names in the file are kohya's.
        notes: sentences about what was left out or assumed.
    """

    layers: dict[str, Layer]
    metadata: dict[str, str]
    is_kohya: bool
    notes: tuple[str, ...] = ()


def read(path: str | Path) -> LoraFile:
    """Read a LoRA file of any trainer, or a folder with one.

    Raises:
        InputError: if it is not a valid LoRA of Stable Diffusion 1 or 2.
    """
    path = find_file(Path(path))
    tensors, metadata = _load(path)
    embeddings = sorted({shown(name) for key in tensors if (name := _embedding(key))})
    weights = {key: tensor for key, tensor in tensors.items() if not _embedding(key)} or tensors
    notes = [f"the embedding {name} is left out" for name in embeddings]
    try:
        layers = to_layers(weights)
        config = _json(metadata.get(PEFT_CONFIG, "{}"), f"its metadata {PEFT_CONFIG}")
        if any(key.startswith("base_model.model.") for key in weights):
            peft = path.with_name("adapter_config.json")
            config = _json(peft.read_bytes(), peft.name) if peft.is_file() else config
            notes += [] if config else [f"there is no {peft.name} with its alpha, which is assumed to be the rank"]
        layers = with_alphas(layers, config)
    except (InputError, OSError) as error:
        raise InputError(f"{path} cannot be used: {first_line(error)}") from error
    return LoraFile(layers, metadata, any(key.startswith("lora_") for key in weights), tuple(notes))


def find_file(path: Path) -> Path:
    """Return the LoRA file in a folder: diffusers' or PEFT's, or the only .safetensors. Return a file unchanged."""
    if not path.is_dir():
        return path
    files = [path / name for name in FILES if (path / name).is_file()] or sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    if not files:
        raise InputError(f"{path} is a folder without a LoRA ({' or '.join(FILES)})")
    raise InputError(f"{path} contains {first_names([file.name for file in files])}: choose one of them")


def _load(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read the tensors and metadata of a safetensors file."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path} cannot be read: it is not a file")
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise InputError(f"{path} cannot be read: {_other_format(path) or shown(first_line(error))}") from error


def _other_format(path: Path) -> str:
    """Describe a file that is not safetensors; "" if its format is unknown."""
    with suppress(OSError), path.open("rb") as file:
        beginning = file.read(64).lstrip()
        return next((f"it is {kind}" for start, kind in BEGINNINGS.items() if beginning.startswith(start)), "")
    return ""


def _embedding(key: str) -> str:
    """Return the name of the bundled embedding that a tensor belongs to; "" if there is none."""
    if not key.startswith("bundle_emb."):
        return key if key == "emb_params" else ""
    return key.removeprefix("bundle_emb.").removesuffix(".*").rpartition(".")[0]


def _json(text: str | bytes, name: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is not JSON: {first_line(error)}") from error
    if not isinstance(config, dict):
        raise InputError(f"{name} is {_short(config)}, not a configuration of PEFT")
    return config


def write_diffusers(path: str | Path, layers: Mapping[str, Layer], metadata: Mapping[str, str] | None = None) -> None:
    """Write a file in diffusers' names, with `metadata` and the configuration."""
    config = json.dumps(peft_config(layers), indent=2, sort_keys=True)
    write(path, to_tensors(layers), {**(metadata or {}), PEFT_CONFIG: config})


def write_kohya(path: str | Path, layers: Mapping[str, Layer], metadata: Mapping[str, str]) -> None:
    """Write a file in kohya's names, with `metadata` (`ss_*`, `modelspec.*`), the network's settings, and hashes."""
    tensors = to_kohya(layers)
    ranks, alphas = (Counter(getattr(x, name) for x in layers.values()) for name in ("rank", "alpha"))
    is_dora = any(layer.magnitude is not None for layer in layers.values())
    known = {
        "ss_network_module": "lycoris.kohya" if is_dora else "networks.lora",  # sd-scripts' own knows no magnitudes
        "ss_network_dim": str(ranks.most_common(1)[0][0]),
        "ss_network_alpha": f"{alphas.most_common(1)[0][0]:g}",
    }
    known = {**metadata, **known}
    write(path, tensors, known | hashes(tensors, known))


def run_metadata(
    name: str,
    base_model: str,
    options: Mapping,
    *,
    is_v2: bool = False,
    is_v: bool = False,
    usage_hint: str | None = None,
) -> dict[str, str]:
    """Return sd-scripts' metadata for a run, and those of our term; without dates, so that files are reproducible.

    Args:
        options: options of the run, with its `steps` and `epochs`.
        is_v: the model predicts v.
        usage_hint: how to draw with it, where it is not as usual.
    """
    record = {key: options[key] for key in options if key in SAME.split() or key.startswith("perceptual_")}
    renamed = {"snr_gamma": "min_snr_gamma", "caption_dropout": "caption_dropout_rate", "epochs": "epoch"}
    record |= {new: options[old] for old, new in renamed.items() if options.get(old)}
    version, side = "v2" if is_v2 else "v1", options["resolution"]
    size = {"v1": "", "v2": "-768-v" if is_v else "-512"}[version]
    record |= {
        "output_name": name,
        "sd_model_name": base_model,
        "base_model_version": f"sd_{version}{'_v' if is_v and is_v2 else ''}",
        "v2": is_v2,
        "resolution": (side, side),
        "unet_lr": options["learning_rate"],
        "batch_size_per_device": options["train_batch_size"],
        "max_train_steps": options["steps"],
        "num_epochs": options["epochs"],
    }
    spec = {
        "sai_model_spec": "1.0.1",
        "architecture": f"stable-diffusion-{version}{size}/lora",
        "implementation": "diffusers",
        "title": name,
        "resolution": f"{side}x{side}",
        "prediction_type": "v" if is_v else "epsilon",
        "license": options.get("license"),
        "trigger_phrase": options.get("trigger_word"),
        "usage_hint": usage_hint,
    }
    texts = {f"ss_{key}": value for key, value in record.items()} | {f"modelspec.{k}": v for k, v in spec.items() if v}
    return {key: " ".join(map(str, v)) if isinstance(v, list) else str(v) for key, v in texts.items()}


def hashes(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Return sd-scripts' hashes, by which programs identify a LoRA; they cover only the `ss_*` metadata."""
    data = to_bytes(tensors, {name: text for name, text in metadata.items() if name.startswith("ss_")})
    weights = data[8 + int.from_bytes(data[:8], "little") :]
    legacy = data[0x100000 : 0x100000 + 0x10000]
    return {
        "sshs_model_hash": hashlib.sha256(weights).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(legacy).hexdigest()[:8],
    }


def to_bytes(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return a reproducible safetensors file; the library writes metadata in any order."""
    plain = safetensors.torch.save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()})
    size = int.from_bytes(plain[:8], "little")
    header = {"__metadata__": dict(sorted(metadata.items()))} | json.loads(plain[8 : 8 + size])
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode(errors="replace")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + plain[8 + size :]


def write(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file atomically, with the permissions of any new file."""
    partial = Path(f"{path}.partial")
    try:
        partial.write_bytes(to_bytes(tensors, {"format": "pt"} | dict(metadata)))
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
