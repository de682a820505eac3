"""A judge of pictures of the embedded things that shares nothing with the losses.

    python -m research.judge --output judge.safetensors

trains `Judge`, a small classifier, from scratch on embedded drawings that are moved, turned, blurred, noisy and in
part erased, and prints how many unseen drawings of each style it names.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.transforms import v2

from sketch_perceptual import to_tensor
from sketch_perceptual.drawings import CLASSES, STYLES, draw

SIZE = 64
SEED = 1_000  # of the drawings that it learns from; data sets of LoRAs have other seeds


class Judge(nn.Module):
    """Drawings (B, 3, 64, 64) in [-1, 1] -> logits (B, 16); `features` are what the last layer sees, (B, 128)."""

    def __init__(self):
        super().__init__()
        widths, layers = (32, 64, 128, 128), []
        for before, width in zip((3, *widths), widths, strict=False):
            for channels in (before, width):
                layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
        self.layers = nn.Sequential(*layers)
        self.classifier = nn.Linear(widths[-1], len(CLASSES))

    def features(self, images: Tensor) -> Tensor:
        return self.layers(images).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))


def load_judge(path: str | Path) -> Judge:
    judge = Judge()
    judge.load_state_dict(load_file(path))
    return judge.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def drawings(per_class: int, seed: int, styles: tuple[str, ...] = STYLES) -> tuple[Tensor, Tensor]:
    """`per_class` embedded drawings of each class, in turns of the styles, and their classes."""
    images = [
        to_tensor(draw(name, index, seed, styles[index % len(styles)], SIZE))
        for name in CLASSES
        for index in range(per_class)
    ]
    return torch.stack(images), torch.arange(len(CLASSES)).repeat_interleave(per_class)


def train(path: str | Path, images: Tensor, labels: Tensor, epochs: int) -> Judge:
    """Writes a judge of these drawings, (N, 3, 64, 64), to a .safetensors file."""
    judge = Judge()
    augment = v2.Compose(
        [
            v2.RandomAffine(15, (0.1, 0.1), (0.8, 1.15), 5, v2.InterpolationMode.BILINEAR, fill=1),
            v2.RandomApply([v2.GaussianBlur(5, (0.2, 1.2))], 0.5),
            v2.RandomErasing(0.5, (0.02, 0.15), value=1),
        ]
    )
    judge.train().to(memory_format=torch.channels_last)
    steps = epochs * (len(images) // 64)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(images))[: len(images) // 64 * 64].view(-1, 64):
            batch = torch.stack([augment(image) for image in images[rows]])
            batch += torch.rand(64, 1, 1, 1) * 0.2 * torch.randn_like(batch)
            loss = F.cross_entropy(judge(batch.contiguous(memory_format=torch.channels_last)), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"loss {loss.item():.3f}", flush=True)
    save_file({name: weight.contiguous() for name, weight in judge.state_dict().items()}, path)
    return load_judge(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="a .safetensors file")
    parser.add_argument("--per_class", type=int, default=250, help="drawings to learn from")
    parser.add_argument("--epochs", type=int, default=6)
    args = parser.parse_args()
    torch.manual_seed(0)
    judge = train(args.output, *drawings(args.per_class, SEED), args.epochs)
    for style in STYLES:
        images, labels = drawings(20, SEED + 1, (style,))
        right = judge(images).argmax(1) == labels
        print(f"{style}: {right.float().mean():.1%} of {len(labels)} unseen drawings named")


if __name__ == "__main__":
    main()
