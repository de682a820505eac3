"""Stable Diffusion pipelines as the scripts load them."""

import copy
import importlib
import json
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from ..errors import InputError
from ..networks.hub_model import fingerprint
from ..networks.pretrained import find_file, find_folder, load_model, naming, read_config, read_json
from ..training.startup import silence
from .latents import Latents

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny, DDPMScheduler, StableDiffusionPipeline

INDEX = "model_index.json"
# The parts of a pipeline: where their classes are, and what these may be called, as a pattern.
PARTS = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL|AutoencoderTiny|AsymmetricAutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer(Fast)?"),
    "scheduler": ("diffusers", r"\w+Scheduler"),
    "safety_checker": ("diffusers.pipelines.stable_diffusion", "StableDiffusionSafetyChecker"),
    "feature_extractor": ("transformers", "CLIPImageProcessor|CLIPFeatureExtractor"),
}
NETWORKS = ("unet", "vae", "text_encoder", "safety_checker")
CHECKER = ("safety_checker", "feature_extractor")  # may be left out
SCHEDULER = "scheduler_config.json"
UNREADABLE = (
    "cannot be loaded; it must be the folder of a Stable Diffusion pipeline in safetensors, or the Hub id of one that"
    " can be reached"
)
SIDE = 8  # of a latent that a part is tried on


def add_pipeline_options(add: Callable, required: bool) -> None:
    """The options of `load_pipeline`, beside `--cache_dir`."""
    add(
        "--pretrained_model_name_or_path", shared=False, required=required, help="an SD-1.x pipeline: Hub id or folder"
    )
    add("--revision", shared=False, help="revision of the pipeline on the Hub")
    add("--variant", shared=False, help='variant of its files, e.g. "fp16"')


def load_pipeline(
    accelerator: Accelerator,
    source: str,
    resolution: int,
    *,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
    safety_checker: bool = False,
) -> "StableDiffusionPipeline":
    """Load a Stable Diffusion 1.x pipeline: frozen, on its device, in the run's precision. InputError.

    Each part must hold all of its weights, floating and finite, and is used once on a small input.

    Args:
        source: a folder or Hub id, with `revision` and `variant` of its files; `cache_dir` keeps downloads.
        resolution: pixels that it is to draw.
        safety_checker: load that too.
    """
    import diffusers  # takes 6 seconds

    silence(diffusers)
    index_file = find_index(source, revision, cache_dir)
    index = read_json(index_file)
    wanted = [part for part in PARTS if safety_checker or part not in CHECKER]
    with about(source, INDEX):
        classes = {part: find_class(index_file, index, part) for part in wanted}
    parts = dict.fromkeys(CHECKER) | load_parts(
        source, find_pipeline(source, variant, wanted, revision, cache_dir), classes, variant
    )
    with about(source, "unet, vae and scheduler together"):
        required = safety_checker and bool(index.get("requires_safety_checker", True))
        pipeline = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=required)
    if resolution % pipeline.vae_scale_factor:
        raise InputError(f"`resolution` {resolution} must be a multiple of {pipeline.vae_scale_factor}")
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    for model in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        model.requires_grad_(False).to(accelerator.device, memory_format=torch.channels_last)
        if model.dtype != dtype:
            model.to(dtype=dtype)
    if dtype == torch.float16:
        Latents(pipeline.vae).cast_decoder(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    try_parts(pipeline, source)
    return pipeline


def find_index(source: str, revision: str | None, cache_dir: str | None) -> Path:
    """Return the path of a pipeline's model_index.json; InputError if there is none, or for another pipeline."""
    with naming(f"`pretrained_model_name_or_path` {source} {UNREADABLE}"):
        path = find_file(source, INDEX, revision=revision, cache_dir=cache_dir)
        if (kind := read_json(path).get("_class_name")) == "StableDiffusionPipeline":
            return path
    raise InputError(
        f"`pretrained_model_name_or_path` {source} is a {kind}, by its {INDEX}; these scripts take SD-1.x, a"
        " StableDiffusionPipeline"
    )


def find_pipeline(
    source: str, variant: str | None, parts: Sequence[str], revision: str | None, cache_dir: str | None
) -> Path:
    """Return the folder of a pipeline, downloaded if `source` is a Hub id: only the `parts`."""
    if Path(source).is_dir():
        return Path(source)
    from diffusers import StableDiffusionPipeline

    unread = {part: None for part in PARTS if part not in parts}
    with naming(f"`pretrained_model_name_or_path` {source} {UNREADABLE}"):
        return Path(
            StableDiffusionPipeline.download(
                source, variant=variant, use_safetensors=True, revision=revision, cache_dir=cache_dir, **unread
            )
        )


def load_parts(source: str, folder: Path, classes: dict[str, type | None], variant: str | None) -> dict[str, Any]:
    """Load the parts of a pipeline that have a class; a network without files of the variant is read without it."""
    networks = [part for part in NETWORKS if classes.get(part)]
    files = [(part, path.name) for part in networks for path in (folder / part).glob("*.safetensors")]
    having = {part for part, name in files if variant and f".{variant}" in name}
    if variant and not having:
        raise InputError(f"`variant` {variant}: {folder} has no such files (*.{variant}.safetensors)")
    parts: dict[str, Any] = {}
    for part, kind in classes.items():
        with about(source, part):
            if kind is None:
                parts[part] = None
            elif part in networks:
                dtype = {"dtype": torch.float32} if PARTS[part][0] != "diffusers" else {}
                parts[part] = load_model(kind, folder / part, variant if part in having else None, **dtype)
            else:
                parts[part] = load_settings(kind, folder / part)
    return parts


def load_settings(kind: type, folder: Path) -> Any:
    """Load a tokenizer, a scheduler or an image processor, whose files hold no weights."""
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}")
    for path in sorted(folder.glob("*.json")):
        (read_config if path.name == SCHEDULER else read_json)(path)
    return kind.from_pretrained(str(folder))  # type: ignore[attr-defined]


