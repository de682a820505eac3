"""Features and rankings beside what one would write first, in turns in one run.

    python -m sketch_perceptual.drawings --output_dir drawings --per_class 32 --size 256
    python -m benchmarks.retrieval --train_data_dir drawings

Features: what the evaluation fills its cache with, against a loop over torchvision's ImageFolder through the same
network. Ranking: `rank` against a loop over queries with `argsort`, and against torchmetrics' average precision. One
query: `search` against FAISS's flat index, which was filled before.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial

import faiss
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor
from torchmetrics.functional.retrieval import retrieval_average_precision
from torchvision import transforms
from torchvision.datasets import ImageFolder

from sketch_perceptual.data.labels import labelled_folder
from sketch_perceptual.measures.ranking import rank, search
from sketch_perceptual.networks.backbone import AttentionVGG16
from sketch_perceptual.networks.embedder import make_embedder
from sketch_perceptual.training.feature_cache import extract_features

BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_data_dir", required=True, help="one folder a class")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each")
    parser.add_argument("--dataloader_num_workers", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(0)
    network = AttentionVGG16("none", num_classes=0).eval()
    plain, ours = partial(image_folder_loop, args, network), partial(cached, args, network)
    beside("features: ImageFolder loop, extract_features", plain, ours, args.rounds)

    labels, embeddings = torch.arange(7445) % 163, torch.randn(163, 512)
    drawings = embeddings[labels] + 3 * torch.randn(7445, 512)
    sets = drawings[:830], drawings[830:], labels[:830], labels[830:]
    beside("830 x 6615: loop over queries, rank", partial(loop, *sets), partial(ranked, *sets), args.rounds)
    beside("830 x 6615: torchmetrics, rank", partial(torchmetrics_loop, *sets), partial(ranked, *sets), args.rounds)

    gallery = F.normalize(torch.randn(50_889, 512))
    index = faiss.IndexFlatIP(512)
    index.add(gallery.numpy())
    beside("one query in 50,889: FAISS, search", partial(flat, index, gallery), partial(found, gallery), args.rounds)
    start = time.perf_counter()
    rank(gallery[:5_089], gallery[5_089:], [row % 1000 for row in range(5_089)], [row % 1000 for row in range(45_800)])
    print(f"rank, 5,089 x 45,800: {time.perf_counter() - start:.1f} s, {torch.get_num_threads()} CPU threads")


def beside(name: str, theirs: Callable, ours: Callable, rounds: int) -> None:
    ratios, seconds = [], []
    for _ in range(rounds):
        times, values = [], []
        for function in (theirs, ours):
            start = time.perf_counter()
            values.append(function())
            times.append(time.perf_counter() - start)
        ratios.append(times[0] / times[1])
        seconds.append(times)
        torch.testing.assert_close(torch.as_tensor(values[1]).float(), torch.as_tensor(values[0]).float())
    medians = " and ".join(f"{statistics.median(side):.3f} s" for side in zip(*seconds, strict=True))
    print(f"{name}: {medians}, {statistics.median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)


@torch.inference_mode()
def image_folder_loop(args: argparse.Namespace, network: AttentionVGG16) -> Tensor:
    steps = [
        transforms.Resize(args.resolution, transforms.InterpolationMode.LANCZOS),
        transforms.CenterCrop(args.resolution),
        transforms.ToTensor(),
    ]
    data = ImageFolder(args.train_data_dir, transforms.Compose([*steps, transforms.Normalize([0.5] * 3, [0.5] * 3)]))
    loader = torch.utils.data.DataLoader(data, BATCH, num_workers=args.dataloader_num_workers)
    return torch.cat([network.last_map(images).mean((2, 3)) for images, _ in loader]).mean(0)


def cached(args: argparse.Namespace, network: AttentionVGG16) -> Tensor:
    data = labelled_folder(args.train_data_dir)
    with tempfile.TemporaryDirectory() as folder:
        embedder = make_embedder(network, resolution=args.resolution, fit="crop")
        keys = list(map(str, range(len(data))))
        workers = args.dataloader_num_workers
        features = extract_features(Accelerator(), folder, embedder, data, keys, batch_size=BATCH, num_workers=workers)
        return torch.cat([rows for _, rows in features.parts(keys)]).mean(0)


def loop(queries: Tensor, gallery: Tensor, own: Tensor, other: Tensor) -> float:
    queries, gallery, precisions = F.normalize(queries), F.normalize(gallery), []
    for query, label in zip(queries, own, strict=True):
        hits = (other == label)[(gallery @ query).argsort(descending=True)]
        places = hits.nonzero().flatten() + 1
        precisions.append((torch.arange(1, len(places) + 1) / places).mean())
    return float(torch.stack(precisions).mean())


def ranked(queries: Tensor, gallery: Tensor, own: Tensor, other: Tensor) -> float:
    return rank(queries, gallery, own.tolist(), other.tolist()).scores["map"]


def torchmetrics_loop(queries: Tensor, gallery: Tensor, own: Tensor, other: Tensor) -> float:
    similarities = F.normalize(queries) @ F.normalize(gallery).T + 2  # it leaves out what is negative
    rows = zip(similarities, own, strict=True)
    return float(torch.stack([retrieval_average_precision(row, other == label) for row, label in rows]).mean())


def flat(index: faiss.IndexFlatIP, gallery: Tensor) -> list[int]:
    return index.search(gallery[:1].numpy(), 5)[1][0].tolist()


def found(gallery: Tensor) -> list[int]:
    return search(gallery[0], gallery, 5)[1]


if __name__ == "__main__":
    main()
