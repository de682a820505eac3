"""What it takes to look at a data set before training, the first time and the second.

    python -m benchmarks.scan --count 50889

The drawings are few, of the embedded renderer, and are saved again and again with other bytes behind their end. The
first scan is timed between two bare loops, which open and convert each picture with Pillow in as many threads.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from sketch_perceptual.data.datasets import Images
from sketch_perceptual.data.scan import scan
from sketch_perceptual.drawings import CLASSES, draw

THREADS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50889, help="number of drawings; default: as ImageNet-Sketch")
    parser.add_argument("--size", type=int, default=256)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = make(Path(folder), args.count, args.size)
        data = Images(paths, list(map(str, paths)))
        data.scan_folder = Path(folder, "scans")
        before = peak()
        bare = seconds(lambda: open_all(paths))
        first = seconds(lambda: scan(data, thumbnails=True, workers=THREADS))
        memory = peak() - before
        bare = (bare + seconds(lambda: open_all(paths))) / 2
        second = seconds(lambda: scan(data, thumbnails=True, workers=THREADS))
        (kept,) = data.scan_folder.iterdir()
        print(f"{args.count} drawings of {args.size} px, {THREADS} threads")
        print(f"first scan   {args.count / first:.0f} images/s, {first / bare:.2f} times as long as Pillow alone")
        print(f"second scan  {second:.2f} s")
        print(f"memory       {memory / 2**20:.0f} MiB more at its peak, {memory / args.count / 1024:.1f} KiB an image")
        print(f"on disk      {kept.stat().st_size / 2**20:.1f} MiB")


def make(folder: Path, count: int, size: int) -> list[Path]:
    distinct = folder / "distinct"
    distinct.mkdir()
    for name in CLASSES:
        draw(name, 0, size=size).save(distinct / f"{name}.png")
    drawings = [path.read_bytes() for path in sorted(distinct.iterdir())]
    paths = [folder / f"{number:06}.png" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(drawings[number % len(drawings)] + number.to_bytes(4, "big"))
    return paths


def open_all(paths: list[Path]) -> None:
    def convert(path: Path) -> None:
        with Image.open(path) as image:
            image.convert("RGB")

    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(convert, paths):
            pass


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def peak() -> int:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
