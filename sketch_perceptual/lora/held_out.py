"""Losses on images that are not trained on."""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data.datasets import CaptionedImages
from ..diffusion import Latents
from ..seeds import generator
from ..training.run import Run
from .samples import Losses, Sample

TIMESTEPS = 4  # of each image, in quarters of the schedule


class HeldOut:
    """Losses on held-out images, at fixed timesteps, noise and squares.

    They fall while the model learns to draw, and rise when it memorises its images.

    Args:
        data: the images, which are encoded now, so that the encoder can be unloaded; None to measure nothing.
        with_images: True if the losses need the images, not only their latents.
    """

    def __init__(self, data: CaptionedImages | None, latents: Latents, seed: int, *, with_images: bool):
        self.data, self.seed = data, seed
        self.latents: list[Tensor] = []
        if data is not None:
            for index in tqdm(range(len(data)), "Held-out images", leave=False, disable=None):
                self.latents.append(_encode(latents, data.pixels(index)))
            data.with_pixels = with_images

    def measure(
        self,
        run: Run,
        model: nn.Module,
        score: Callable[[Sample, torch.Generator], Losses],
        embed: Callable[[list[str]], Tensor],
        num_train_timesteps: int,
    ) -> None:
        """Log the current losses of `model` and keep them in the run; the processes share the images."""
        history = run.state.setdefault("held_out", [])
        if self.data is None or (history and history[-1]["step"] == run.steps.done):
            return
        accelerator, was_training = run.accelerator, model.training
        model.eval()
        with torch.no_grad(), accelerator.autocast():
            sums = torch.zeros(3, device=accelerator.device)
            for index in _share(len(self.data), accelerator):
                rng = generator(self.seed, "held out", index)
                losses = score(self._sample(index, rng, embed, num_train_timesteps).to(accelerator.device), rng)
                sums = sums + torch.stack([x.sum() for x in (losses.denoising, losses.perceptual, losses.gated)])
        model.train(was_training)
        denoising, perceptual, gated = accelerator.reduce(sums, "sum").tolist()
        record: dict[str, float | None] = {"denoising_loss": denoising / (TIMESTEPS * len(self.data))}
        record["perceptual_loss"] = perceptual / gated if gated else None
        history.append({"step": run.steps.done} | record)
        run.log({f"held_out_{name}": value for name, value in record.items() if value is not None})

    def _sample(self, index: int, rng: torch.Generator, embed, num_train_timesteps: int) -> Sample:
        """Return a sample of one image at TIMESTEPS timesteps."""
        shares = (torch.arange(TIMESTEPS) + torch.rand(TIMESTEPS, generator=rng)) / TIMESTEPS
        latents = self.latents[index].expand(TIMESTEPS, -1, -1, -1)
        noise = torch.randn(latents.shape, generator=rng)
        assert self.data is not None
        example = self.data[0, index]
        images, masks = (
            example[name].expand(TIMESTEPS, -1, -1, -1) if name in example else None
            for name in ("pixel_values", "mask")
        )
        timesteps = (shares * num_train_timesteps).long()
        return Sample(latents, noise, timesteps, embed([example["caption"]] * TIMESTEPS), images, masks)


@torch.no_grad()
def _encode(latents: Latents, pixels: Tensor) -> Tensor:
    return latents.mean(latents.encode(pixels[None].to(latents.vae.device)).float().cpu())


def _share(count: int, accelerator: Accelerator):
    mine = range(accelerator.process_index, count, accelerator.num_processes)
    return tqdm(mine, "Held-out losses", leave=False, disable=None if accelerator.is_main_process else True)
