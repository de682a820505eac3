"""Memory that a step at SD-1.5's size needs at the least at 512 px, counted from shapes alone: nothing is computed.

    python -m benchmarks.memory

Frozen weights, and what the forward passes keep for the backward one: of the U-Net in bfloat16, and of decoder and
backbone for the scored square of one row, in float32. The VAE's encoder and the text encoder are gone, as both caches
leave it.
"""

from functools import partial

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn

from benchmarks.losses import kept
from benchmarks.step import UNET, VAE
from sketch_perceptual import PerceptualLoss
from sketch_perceptual.losses import named_networks
from sketch_perceptual.networks.backbone import AttentionVGG16
from train_lora_sketch import TARGETS

SIDE, RANK = 512, 4


class FusedAttention(torch.autograd.Function):
    """What flash attention keeps; shapes alone would be computed as matrices of all pairs, which a GPU never holds."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out)
        return out


def main() -> None:
    torch.set_default_device("meta")
    F.scaled_dot_product_attention = lambda query, key, value, **_: FusedAttention.apply(query, key, value)
    torch.set_default_dtype(torch.bfloat16)
    for batch_size in (1, 4):
        for checkpointing in (False, True):
            unet = UNet2DConditionModel(**UNET).requires_grad_(False).train()
            unet.add_adapter(LoraConfig(r=RANK, target_modules=TARGETS["unet"]))
            name = f"U-Net, batch {batch_size}"
            if checkpointing:
                unet.enable_gradient_checkpointing()
                name += ", gradient checkpointing"
            latents, text = torch.randn(batch_size, 4, SIDE // 8, SIDE // 8), torch.randn(batch_size, 77, 768)
            show(name, unet, kept(partial(unet, latents, torch.zeros(batch_size), text), unet))
    torch.set_default_dtype(torch.float32)
    for side in (SIDE, SIDE // 2):
        latents = torch.randn(1, 4, side // 8, side // 8, requires_grad=True)
        vae, tiny = AutoencoderKL(**VAE).requires_grad_(False), AutoencoderTiny().requires_grad_(False)
        show(f"decoder, {side} px", vae.decoder, kept(partial(vae.decode, latents), vae))
        vae.enable_gradient_checkpointing()
        name = f"decoder, {side} px, gradient checkpointing"
        show(name, vae.decoder, kept(partial(vae.decode, latents), vae))
        show(f"AutoencoderTiny, {side} px", tiny.decoder, kept(partial(tiny.decode, latents), tiny))
    images = torch.randn(1, 3, 224, 224, requires_grad=True)
    for name, pools in {"pools kept": True, "the paper's": False}.items():
        loss = PerceptualLoss(AttentionVGG16(pool_after_attention=pools, num_classes=0, last_layer="relu4_3"))
        show(f"attention-VGG, {name}, 224 px", loss, kept(partial(loss.compare, images, images), loss))


def show(name: str, module: nn.Module, found: int) -> None:
    weights = sum(p.nbytes for _, part in named_networks(module) for p in part.parameters(recurse=False))
    print(f"| {name} | {weights / 1e9:.2f} | {found / 1e9:.2f} |")


if __name__ == "__main__":
    main()
