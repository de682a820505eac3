"""Class distances beside the loop over pairs that one would write first, in turns in one run.

    python -m benchmarks.distances

The loop takes a drawing at a time, with `torch.nn.functional.cosine_similarity` against all that come after it. Then
the time for as many drawings as ImageNet-Sketch has.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sketch_perceptual.measures.class_distances import class_distances


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each")
    parser.add_argument("--drawings", type=int, default=5000)
    parser.add_argument("--dim", type=int, default=512)
    args = parser.parse_args()
    torch.manual_seed(0)
    embeddings, labels = draw(args.drawings, args.dim)
    ratios = []
    for turn in range(args.rounds):
        slow, (intra, inter) = timed(pair_loop, embeddings, labels)
        quick, found = timed(class_distances, embeddings, labels)
        ratios.append(slow / quick)
        gap = max(abs(found.intra - intra), abs(found.inter - inter))
        print(f"turn {turn + 1}: pair loop {slow:.2f} s, class_distances {quick:.4f} s, differing by {gap:.0e}")
    print(f"{args.drawings} x {args.dim}: {statistics.median(ratios):.0f} x, {min(ratios):.0f} to {max(ratios):.0f}")
    seconds, _ = timed(class_distances, *draw(50_889, args.dim))
    print(f"50,889 x {args.dim}: {seconds:.2f} s, {torch.get_num_threads()} CPU threads")


def draw(drawings: int, dim: int) -> tuple[Tensor, Tensor]:
    labels = torch.arange(drawings) % 1000
    return torch.randn(1000, dim)[labels] + torch.randn(drawings, dim), labels


def timed(function: Callable, *arguments) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def pair_loop(embeddings: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean cosine distance within and across classes, in double precision."""
    embeddings = embeddings.double()
    sums, counts = [0.0, 0.0], [0, 0]
    for row in range(len(labels) - 1):
        distances = 1 - F.cosine_similarity(embeddings[row], embeddings[row + 1 :])
        same = labels[row + 1 :] == labels[row]
        for side, chosen in enumerate((distances[same], distances[~same])):
            sums[side] += float(chosen.sum())
            counts[side] += len(chosen)
    return sums[0] / counts[0], sums[1] / counts[1]


if __name__ == "__main__":
    main()
