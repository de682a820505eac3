"""How hard the perceptual term pulls at the prediction beside the denoising loss, at weight 1.

    python -m benchmarks.pull

The demo's pipeline before training, a drawing of each class. For each loss and timestep: the ratio of the gradients'
lengths (median over rows), their mean cosine, and the loss itself.
"""

import argparse
from collections.abc import Callable

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline

from benchmarks.make_tiny_sd import SIZE, TINY_SD
from sketch_perceptual import PerceptualLoss, PerceptualTerm, to_tensor
from sketch_perceptual.diffusion import Latents
from sketch_perceptual.drawings import CLASSES, draw
from sketch_perceptual.losses import PixelLoss

TIMESTEPS = (20, 100, 200, 353)
LOSSES: dict[str, Callable] = {
    "default": PerceptualLoss,
    "equal layers": lambda: PerceptualLoss(layer_weights=[1, 1, 1, 1]),
    "pixel": PixelLoss,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crop", type=int, default=SIZE // 2, help="side of the square that is scored")
    args = parser.parse_args()
    pipeline = StableDiffusionPipeline.from_pretrained(TINY_SD, safety_checker=None)
    scheduler = DDPMScheduler.from_pretrained(TINY_SD, subfolder="scheduler")
    images = torch.stack([to_tensor(draw(name, 0, size=SIZE)) for name in CLASSES])
    with torch.no_grad():
        embeds = pipeline.encode_prompt([f"a sketch of a {name}" for name in CLASSES], "cpu", 1, False)[0]
        latents = Latents(pipeline.vae).sample(Latents(pipeline.vae).encode(images))
    terms = {name: PerceptualTerm(make(), pipeline.vae, scheduler, crop=args.crop) for name, make in LOSSES.items()}
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    print("| loss | t | ratio | cosine | value |\n|---|---|---|---|---|")
    for t in TIMESTEPS:
        timesteps = torch.full((len(latents),), t)
        noisy_latents = scheduler.add_noise(latents, noise, timesteps)
        with torch.no_grad():
            model_pred = pipeline.unet(noisy_latents, timesteps, embeds).sample
        model_pred.requires_grad_()
        denoising = (model_pred - noise).square().flatten(1).mean(1)
        (other,) = torch.autograd.grad(denoising.sum(), model_pred)
        for name, term in terms.items():
            draws = torch.Generator().manual_seed(2)
            value = term(model_pred, noisy_latents, timesteps, images, generator=draws)
            (own,) = torch.autograd.grad(value.sum(), model_pred)
            ratio = (own.flatten(1).norm(dim=1) / other.flatten(1).norm(dim=1)).median()
            cosine = torch.cosine_similarity(own.flatten(1), other.flatten(1)).mean()
            print(f"| {name} | {t} | {ratio:.2f} | {cosine:.2f} | {value.mean():.2f} |")


if __name__ == "__main__":
    main()