def load_noise_scheduler(source: str, revision: str | None = None, cache_dir: str | None = None) -> "DDPMScheduler":
    """Load the scheduler that adds the noise in training, with the settings of the pipeline's own. InputError."""
    from diffusers import DDPMScheduler

    with about(source, "scheduler"):
        path = find_file(source, f"scheduler/{SCHEDULER}", revision=revision, cache_dir=cache_dir)
        noise_scheduler = load_settings(DDPMScheduler, path.parent)
        _check_schedule(noise_scheduler)
    return noise_scheduler


def load_decoder(source: str, cache_dir: str | None = None) -> "AutoencoderTiny":
    """Load an `AutoencoderTiny` that stands in for a VAE's decoder. InputError."""
    from diffusers import AutoencoderTiny

    with naming(f"`perceptual_decoder` {source} cannot be loaded"):
        return cast("AutoencoderTiny", load_model(AutoencoderTiny, find_folder(source, cache_dir=cache_dir)))


def latent_pixels(source: str) -> int | None:
    """Return the side in pixels of what the VAE of a local pipeline makes one latent of; None for a Hub id."""
    path = Path(source, "vae", "config.json")
    if not path.is_file():
        return None
    with about(source, "vae"):
        config = read_config(path)
        blocks = config.get("block_out_channels") or config.get("decoder_block_out_channels")  # AutoencoderTiny
        if not isinstance(blocks, list) or len(blocks) > 8:
            raise InputError(f"{path}: block_out_channels must be a list of channels")
        return 2 ** (len(blocks) - 1)


def fingerprints(pipeline: "StableDiffusionPipeline") -> dict[str, str]:
    """Return a hash of the weights of each network that a picture follows from."""
    return {part: fingerprint(getattr(pipeline, part)) for part in ("unet", "vae", "text_encoder")}


def about(source: str, part: str) -> AbstractContextManager[None]:
    """Name the pipeline and the part of it in what the block raises."""
    return naming(f"`pretrained_model_name_or_path` {source}: its {part} cannot be used")


