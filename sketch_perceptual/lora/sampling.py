"""Draw pictures for prompts, reusing existing ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from huggingface_hub import constants
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from ..data.images import to_pil
from ..diffusion import Latents
from ..errors import InputError
from ..files import write_whole
from ..networks.pretrained import naming
from ..seeds import generator
from ..training.distributed import on_main
from . import files
from .prompts import latents_path, missing_pictures, open_folder

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


def load_adapter(pipeline: "StableDiffusionPipeline", source: str) -> None:
    """Load a LoRA: a file of any trainer, a folder with one, or a Hub id."""
    with naming(f"`models` {source} does not load into the pipeline as a LoRA"):
        if Path(source).exists():
            layers = files.read(source).layers
            files.check_model(layers, {name: getattr(pipeline, name) for name in ("unet", "text_encoder")})
            pipeline.load_lora_weights(files.to_tensors(files.folded(layers)))
        else:  # offline, diffusers needs the name
            name = "pytorch_lora_weights.safetensors" if constants.HF_HUB_OFFLINE else None
            pipeline.load_lora_weights(source, weight_name=name, use_safetensors=True)
    if not pipeline.get_list_adapters():
        raise InputError(f"`models` {source} contains no LoRA for this pipeline")


def draw_missing(
    accelerator: Accelerator,
    pipeline: "StableDiffusionPipeline",
    folder: Path,
    prompts: list[tuple[str, int]],
    batch_size: int,
    settings: dict,
    weights: dict[str, str],
) -> list[Path]:
    """Draw the missing pictures, shared by the processes, and return the paths of all.

    Args:
        settings: keyword arguments of `draw_prompts`.
        weights: the pipeline's `fingerprints`, which the pictures in the folder must share.
    """
    about = weights | settings | {"scheduler": type(pipeline.scheduler).__name__}
    about |= {"safety_checker": pipeline.safety_checker is not None, "mixed_precision": accelerator.mixed_precision}
    paths = on_main(accelerator, open_folder, folder, prompts, about)
    missing = on_main(
        accelerator, missing_pictures, paths, settings["resolution"], settings.get("with_latents", False)
    )
    batches = [missing[start : start + batch_size] for start in range(0, len(missing), batch_size)]
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    for batch in tqdm(mine, f"Drawing {folder}", disable=None if accelerator.is_main_process else True):
        with accelerator.autocast():
            draw_prompts(pipeline, [prompts[index] for index in batch], [paths[index] for index in batch], **settings)
    accelerator.wait_for_everyone()
    return paths


@torch.no_grad()
def draw_prompts(
    pipeline: "StableDiffusionPipeline",
    prompts: Sequence[tuple[str, int]],
    paths: Sequence[Path],
    *,
    seed: int,
    resolution: int,
    num_inference_steps: int,
    guidance_scale: float,
    with_latents: bool = False,
) -> None:
    """Draw one batch of pictures and write each atomically.

    The noise of a picture depends only on the seed, the prompt and its number, not on the rest of the batch. A
    picture that is not finite, or that the pipeline's safety checker flags, is written black.

    Args:
        with_latents: write the noise and the latents of each picture too, (C, h, w) float32, to `latents_path`.
    """
    rngs = [generator(seed, *prompt) for prompt in prompts]
    side = resolution // pipeline.vae_scale_factor
    shape = (1, pipeline.unet.config.in_channels, side, side)
    noise = torch.cat([torch.randn(shape, generator=rng) for rng in rngs]).to(pipeline.device, pipeline.unet.dtype)
    latents = pipeline(
        [prompt for prompt, _ in prompts],
        height=resolution,
        width=resolution,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        generator=rngs,
        latents=noise,
        output_type="latent",
    ).images
    if with_latents:
        for path, *tensors in zip(paths, noise, latents, strict=True):
            write_latents(latents_path(path), *tensors)
    images = Latents(pipeline.vae).decode(latents).float()
    images[~images.isfinite().flatten(1).all(1)] = -1
    if pipeline.safety_checker is not None:
        levels = (images.clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1).cpu().numpy()
        _, flagged = pipeline.run_safety_checker(levels, pipeline._execution_device, latents.dtype)
        images[torch.tensor(flagged)] = -1
    for image, path in zip(images, paths, strict=True):
        write_whole(path, to_pil(image).save)


def write_latents(path: Path, noise: Tensor, latents: Tensor) -> None:
    tensors = {"noise": noise.float().cpu().contiguous(), "latents": latents.float().cpu().contiguous()}
    write_whole(path, lambda partial: partial.write_bytes(save(tensors)))
