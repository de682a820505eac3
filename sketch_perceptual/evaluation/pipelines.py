"""Stable Diffusion pipelines as the scripts load them."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from ..diffusion import cast_decoder
from ..errors import InputError, from_hub
from ..running.startup import silence

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


def add_pipeline_options(add: Callable, required: bool) -> None:
    """The options of `load_pipeline`, beside `--cache_dir`."""
    add("--pretrained_model_name_or_path", required=required, help="an SD-1.x pipeline: Hub id or folder")
    add("--revision", help="revision of the pipeline on the Hub")
    add("--variant", help='variant of its files, e.g. "fp16"')


def load_pipeline(
    accelerator: Accelerator,
    source: str,
    resolution: int,
    *,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
    **options,
) -> "StableDiffusionPipeline":
    """A Stable Diffusion 1.x pipeline: frozen, on its device, in the run's precision. InputError.

    Args:
        source: a folder or Hub id, with `revision` and `variant` of its files; `cache_dir` keeps downloads.
        resolution: pixels that it is to draw.
        options: keywords of its `from_pretrained`.
    """
    import diffusers  # takes 6 seconds
    from diffusers import StableDiffusionPipeline

    silence(diffusers)
    place = {"revision": revision, "cache_dir": cache_dir}
    with from_hub(
        f"`pretrained_model_name_or_path` {source} cannot be loaded; it must be the folder of a Stable Diffusion"
        " pipeline in safetensors, or the Hub id of one that can be reached"
    ):
        kind = StableDiffusionPipeline.load_config(source, **place).get("_class_name")
        if kind != "StableDiffusionPipeline":
            raise InputError(f"{source} is a {kind}; these scripts take SD-1.x, a StableDiffusionPipeline")
        pipeline = StableDiffusionPipeline.from_pretrained(
            source, variant=variant, use_safetensors=True, **place, **options
        )
    if resolution % pipeline.vae_scale_factor:
        raise InputError(f"`resolution` {resolution} must be a multiple of {pipeline.vae_scale_factor}")
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    for model in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        model.requires_grad_(False).to(accelerator.device, memory_format=torch.channels_last)
        if model.dtype != dtype:
            model.to(dtype=dtype)
    if dtype == torch.float16:
        cast_decoder(pipeline.vae, torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_generator(
    accelerator: Accelerator, source: str, resolution: int, safety_checker: bool, **place
) -> "StableDiffusionPipeline":
    """The pipeline that draws, with its safety checker or without; `place` are the other options of its files."""
    unchecked: dict[str, Any] = {} if safety_checker else {"safety_checker": None, "requires_safety_checker": False}
    pipeline = load_pipeline(accelerator, source, resolution, **place, **unchecked)
    if pipeline.safety_checker is not None:
        pipeline.safety_checker.to(pipeline.device, pipeline.unet.dtype)
    pipeline.unet.eval()
    return pipeline
