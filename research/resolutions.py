"""Measure at each resolution how often a backbone finds the same thing by another hand, and what that costs.

    python -m research.resolutions --dataset_name concepts
    python -m research.resolutions --dataset_name wide --unknown_to concepts

For each drawing its nearest neighbour among those by other hands, copies left out; right is the same thing. Of the
first data set only the hands that `train_backbone.py --group_column set` keeps apart; with --unknown_to things that
share no word with that data set. Intervals are of things drawn again, 1,000 times; seconds are of the CPU.
"""

import argparse
import random
import time
from collections import defaultdict

import datasets
import torch
from torch import Tensor

from sketch_perceptual import load_embedder
from sketch_perceptual.networks.backbone import BUNDLED
from sketch_perceptual.networks.embedder import SketchEmbedder
from tools.triplets import Labelled, load_labelled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=str(BUNDLED))
    add("--dataset_name", required=True, help="drawings of things by hands: columns image, label, set")
    add("--unknown_to", help="only things that share no word with this data set")
    add("--resolutions", nargs="+", type=int, default=[64, 96, 112, 160, 224])
    add("--drawings", type=int, default=800, help="number of drawings, as many as can be of each thing")
    args = parser.parse_args()
    data = load_labelled(args.dataset_name)
    data = data.select(unknown(data, args.unknown_to) if args.unknown_to else data.sides()[1])
    data = data.select(sample(data, args.drawings))
    print(f"{len(data.things)} drawings of {len(set(data.things))} things by {len(set(data.hands))} hands", flush=True)
    base: Tensor | None = None
    for resolution in args.resolutions:
        embedder = load_embedder(args.model, resolution=resolution)
        start = time.process_time()
        vectors = embed(embedder, data)
        seconds = (time.process_time() - start) / len(data.things)
        right = nearest_is_right(vectors, data)
        base = right if base is None else base
        print(
            f"{resolution:4} px  {interval(right, data)}  minus the first {interval(right - base, data)}"
            f"  {1000 * seconds:.0f} ms a drawing",
            flush=True,
        )


def unknown(data: Labelled, name: str) -> list[int]:
    feature = datasets.load_dataset(name, split="train").features["label"]
    words = {word.removesuffix("s") for thing in feature.names for word in thing.split("-")}
    return [i for i, t in enumerate(data.things) if not {word.removesuffix("s") for word in t.split("-")} & words]


def sample(data: Labelled, count: int) -> list[int]:
    """Positions of all drawings of things at random, until there are `count`."""
    rows = defaultdict(list)
    for index, thing in enumerate(data.things):
        rows[thing].append(index)
    things = sorted(thing for thing, indices in rows.items() if len({data.hands[i] for i in indices}) > 1)
    random.Random(0).shuffle(things)
    return [index for thing in things for index in rows[thing]][:count]


@torch.inference_mode()
def embed(embedder: SketchEmbedder, data: Labelled) -> Tensor:
    return embedder.embed(data.images)


def nearest_is_right(vectors: Tensor, data: Labelled) -> Tensor:
    """(N,): 1 where the nearest neighbour by another hand shows the same thing; NaN where no other hand drew it."""
    hands, copies, things = (codes(column) for column in (data.hands, data.copies, data.things))
    apart = (hands[:, None] != hands) & (copies[:, None] != copies)
    right = things[:, None] == things
    nearest = (vectors @ vectors.T).masked_fill(~apart, -2).argmax(1)
    scores = right[torch.arange(len(things)), nearest].float()
    return scores.masked_fill(~(apart & right).any(1), torch.nan)


def codes(column: list) -> Tensor:
    numbers = {value: number for number, value in enumerate(sorted(set(column)))}
    return torch.tensor([numbers[value] for value in column])


def interval(scores: Tensor, data: Labelled) -> str:
    things = codes(data.things)
    counted = ~scores.isnan()
    sums, counts = (
        torch.zeros(int(things.max()) + 1).index_add(0, things[counted], x[counted])
        for x in (scores, torch.ones_like(scores))
    )
    draws = torch.randint(len(sums), (1000, len(sums)), generator=torch.Generator().manual_seed(0))
    means = (sums[draws].sum(1) / counts[draws].sum(1)).sort().values
    return f"{100 * sums.sum() / counts.sum():.1f} % ({100 * means[25]:.1f} to {100 * means[974]:.1f})"


if __name__ == "__main__":
    main()
