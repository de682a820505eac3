"""What bfloat16 does to the perceptual term: its value and its gradient beside those of float32.

    python -m benchmarks.precision

The demo's pipeline, a drawing of each class, timesteps within the gate, and a prediction that is off by a third of the
noise.
"""

import copy

import torch
from diffusers import AutoencoderTiny, DDPMScheduler
from torch import Tensor

from benchmarks.make_tiny_sd import SIZE, TINY_SD
from sketch_perceptual import PerceptualLoss
from sketch_perceptual.data.images import to_tensor
from sketch_perceptual.diffusion import Latents, predict_x0
from sketch_perceptual.drawings import CLASSES, STYLES, draw


def main() -> None:
    torch.manual_seed(0)
    scheduler = DDPMScheduler.from_pretrained(TINY_SD, subfolder="scheduler")
    vae = AutoencoderTiny.from_pretrained(TINY_SD, subfolder="vae", torch_dtype=torch.float32)
    drawings = [draw(name, 10_000, style=STYLES[n % 3], size=SIZE) for n, name in enumerate(CLASSES)]
    target = torch.stack(list(map(to_tensor, drawings)))
    with torch.no_grad():
        latents = Latents(vae).sample(Latents(vae).encode(target))
    noise, timesteps = torch.randn_like(latents), torch.randint(354, (len(latents),))
    noisy_latents = scheduler.add_noise(latents, noise, timesteps)
    model_pred = noise + 0.3 * torch.randn_like(noise)
    loss = PerceptualLoss(resolution=224).requires_grad_(False).eval()
    half_vae, half_loss = copy.deepcopy(vae), copy.deepcopy(loss).bfloat16()
    Latents(half_vae).cast_decoder(torch.bfloat16)

    def term(vae, loss, picture: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        prediction = model_pred.clone().requires_grad_()
        images = Latents(vae).decode(predict_x0(prediction, noisy_latents, timesteps, scheduler)).to(picture)
        values = loss(images, target.to(picture))
        (gradient,) = torch.autograd.grad(values.sum(), prediction)
        return values.detach(), gradient.flatten(1)

    value, gradient = term(vae, loss)
    arms = {
        "decoder and loss": term(half_vae, half_loss, torch.bfloat16),
        "decoder": term(half_vae, loss),
        "loss": term(vae, half_loss),
        "the decoded picture alone": term(vae, loss, torch.bfloat16),
    }
    print("| in bfloat16 | value, off by | cosine of the gradients, mean (least) |\n|---|---|---|")
    for name, (values, gradients) in arms.items():
        cosine = torch.cosine_similarity(gradient, gradients)
        off = ((values - value).abs() / value).mean()
        print(f"| {name} | {off:.1%} | {cosine.mean():.2f} ({cosine.min():.2f}) |")


if __name__ == "__main__":
    main()
