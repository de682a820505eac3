"""Files of LoRA weights in the names of diffusers and of kohya's trainers: the same numbers, other names.

diffusers: `unet.<module>.lora.down.weight`, with alphas in the metadata, which diffusers before 0.35 does not read.
kohya: `lora_unet_<module>.lora_down.weight`, each module with its alpha; read by AUTOMATIC1111, Forge, ComfyUI,
sd-scripts and diffusers, of which none computes DoRA as PEFT and LyCORIS do (see benchmarks/README.md).
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from .errors import InputError, first_line, first_names

PEFT_CONFIG = "lora_adapter_metadata"  # diffusers' key for it
PARTS = {
    "down": ("lora.down.weight", "lora_linear_layer.down.weight", "lora_A.weight", "lora_down.weight"),
    "up": ("lora.up.weight", "lora_linear_layer.up.weight", "lora_B.weight", "lora_up.weight"),
    "magnitude": ("lora_magnitude_vector", "lora_magnitude_vector.weight", "dora_scale"),
    "alpha": ("alpha",),
}
PART = {f".{suffix}": part for part, suffixes in PARTS.items() for suffix in suffixes}
# What modules of Stable Diffusion 1 and 2 are called, between dots; kohya's names have underscores there too.
WORDS = """down_blocks up_blocks mid_block attentions resnets downsamplers upsamplers transformer_blocks attn1 attn2
    to_q to_k to_v to_out ff net proj proj_in proj_out conv conv1 conv2 conv_in conv_out conv_shortcut time_emb_proj
    time_embedding linear_1 linear_2 text_model encoder layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2"""
WORD = re.compile(rf"(?:{'|'.join(sorted(WORDS.split(), key=len, reverse=True))}|\d+)(?=_|$)")

# Options that sd-scripts' metadata, or ours, have under their own names.
SAME = """learning_rate text_encoder_lr lr_scheduler lr_warmup_steps gradient_accumulation_steps max_grad_norm
    mixed_precision seed noise_offset steps use_dora use_rslora"""


@dataclass(frozen=True)
class Layer:
    """What a LoRA does to the weight W of a module: W + alpha / rank * up @ down.

    Args:
        down, up: (rank, in) and (out, rank), of convolutions with two more dimensions.
        magnitude: (out,), DoRA (Liu et al. 2024): the length that each row of the sum is given.
    """

    down: torch.Tensor
    up: torch.Tensor
    alpha: float
    magnitude: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return len(self.down)

    def folded(self) -> "Layer":
        """The same with alpha = rank, which is what a reader assumes who is not told."""
        return replace(self, up=self.up * (self.alpha / self.rank), alpha=float(self.rank))


def locate(key: str) -> tuple[str, str]:
    """A tensor's name, in anybody's words -> its module, as diffusers writes it, and its part; "" where unknown."""
    for suffix, part in PART.items():
        if key.endswith(suffix):
            name = key.removesuffix(suffix)
            if name.startswith("lora_"):
                return module_name(name), part
            name = re.sub(r"^text_encoder\.encoder\.", "text_encoder.text_model.encoder.", name)  # transformers 5.6
            return name if module_name(kohya_name(name)) == name else "", part
    return "", ""


def to_layers(tensors: Mapping[str, torch.Tensor]) -> dict[str, Layer]:
    """Module -> layer; where no alpha is among the tensors it is the rank. InputError names what is not known."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        module, part = locate(key)
        parts.setdefault(module or key, {})[part if module else ""] = tensor.detach()
    unknown = [module for module, found in parts.items() if not {"down", "up"} <= found.keys() or "" in found]
    if unknown or not parts:
        raise InputError(f"no LoRA of Stable Diffusion 1 or 2 has {first_names(unknown) or 'no weights'}")
    layers = {}
    for module, found in sorted(parts.items()):
        alpha, magnitude = found.get("alpha", len(found["down"])), found.get("magnitude")
        if magnitude is not None and len(magnitude) != len(found["up"]):
            raise InputError(f"{module} is DoRA of columns, which PEFT does not have")
        layers[module] = Layer(
            found["down"], found["up"], float(alpha), None if magnitude is None else magnitude.flatten()
        )
    return layers


def to_tensors(layers: Mapping[str, Layer]) -> dict[str, torch.Tensor]:
    """In diffusers' names; alphas are not among them."""
    tensors = {}
    for module, layer in layers.items():
        lora, magnitude = "lora", "lora_magnitude_vector"
        if module.startswith("text_encoder."):
            lora, magnitude = "lora_linear_layer", "lora_magnitude_vector.weight"  # all that transformers 5.24 finds
        tensors |= {f"{module}.{lora}.down.weight": layer.down, f"{module}.{lora}.up.weight": layer.up}
        if layer.magnitude is not None:
            tensors[f"{module}.{magnitude}"] = layer.magnitude
    return tensors


