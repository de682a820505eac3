"""Backbones for the losses that are tested here, and images."""

import torch
from safetensors.torch import save_file

from sketch_perceptual.networks.backbone import AttentionVGG16


def make_sources(folder):
    """What `backbone` is for each loss: a tuned folder, plain VGG-16 weights, nothing."""
    torch.manual_seed(0)
    AttentionVGG16(pool_after_attention=True, num_classes=0).save_pretrained(folder / "tuned")
    plain = AttentionVGG16("none", num_classes=0)
    plain.save_pretrained(folder / "plain")
    save_file(plain.state_dict(), folder / "trunk.safetensors")
    trunk, tuned = str(folder / "trunk.safetensors"), str(folder / "tuned")
    sources = {"vgg": trunk, "lpips": trunk, "pixel": None, "tone": None, "folder": folder}
    return dict.fromkeys(("attention_vgg", "gram", "paper_l1"), tuned) | sources


def images(seed=0, size=64, n=2):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1
