"""Pictures of the validation prompts, generated during and after training."""

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.logging import get_logger
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..cli.arguments import Options, Parser, at_least, size
from ..cli.interruption import interruptible
from ..data.datasets import CaptionedImages
from ..data.images import to_pil
from ..diffusion import Latents
from ..errors import InputError, first_line
from ..figures import image_grid
from ..files import replacing
from ..measures.ink import chroma, ink
from ..measures.strokes import describe_strokes
from ..training.run import Run
from ..training.steps import Steps
from ..training.trackers import track_images
from .pictures import some_drawings

logger = get_logger(__name__, log_level="INFO")

BEFORE_AFTER = "before_after.png"


def add_validation_options(parser: Parser) -> None:
    """Add the options of `Validation`."""
    add = parser.group("validation")
    add(
        "--validation_prompt",
        shared=False,
        nargs="+",
        metavar="PROMPT",
        help="prompts to generate from during training and at its end",
    )
    add(
        "--num_validation_images",
        shared=False,
        type=at_least(0),
        default=4,
        help="number of images per prompt",
    )
    add(
        "--validation_size",
        shared=False,
        type=size,
        metavar="WIDTHxHEIGHT",
        help="size of these images; default: a square of --resolution",
    )
    add("--validation_epochs", shared=False, type=at_least(1), default=1, help="generate them every N epochs")


def check_validation_size(size: tuple[int, int] | None, pipeline) -> None:
    """InputError for a size that the pipeline cannot generate."""
    factor = max(8, pipeline.vae_scale_factor)  # pipelines ask for multiples of 8 also where a latent is smaller
    if size and any(side < 1 or side % factor for side in size):
        raise InputError(f"`validation_size` must be two multiples of {factor}")


class Validation:
    """Generates pictures of the validation prompts.

    Args:
        pipeline: of diffusers, with the adapter; its scheduler draws them.
        embed: prompts -> their embeddings.
        num_inference_steps, guidance_scale: of the pipeline; no guidance up to 1.
    """

    def __init__(
        self,
        args: Options,
        run: Run,
        pipeline,
        embed: Callable[[list[str]], Tensor],
        *,
        num_inference_steps: int = 30,
        guidance_scale: float = 7.5,
    ):
        self.run, self.pipeline, self.embed = run, pipeline, embed
        self.num_inference_steps, self.guidance_scale = num_inference_steps, guidance_scale
        self.folder, self.every = Path(args.output_dir), args.validation_epochs
        self.count = args.num_validation_images
        self.prompts: list[str] = (args.validation_prompt or []) if self.count else []
        self.width, self.height = args.validation_size or (args.resolution, args.resolution)

    def summary(self, steps: Steps, images_per_step: int) -> str | None:
        """Return the number of pictures of the run, and their share of its work; None without pictures."""
        if not self.prompts:
            return None
        pictures = len(self.prompts) * self.count
        during, at_end = pictures * (steps.epochs // self.every), 2 * pictures
        sampling = (during + at_end) * self.num_inference_steps * (2 if self.guidance_scale > 1 else 1)
        training = 3 * steps.total * images_per_step  # backward counts twice
        advice = "; a larger --validation_epochs makes it less" if sampling > training and during else ""
        share = sampling / (sampling + training)
        return f"pictures: {during} during the run and {at_end} at its end, about {share:.0%} of the work{advice}"

    def end_epoch(self) -> None:
        """Write and track the pictures, if they are due after this epoch."""
        if not (self.prompts and self.run.steps.epoch % self.every == 0):
            return
        with interruptible():  # Ctrl-C does not wait for pictures
            if self.run.accelerator.is_main_process:
                with optional("validation images"):
                    images, step = self.generate(), self.run.steps.done
                    with replacing(self.folder / "validation") as folder:
                        image_grid(images).save(folder / f"step-{step:06d}.png")
                    track_images(self.run.accelerator, "validation", images, step)

    def before_and_after(self) -> list[Image.Image]:
        """Write BEFORE_AFTER, pictures without and with the adapter; return those with it."""
        if not self.prompts:
            return []
        after = self.generate()
        self.pipeline.disable_lora()
        before = self.generate()
        self.pipeline.enable_lora()
        return self.write({"before": before, "after": after})

    def write(self, columns: dict[str, dict[str, list[Image.Image]]]) -> list[Image.Image]:
        """Write BEFORE_AFTER, pictures by column and prompt; track and return those of the last column."""
        heads = [head for head in columns for _ in range(self.count)]
        rows = {prompt: [x for pictures in columns.values() for x in pictures[prompt]] for prompt in self.prompts}
        with replacing(self.folder) as folder:
            image_grid(rows, heads).save(folder / BEFORE_AFTER)
        last = list(columns.values())[-1]
        track_images(self.run.accelerator, "test", last, self.run.steps.done)
        return [picture for row in last.values() for picture in row]

    @torch.no_grad()
    def generate(self) -> dict[str, list[Image.Image]]:
        """Generate pictures by prompt; the models' modes and the random state stay as they were."""
        unet, was_training = self.pipeline.unet, self.pipeline.unet.training
        unet.eval()
        size = {"height": self.height, "width": self.width}
        images, latents_of = {}, Latents(self.pipeline.vae)
        try:
            bar = tqdm(desc="Pictures", total=len(self.prompts) * self.count, leave=False, disable=None)
            with torch.random.fork_rng(), self.run.accelerator.autocast(), bar:
                for prompt in self.prompts:
                    embeds = {"prompt_embeds": self.embed([prompt]), "negative_prompt_embeds": self.embed([""])}
                    images[prompt] = []
                    for number in range(self.count):
                        rng = torch.Generator().manual_seed(self.run.seed + number)
                        latents = self.pipeline(
                            **embeds,
                            num_inference_steps=self.num_inference_steps,
                            guidance_scale=self.guidance_scale,
                            generator=rng,
                            output_type="latent",
                            **size,
                        ).images
                        images[prompt].append(to_pil(latents_of.decode(latents)[0]))
                        bar.update()
        finally:
            unet.train(was_training)
        return images


@contextmanager
def optional(what: str):
    """Log an error of the block, such as too little memory or a full disk, instead of ending the training.

    ImportError too: transformers 5.24 loads adapters of text encoders only with PEFT 0.19 and newer.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError, ImportError, InputError) as error:
        logger.warning(f"no {what}: {first_line(error)}")
        torch.cuda.empty_cache()


def compare_looks(data: CaptionedImages, pictures: list[Image.Image]) -> None:
    """Log strokes and paper of the LoRA's pictures beside those of its drawings; warn where they differ widely."""
    if not pictures:
        return
    drawings = some_drawings(data)
    (drawn_ink, ink_now), (drawn_chroma, chroma_now) = (
        [sum(map(tone, images)) / len(images) for images in (drawings, pictures)] for tone in (ink, chroma)
    )
    logger.info(f"your drawings: {describe_strokes(drawings)}\nthe LoRA's pictures: {describe_strokes(pictures)}")
    if ink_now < drawn_ink / 3:
        logger.warning("the LoRA's pictures are nearly blank: train longer, or raise `learning_rate`")
    elif ink_now > 3 * drawn_ink:
        logger.warning("the LoRA's pictures are far darker than the drawings: train longer, or lower `learning_rate`")
    if chroma_now > drawn_chroma + 0.1:
        logger.warning("the LoRA's pictures have more colour than the drawings: train longer, or raise `noise_offset`")