def peft_config(layers: Mapping[str, Layer]) -> dict:
    """What any PEFT needs to know, in diffusers' names: a field that an older one lacks would be refused by it."""
    config: dict = {}
    for model in sorted({module.split(".")[0] for module in layers}):
        part = {
            re.sub(rf"^{model}\.(text_model\.)?", "", module): layer
            for module, layer in layers.items()
            if module.startswith(f"{model}.")
        }
        ranks = {module: layer.rank for module, layer in part.items()}
        alphas = {module: int(a) if (a := layer.alpha).is_integer() else a for module, layer in part.items()}
        r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
        config |= {
            f"{model}.r": r,
            f"{model}.lora_alpha": alpha,
            f"{model}.rank_pattern": {module: value for module, value in ranks.items() if value != r},
            f"{model}.alpha_pattern": {module: value for module, value in alphas.items() if value != alpha},
            f"{model}.target_modules": sorted(part),
        }
        if any(layer.magnitude is not None for layer in part.values()):
            config[f"{model}.use_dora"] = True  # known to every PEFT that can read it
    return config


def with_alphas(layers: Mapping[str, Layer], config: Mapping) -> dict[str, Layer]:
    """The layers with the alphas of PEFT's configuration: a module's own, by pattern; for rank-stabilised LoRA too."""
    found = {}
    for module, layer in layers.items():
        model, _, name = module.partition(".")
        patterns = config.get(f"{model}.alpha_pattern") or {}
        own = [value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)]
        alpha = own[0] if own else config.get(f"{model}.lora_alpha", layer.alpha)
        found[module] = replace(layer, alpha=alpha * (layer.rank**0.5 if config.get(f"{model}.use_rslora") else 1.0))
    return found


def kohya_name(module: str) -> str:
    model, _, name = module.partition(".")
    return f"lora_{'unet' if model == 'unet' else 'te'}_{name.replace('.', '_')}"


def module_name(name: str) -> str:
    """The module with that name of kohya's; "" if there is none in Stable Diffusion 1 and 2."""
    for prefix, model in (("lora_unet_", "unet."), ("lora_te_", "text_encoder.")):
        if name.startswith(prefix):
            words = WORD.findall(rest := name.removeprefix(prefix))
            return model + ".".join(words) if "_".join(words) == rest else ""
    return ""


def to_kohya(layers: Mapping[str, Layer]) -> dict[str, torch.Tensor]:
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
    """Layers by module, as diffusers calls it; the metadata; and whether the names in the file were kohya's."""

    layers: dict[str, Layer]
    metadata: dict[str, str]
    is_kohya: bool


def read(path: str | Path) -> LoraFile:
    """A file in either form; InputError where it is not a LoRA of Stable Diffusion 1 or 2."""
    try:
        with safe_open(path, "pt") as file:
            metadata, tensors = file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}") from error
    try:
        layers = to_layers(tensors)
    except InputError as error:
        raise InputError(f"{path} cannot be used: {error}") from error
    config = json.loads(metadata.get(PEFT_CONFIG, "{}"))
    return LoraFile(with_alphas(layers, config), metadata, any(key.startswith("lora_") for key in tensors))


def write_diffusers(path: str | Path, layers: Mapping[str, Layer], metadata: Mapping[str, str] | None = None) -> None:
    """`metadata` is added to the configuration."""
    config = json.dumps(peft_config(layers), indent=2, sort_keys=True)
    write(path, to_tensors(layers), {**(metadata or {}), PEFT_CONFIG: config})


def write_kohya(path: str | Path, layers: Mapping[str, Layer], metadata: Mapping[str, str]) -> None:
    """`metadata`, `ss_*` and `modelspec.*`, gets what kohya's trainers know of any network, and the hashes."""
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


def run_metadata(name: str, base_model: str, options: Mapping, *, is_v2: bool = False, is_v: bool = False) -> dict:
    """What sd-scripts writes of a run called `name`, and our term; no dates, so that a seed makes the same bytes.

    `options` are those of the run, with its `steps` and `epochs`; `is_v`: the model predicts v.
    """
    shown = {key: options[key] for key in options if key in SAME.split() or key.startswith("perceptual_")}
    renamed = {"snr_gamma": "min_snr_gamma", "caption_dropout": "caption_dropout_rate", "epochs": "epoch"}
    shown |= {new: options[old] for old, new in renamed.items() if options.get(old)}
    version, side = "v2" if is_v2 else "v1", options["resolution"]
    size = {"v1": "", "v2": "-768-v" if is_v else "-512"}[version]
    shown |= {
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
    }
    texts = {f"ss_{key}": value for key, value in shown.items()} | {f"modelspec.{k}": v for k, v in spec.items() if v}
    return {key: " ".join(map(str, v)) if isinstance(v, list) else str(v) for key, v in texts.items()}


def hashes(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Those that sd-scripts writes and other programs know a LoRA by: of the file with its `ss_*` metadata alone."""
    data = to_bytes(tensors, {name: text for name, text in metadata.items() if name.startswith("ss_")})
    weights = data[8 + int.from_bytes(data[:8], "little") :]
    legacy = data[0x100000 : 0x100000 + 0x10000]
    return {
        "sshs_model_hash": hashlib.sha256(weights).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(legacy).hexdigest()[:8],
    }


def to_bytes(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file; the same bytes each time, which the library's own metadata, in any order, are not."""
    plain = safetensors.torch.save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()})
    size = int.from_bytes(plain[:8], "little")
    header = {"__metadata__": dict(sorted(metadata.items()))} | json.loads(plain[8 : 8 + size])
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + plain[8 + size :]


def write(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Whole or not at all, with the permissions of any new file."""
    partial = Path(f"{path}.partial")
    partial.write_bytes(to_bytes(tensors, {"format": "pt"} | dict(metadata)))
    os.replace(partial, path)
