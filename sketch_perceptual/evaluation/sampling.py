"""Draw pictures for prompts with each model, reusing existing ones."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from accelerate import Accelerator
from huggingface_hub import constants
from tqdm.auto import tqdm

from ..data.captions import captioned_folder
from ..data.datasets import CaptionedImages
from ..data.images import to_pil
from ..diffusion import Latents
from ..errors import InputError
from ..files import write_whole
from ..lora import files as lora_files
from ..networks.hub_model import fingerprint
from ..networks.pretrained import naming
from ..seeds import generator
from ..training.distributed import on_main
from ..training.lock import lock_folder
from .prompts import missing_pictures, open_folder

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


class Drawn(NamedTuple):
    """The pictures of a model: its name, its description, and the pictures with their prompts."""

    name: str
    model: dict
    data: CaptionedImages


def draw_models(
    accelerator: Accelerator,
    models: list[tuple[str, str]],
    prompts: list[tuple[str, int]],
    load: Callable[[], "StableDiffusionPipeline"],
    output_dir: str | Path,
    *,
    caption_options: dict,
    batch_size: int = 4,
    **settings,
) -> list[Drawn]:
    """Return the pictures of each of `models`, drawn by the pipeline or read from a folder.

    Args:
        models: name and source: "none", a LoRA, or a folder of captioned pictures.
        load: loads the pipeline, if it is needed.
        output_dir: has one folder per model; existing pictures are reused.
        caption_options: keyword arguments of `captioned_folder`.
        settings: keyword arguments of `draw_prompts`.
    """
    drawn, pipeline, folders = [], None, set()
    for name, source in models:
        model = {"model": Path(source).name}
        if is_pictures(source):
            drawn.append(Drawn(name, model, load_pictures(source, caption_options)))
            continue
        folder = Path(output_dir, name, model["model"] if model["model"].startswith("seed-") else "")
        if folder in folders:
            raise InputError(f"`models`: two models are called {name}: write NAME=MODEL")
        folders.add(folder)
        pipeline = pipeline or load()
        if source != "none":
            load_adapter(pipeline, source)
        on_main(accelerator, lock_folder, folder)
        paths, weights = draw_missing(accelerator, pipeline, folder, prompts, batch_size, settings)
        if source != "none":
            pipeline.unload_lora_weights()
        captions = [prompt for prompt, _ in prompts]
        drawn.append(Drawn(name, model | weights, CaptionedImages(paths, list(map(str, paths)), captions)))
    return drawn


def is_pictures(source: str) -> bool:
    return Path(source).is_dir() and not any(Path(source).glob("*.safetensors"))


def load_pictures(source: str, caption_options: dict) -> CaptionedImages:
    """Load a folder of pictures and their prompts."""
    try:
        return captioned_folder(source, **caption_options)
    except InputError as error:
        raise InputError(
            f"`models` {source} contains no LoRA (.safetensors), so it must be a folder of pictures with prompts,"
            f" in a metadata.jsonl or a .txt beside each: {error}"
        ) from error


def load_adapter(pipeline: "StableDiffusionPipeline", source: str) -> None:
    """Load a LoRA: a file of any trainer, a folder with one, or a Hub id."""
    with naming(f"`models` {source} does not load into the pipeline as a LoRA"):
        if Path(source).exists():
            layers = lora_files.read(source).layers
            lora_files.check_model(layers, {name: getattr(pipeline, name) for name in ("unet", "text_encoder")})
            pipeline.load_lora_weights(lora_files.to_tensors(lora_files.folded(layers)))
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
) -> tuple[list[Path], dict[str, str]]:
    """Draw the missing pictures, shared by the processes; return the paths of all, and hashes of the weights."""
    weights = {part: fingerprint(getattr(pipeline, part)) for part in ("unet", "text_encoder", "vae")}
    about = weights | settings | {"scheduler": type(pipeline.scheduler).__name__}
    about |= {"safety_checker": pipeline.safety_checker is not None, "mixed_precision": accelerator.mixed_precision}
    paths = on_main(accelerator, open_folder, folder, prompts, about)
    missing = on_main(accelerator, missing_pictures, paths, settings["resolution"])
    batches = [missing[start : start + batch_size] for start in range(0, len(missing), batch_size)]
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    for batch in tqdm(mine, f"Drawing {folder}", disable=None if accelerator.is_main_process else True):
        with accelerator.autocast():
            draw_prompts(pipeline, [prompts[index] for index in batch], [paths[index] for index in batch], **settings)
    accelerator.wait_for_everyone()
    return paths, weights


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
) -> None:
    """Draw one batch of pictures and write each atomically.

    The noise of a picture depends only on the seed, the prompt and its number, not on the rest of the batch. A
    picture that is not finite, or that the pipeline's safety checker flags, is written black.
    """
    latents = pipeline(
        [prompt for prompt, _ in prompts],
        height=resolution,
        width=resolution,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        generator=[generator(seed, *prompt) for prompt in prompts],
        output_type="latent",
    ).images
    images = Latents(pipeline.vae).decode(latents).float()
    images[~images.isfinite().flatten(1).all(1)] = -1
    if pipeline.safety_checker is not None:
        levels = (images.clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1).cpu().numpy()
        _, flagged = pipeline.run_safety_checker(levels, pipeline._execution_device, latents.dtype)
        images[torch.tensor(flagged)] = -1
    for image, path in zip(images, paths, strict=True):
        write_whole(path, to_pil(image).save)
