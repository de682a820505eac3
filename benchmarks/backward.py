"""The weight as a ratio of gradients beside a constant factor: what a step costs, in turns in one process.

    OMP_NUM_THREADS=1 python -m benchmarks.backward

On the demo's pipeline, batch 4, every row scored on a square of half the side. `balance` goes back through decoder and
backbone to the prediction and then on from there with the sum; a constant factor goes back once through it all. Prints
the mean ratio of the processor's seconds, with its 95 % interval over turns.
"""

import statistics
import time

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline

import train_lora_sketch
from sketch_perceptual import PerceptualLoss, PerceptualTerm
from sketch_perceptual.diffusion import balance
from sketch_perceptual.lora.adapter import Adapter
from tools.make_tiny_sd import SIZE, TINY_SD

TURNS, WARM_UP, ROWS = 40, 4, 4


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pipeline = StableDiffusionPipeline.from_pretrained(TINY_SD, safety_checker=None)
    noise_scheduler = DDPMScheduler.from_pretrained(TINY_SD, subfolder="scheduler")
    unet = pipeline.unet.requires_grad_(False).to(memory_format=torch.channels_last)
    pipeline.vae.to(memory_format=torch.channels_last)
    Adapter(pipeline, {"unet": train_lora_sketch.TARGETS["unet"]}, 0, r=32, lora_alpha=32)
    term = PerceptualTerm(PerceptualLoss(resolution=64), pipeline.vae, noise_scheduler, crop=SIZE // 2)
    images, latents = torch.rand(ROWS, 3, SIZE, SIZE) * 2 - 1, torch.randn(ROWS, 4, SIZE // 8, SIZE // 8)
    prompt_embeds = torch.randn(ROWS, 77, unet.config.cross_attention_dim)
    timesteps = torch.tensor([10, 100, 200, 300])

    def step(as_ratio: bool) -> float:
        noise = torch.randn_like(latents)
        noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
        start = time.process_time()
        model_pred = unet(noisy_latents, timesteps, prompt_embeds, return_dict=False)[0]
        loss = (model_pred - noise).square().mean()
        values = term(model_pred, noisy_latents, timesteps, images)
        loss = balance(loss, values, model_pred, 0.1)[0] if as_ratio else loss + 0.1 * values.mean()
        loss.backward()
        unet.zero_grad()
        return time.process_time() - start

    ratios = []
    for turn in range(WARM_UP + TURNS):
        seconds = {as_ratio: step(as_ratio) for as_ratio in ((True, False) if turn % 2 else (False, True))}
        ratios.append(seconds[True] / seconds[False])
    ratios = ratios[WARM_UP:]
    half = 1.96 * statistics.stdev(ratios) / len(ratios) ** 0.5
    print(f"{statistics.fmean(ratios):.3f} +- {half:.3f} of a step with a constant factor")


if __name__ == "__main__":
    main()
