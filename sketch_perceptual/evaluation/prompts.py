"""Pictures for prompts, drawn once and kept, and what prompts and pictures say of themselves."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path

import torch

from ..data.class_names import readable_class
from ..data.images import to_pil
from ..diffusion import decode
from ..errors import InputError
from ..seeds import generator

METADATA, SETTINGS = "metadata.jsonl", ".settings.json"


def read_prompts(path: str | Path) -> list[str]:
    """The lines of a text file that are not blank. InputError."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompts {path} cannot be read: {error}") from error
    if not (prompts := [line.strip() for line in lines if line.strip()]):
        raise InputError(f"--prompts {path} holds no prompts")
    return prompts


def cycle_prompts(prompts: Sequence[str], count: int) -> list[tuple[str, int]]:
    """`count` prompts, over and over, each with how often it came before."""
    before = Counter()
    found = []
    for prompt in islice(cycle(prompts), count):
        found.append((prompt, before[prompt]))
        before[prompt] += 1
    return found


def open_folder(folder: Path, prompts: Sequence[tuple[str, int]], settings: dict) -> list[Path]:
    """Where the picture of each prompt goes, `00000.png` and so on, in a folder that `captioned_folder` reads.

    What is there stays if it was drawn with the same settings and prompts; InputError if not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    saved = _read(folder / SETTINGS, json.loads) or settings
    for name in saved | settings:
        if (old := saved.get(name)) != (new := settings.get(name)):
            raise InputError(f"{folder} was drawn with {name}={old}, now it is {new}: choose another --output_dir")
    lines = _read(folder / METADATA, str.splitlines) or []
    for line, (prompt, _) in zip(lines, prompts, strict=False):
        if (old := json.loads(line)["text"]) != prompt:
            raise InputError(
                f"{folder} has a picture of {old!r} where {prompt!r} belongs: choose another --output_dir"
            )
    paths = [folder / f"{index:05}.png" for index in range(len(prompts))]
    for path, (prompt, _) in list(zip(paths, prompts, strict=True))[len(lines) :]:
        lines.append(json.dumps({"file_name": path.name, "text": prompt}))
    for name, text in ((METADATA, "\n".join(lines) + "\n"), (SETTINGS, json.dumps(settings, indent=1))):
        partial = folder / f".{name}"
        partial.write_text(text, encoding="utf-8")
        partial.rename(folder / name)
    return paths


@torch.no_grad()
def draw_prompts(
    pipeline,
    prompts: Sequence[tuple[str, int]],
    paths: Sequence[Path],
    *,
    seed: int,
    resolution: int,
    num_inference_steps: int,
    guidance_scale: float,
) -> None:
    """One batch of pictures by a `StableDiffusionPipeline`, each written aside and renamed.

    The noise of each follows from the seed, the prompt and how often that came before, whatever else is in the batch.
    A picture that is not finite, or that the pipeline's safety checker flags, is written black.
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
    images = decode(pipeline.vae, latents).float()
    images[~images.isfinite().flatten(1).all(1)] = -1
    if pipeline.safety_checker is not None:
        levels = (images.clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1).cpu().numpy()
        _, flagged = pipeline.run_safety_checker(levels, pipeline._execution_device, latents.dtype)
        images[torch.tensor(flagged)] = -1
    for image, path in zip(images, paths, strict=True):
        partial = path.with_name(f".{path.name}")
        to_pil(image).save(partial, "PNG")
        partial.rename(path)


def find_classes(prompts: Sequence[str], classes: Sequence[str]) -> Iterator[set[int]]:
    """For each prompt the class that it names, of several the longest, as it is read: "hot dog" of "hot_dog".

    A set, since two classes may read alike; empty where no class is named.
    """
    readings: dict[str, set[int]] = {}
    for index, name in enumerate(classes):
        readings.setdefault(readable_class(name).casefold(), set()).add(index)
    names = sorted(readings, key=len, reverse=True)
    pattern = re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, names)) + r")(?!\w)")
    for prompt in prompts:
        found = pattern.findall(prompt.casefold())
        yield readings[max(found, key=len)] if found else set()


def _read(path: Path, parse):
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): choose another --output_dir") from error
