"""Images a second of train_backbone.py beside the float32 loop one would write first, in turns in one run.

    python -m benchmarks.backbone --train_data_dir drawings --resolution 64 --pool_after_attention --head linear \\
      --mixed_precision bf16 --torch_compile

Takes the options of train_backbone.py. Both train the same network on the same class folders, in batches of the same
size and with as many workers; the plain loop is torchvision's ImageFolder and transforms, and Adam as torch makes it.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import count, islice
from pathlib import Path

import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision import transforms
from torchvision.datasets import ImageFolder

import train_backbone
from sketch_perceptual.networks.backbone import AttentionVGG16

WARM_UP = 10  # steps that allocate and compile


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of each")
    parser.add_argument("--steps", type=int, default=40, help="measured steps of a turn")
    args, options = parser.parse_known_args()
    options = [*options, "--init_weights", "none", "--max_train_steps", str(WARM_UP + args.steps), "--seed", "0"]
    config = train_backbone.parse_args(options)
    plain, ours = [], []
    for turn in range(args.rounds):
        plain.append(plain_loop(config, args.steps))
        ours.append(trainer(options))
        print(
            f"turn {turn + 1}: plain loop {plain[-1]:.1f}, train_backbone.py {ours[-1]:.1f} images a second",
            flush=True,
        )
    ratios = [b / a for a, b in zip(plain, ours, strict=True)]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    print(
        f"{statistics.median(ratios):.2f} x, {min(ratios):.2f} to {max(ratios):.2f} in {args.rounds} turns, {device}"
    )


def plain_loop(config: argparse.Namespace, steps: int) -> float:
    """Images a second after the warm-up."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    augment = [
        transforms.RandomResizedCrop(config.resolution),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
    ]
    data = ImageFolder(
        config.train_data_dir, transforms.Compose([*augment, transforms.Normalize([0.5] * 3, [0.5] * 3)])
    )
    loader = torch.utils.data.DataLoader(
        data, config.train_batch_size, shuffle=True, drop_last=True, num_workers=config.dataloader_num_workers
    )
    network = AttentionVGG16(
        config.attention,
        config.pool_after_attention,
        len(data.classes),
        config.spatial_kernel,
        config.reduction,
        config.head,
    ).to(device)
    optimizer = torch.optim.Adam(network.parameters(), config.learning_rate)
    for step, (images, labels) in enumerate(islice((batch for _ in count() for batch in loader), WARM_UP + steps)):
        if step == WARM_UP:
            start = time.perf_counter()
        optimizer.zero_grad()
        loss = F.cross_entropy(network(images.to(device)), labels.to(device))
        loss.backward()
        optimizer.step()
        loss.item()
    return steps * config.train_batch_size / (time.perf_counter() - start)


def trainer(options: list[str]) -> float:
    """Images a second as the trainer itself logs them, the median after the warm-up."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, train_backbone.__file__, *options, "--output_dir", folder]
        command += ["--report_to", "tensorboard", "--logging_steps", "10"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        events = EventAccumulator(str(Path(folder, "logs", "sketch-backbone")))
        events.Reload()
        return statistics.median(event.value for event in events.Scalars("images_per_second") if event.step > WARM_UP)


if __name__ == "__main__":
    main()