def find_class(index_file: Path, index: dict, part: str) -> type | None:
    """Return the class of a part of the pipeline; None where the pipeline has no such part and needs none."""
    entry, (module, names) = index.get(part), PARTS[part]
    if part in CHECKER and entry in (None, [None, None]):
        return None
    name = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
    if not (isinstance(name, str) and re.fullmatch(names, name)):
        raise InputError(
            f"{index_file}: {part} is {json.dumps(entry)[:80]}, which is not a {part} of Stable Diffusion"
        )
    name = name.replace("FeatureExtractor", "ImageProcessor")  # as transformers called it before 5
    if not hasattr(importlib.import_module(module), name):
        raise InputError(f"{index_file}: {part} is {name[:80]}, which the installed {module} does not have")
    return getattr(importlib.import_module(module), name)


@torch.no_grad()
def try_parts(pipeline: "StableDiffusionPipeline", source: str) -> None:
    """Use each part once on a small input: configs may hold what loads and then fails. InputError names the part."""
    device, dtype = pipeline.unet.device, pipeline.unet.dtype
    with about(source, "tokenizer"):
        ids = _check_tokenizer(pipeline.tokenizer, pipeline.text_encoder.config)
    with about(source, "text_encoder"):
        hidden = _finite(pipeline.text_encoder(ids.to(device))[0])
    channels = pipeline.unet.config.in_channels
    with about(source, "unet"):
        latents = torch.linspace(-1, 1, channels * SIDE**2).view(1, channels, SIDE, SIDE).to(device, dtype)
        timestep = torch.ones(1, device=device, dtype=torch.long)
        prediction = _finite(pipeline.unet(latents, timestep, encoder_hidden_states=hidden).sample)
    with about(source, "vae"):
        images = _finite(Latents(pipeline.vae).decode(prediction))
        if images.shape != (1, 3, *[SIDE * pipeline.vae_scale_factor] * 2):
            raise InputError(f"a latent of {SIDE} x {SIDE} is decoded to {tuple(images.shape)}")
        _finite(Latents(pipeline.vae).encode(images))
    with about(source, "scheduler"):
        scheduler = copy.deepcopy(pipeline.scheduler)
        _check_schedule(scheduler)
        scheduler.set_timesteps(2, device=device)
        step = scheduler.timesteps[0]
        _finite(scheduler.step(prediction, step, scheduler.scale_model_input(latents, step)).prev_sample)


def load_generator(
    accelerator: Accelerator, source: str, resolution: int, safety_checker: bool, **place
) -> "StableDiffusionPipeline":
    """The pipeline that draws, with its safety checker or without; `place` are the other options of its files."""
    pipeline = load_pipeline(accelerator, source, resolution, safety_checker=safety_checker, **place)
    if pipeline.safety_checker is not None:
        pipeline.safety_checker.to(pipeline.device, pipeline.unet.dtype)
    pipeline.unet.eval()
    return pipeline


def _check_tokenizer(tokenizer, config) -> Tensor:
    """Return the tokens (1, N) of four letters; InputError for a tokenizer that does not go with the text encoder."""
    length, most = tokenizer.model_max_length, config.max_position_embeddings
    if not (isinstance(length, int) and 2 < length <= most):
        raise InputError(f"model_max_length must be from 3 to the text encoder's {most}, got {length}")
    if len(tokenizer) > config.vocab_size:
        raise InputError(f"it has {len(tokenizer)} tokens, the text encoder only {config.vocab_size}")
    if len(set(tokenizer("a b c d").input_ids)) < 4:
        raise InputError("it does not know the letters a, b, c and d: its vocabulary is missing")
    return tokenizer(
        "a b c d", padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    ).input_ids


def _check_schedule(scheduler) -> None:
    """InputError unless the noise of each step has a variance."""
    betas = getattr(scheduler, "betas", torch.zeros(1))
    if not ((betas >= 0) & (betas <= 1)).all():
        raise InputError("its betas do not lie between 0 and 1")


def _finite(output: Tensor) -> Tensor:
    if not output.isfinite().all():
        raise InputError(f"what it computes is not finite in {str(output.dtype).removeprefix('torch.')}")
    return output
