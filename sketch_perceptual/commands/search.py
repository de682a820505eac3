"""Find the drawings in a folder that are most similar to a query.

    sketch-perceptual search --query fox.png --gallery drawings --figure found.png

Features are cached on disk, so that the next search computes only those of new pictures.
"""

import argparse
import functools
import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

from ..cli.arguments import Parser, at_least
from ..cli.console import print_result
from ..cli.entry import run
from ..data.datasets import Images
from ..data.folders import find_images
from ..data.images import INVERT, load_image
from ..data.preview import pad
from ..data.scan import readable, scan
from ..errors import InputError, shown
from ..evaluation.embedding import Extract, embed_cached
from ..evaluation.options import add_embedder_options, begin, embedder, extractor
from ..figures import image_grid, with_caption, write_figure
from ..measures.ranking import search
from ..networks.backbone import BUNDLED
from ..networks.embedder import SketchEmbedder, load_embedder
from ..training.distributed import on_main
from ..training.feature_cache import FeatureCache, feature_folder


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="sketch-perceptual search", description=__doc__)
    add = parser.add_argument
    add("--query", required=True, help="a picture")
    add("--gallery", required=True, help="a folder of images, searched recursively")
    add("--model", default=str(BUNDLED), help="an embedder, a backbone, VGG-16 weights, imagenet or bundled")
    add("--count", type=at_least(1), default=10, help="number of results")
    add("--figure", help="write a picture of the query and its nearest drawings")
    add("--on_bad_image", choices=("error", "skip"), default="error", help="what to do with unreadable images")
    add("--background", help="colour behind transparent drawings; default: the embedder's own; for a backbone white")
    add("--invert", choices=INVERT, default="never", help="invert images; auto: only those that are white on black")
    add_embedder_options(add)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    run(print_similar, parse_args(argv), "sketch-perceptual search")


def print_similar(args: argparse.Namespace) -> None:
    """Print, and draw, the nearest drawings to the query; the query itself is listed but not ranked."""
    accelerator = begin(args)
    matches = find_similar(
        accelerator,
        args.query,
        args.gallery,
        load_embedder(args.model, **embedder(args)),
        extractor(args, accelerator),
        lambda network, paper: FeatureCache(feature_folder(accelerator, args.feature_dir, network, paper)),
        count=args.count,
        on_bad_image=args.on_bad_image,
        invert=args.invert,
    )
    if matches is not None:
        if args.figure:
            write_figure(args.figure, matches.render(Path(args.query).name))
        print_result("\n".join(matches.lines()))
    accelerator.end_training()


@dataclass(frozen=True)
class Matches:
    """Drawings most similar to a query, best first.

    Args:
        same: paths of the query itself and of identical files, which are not ranked.
        similarities: cosines.
        images: the gallery; `order`: the positions in it.
    """

    query: Image.Image
    same: list[Path]
    similarities: list[float]
    images: Images
    order: list[int]

    def lines(self) -> list[str]:
        same = [f"the query or a copy of it\t{shown(path)}" for path in self.same]
        pairs = zip(self.similarities, self.order, strict=True)
        return same + [f"{similarity:.4f}\t{shown(self.images.name(index))}" for similarity, index in pairs]

    def render(self, name: str) -> Image.Image:
        """Return a picture of the query and its matches, with the names of their files and folders."""
        names = [name, *("/".join(Path(self.images.name(index)).parts[-2:]) for index in self.order)]
        pictures = [self.query, *map(self.images.image, self.order)]
        row = [
            with_caption(pad(picture, self.images.background), name)
            for picture, name in zip(pictures, names, strict=True)
        ]
        heads = ["query", *(f"{similarity:.3f}" for similarity in self.similarities)]
        return image_grid({"": row}, heads, row[0].height)


def find_similar(
    accelerator: Accelerator,
    query: str | Path,
    gallery: str | Path,
    embedder: SketchEmbedder,
    extract: Extract,
    open_cache: Callable[[SketchEmbedder, str], FeatureCache],
    *,
    count: int = 10,
    on_bad_image: str = "error",
    invert: str = "never",
) -> Matches | None:
    """Return the `count` pictures in `gallery` that are nearest to `query`; None off the main process.

    Only pictures that the cache lacks are read. `invert` applies to query and gallery, see `load_image`.
    """
    background = embedder.background
    picture = load_image(query, background, invert=invert)
    paths = [Path(gallery, image) for image in find_images(Path(gallery), "`gallery`")[1]]
    with ThreadPoolExecutor(8) as pool:
        keyed = pool.map(functools.partial(file_key, invert=invert), [Path(query), *paths])
        bar = tqdm(keyed, "Reading the gallery", 1 + len(paths), disable=None if accelerator.is_main_process else True)
        query_key, *keys = bar
    same = [path for path, key in zip(paths, keys, strict=True) if key == query_key]
    data = Images(paths, list(map(str, paths)), background, invert)
    new = {keys[index] for index in open_cache(embedder, background).missing(keys)}
    unread = [index for index, key in enumerate(keys) if key in new]
    positions = on_main(accelerator, find_readable, data, unread, on_bad_image)
    data = data.select(index for index in positions if keys[index] != query_key)
    if not len(data):
        raise InputError(f"`gallery`: {gallery} contains only the query")
    keys = [keys[row] for row in data.rows]
    cache = extract(embedder, data, keys)
    if not accelerator.is_main_process:
        return None
    with accelerator.autocast():
        vector = embedder.to(accelerator.device).embed([picture])[0]
    similarities, order = search(vector, embed_cached(embedder, cache, keys, accelerator.device), count)
    return Matches(picture, same, similarities, data, order)


def find_readable(data: Images, unread: list[int], on_bad_image: str) -> list[int]:
    """Return the positions of readable pictures; only those at `unread` are tried."""
    bad = scan(data.select(unread)).bad if unread else {}
    return readable(data, {unread[index]: message for index, message in bad.items()}, on_bad_image)


def file_key(path: Path, invert: str) -> str:
    """Return a key for the bytes of a file and how it would be read."""
    reading = "" if invert == "never" else f"-{invert}"
    try:
        return "file-" + hashlib.sha256(path.read_bytes()).hexdigest()[:16] + reading
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
