"""Pairs of noise and the picture that a teacher draws from it: what a student of few steps learns from."""

import re
from pathlib import Path

from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..data.captions import captioned_folder
from ..data.datasets import CaptionedImages
from ..data.tags import with_trigger
from ..errors import InputError, first_line
from ..training.distributed import on_main
from ..training.lock import lock_folder
from .prompts import cycle_prompts, latents_path, read_prompts
from .sampling import draw_missing


class Pairs(CaptionedImages):
    """Pictures of a teacher with their prompts, indexed by `(epoch, index)`.

    Each example has, beside "pixel_values", "caption" and "name", the "noise" that the picture was drawn from and its
    "latents", (C, h, w) float32.
    """

    def __init__(self, paths: list[Path], prompts: list[str], resolution: int):
        super().__init__(paths, list(map(str, paths)), prompts, resolution=resolution)
        self.paths = paths

    def __getitem__(self, key: tuple[int, int]) -> dict:
        return super().__getitem__(key) | self.tensors(key[1])

    def tensors(self, index: int) -> dict[str, Tensor]:
        """Return the noise and the latents of a pair; InputError."""
        path = latents_path(self.paths[self.rows[index]])
        try:
            tensors = load_file(path)
            return {name: tensors[name] for name in ("noise", "latents")}
        except (OSError, SafetensorError, KeyError) as error:
            raise InputError(f"{path} cannot be read ({first_line(error)}): delete it to draw it again") from error


def load_prompts(source: str, caption_template: str, trigger_word: str | None) -> list[str]:
    """Return the distinct prompts of a text file, one a line, or the captions of a folder of images; InputError."""
    if Path(source).is_dir():
        data = captioned_folder(source, caption_template=caption_template)
        prompts = [caption for row in data.rows for caption in data.captions[row]]
    else:
        prompts = read_prompts(source)
    return list(dict.fromkeys(with_trigger(prompt, trigger_word) for prompt in prompts))


def draw_pairs(
    accelerator: Accelerator,
    pipeline,
    folder: Path,
    prompts: list[str],
    count: int,
    batch_size: int,
    weights: dict[str, str],
    **settings,
) -> Pairs:
    """Return `count` pairs of `prompts`, in turn; those that `folder` lacks are drawn by the pipeline.

    Args:
        weights: the pipeline's `fingerprints`.
        settings: seed, resolution, num_inference_steps and guidance_scale, see `draw_prompts`.
    """
    numbered, settings = cycle_prompts(prompts, count), settings | {"with_latents": True}
    on_main(accelerator, lock_folder, folder)
    try:
        paths = draw_missing(accelerator, pipeline, folder, numbered, batch_size, settings, weights)
    except InputError as error:
        raise InputError(re.sub("`output_dir`", "`pairs_dir`", str(error))) from error
    pairs = Pairs(paths, [prompt for prompt, _ in numbered], settings["resolution"])
    if not all(pairs.tensors(index)["latents"].isfinite().all() for index in range(count)):
        raise InputError(f"{folder}: pictures of the teacher are not finite: use `mixed_precision` bf16")
    return pairs
