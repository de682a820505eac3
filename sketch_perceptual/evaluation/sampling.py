"""Draw pictures for prompts with each model, reusing existing ones."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from accelerate import Accelerator

from ..data.captions import captioned_folder
from ..data.datasets import CaptionedImages
from ..diffusion.pipelines import fingerprints
from ..errors import InputError
from ..lora.sampling import draw_missing, load_adapter
from ..training.distributed import on_main
from ..training.lock import lock_folder

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
        weights = fingerprints(pipeline)
        paths = draw_missing(accelerator, pipeline, folder, prompts, batch_size, settings, weights)
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
