"""The drawings of a folder that are most like one."""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from PIL import Image

from ..data.checks import readable, scan
from ..data.folders import find_images
from ..data.image_sets import Images
from ..data.images import load_image
from ..errors import InputError
from ..figures import image_grid
from ..measures.ranking import search
from ..networks.embedder import SketchEmbedder
from ..running.feature_cache import FeatureCache
from ..running.processes import on_main
from .embedding import Extract, embed_cached
from .report import SHEET_SIZE, pad


@dataclass(frozen=True)
class Matches:
    """What is most like a query, best first.

    Args:
        same: paths of the query itself and of files with its bytes, which are not ranked.
        similarities: cosines.
        images: the gallery, and `order`, the positions in it.
    """

    query: Image.Image
    same: list[Path]
    similarities: list[float]
    images: Images
    order: list[int]

    def lines(self) -> list[str]:
        same = [f"the query itself\t{path}" for path in self.same]
        pairs = zip(self.similarities, self.order, strict=True)
        return same + [f"{similarity:.4f}\t{self.images.name(index)}" for similarity, index in pairs]

    def draw(self, name: str) -> Image.Image:
        pictures = (self.query, *map(self.images.image, self.order))
        row = [pad(picture, self.images.background) for picture in pictures]
        heads = ["query", *(f"{similarity:.3f}" for similarity in self.similarities)]
        return image_grid({name: row}, heads, SHEET_SIZE)


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
    """The `count` pictures in the folder `gallery` that are nearest to the picture `query`; None off the main process.

    Only what `open_cache` lacks is read. `invert` of the query and the gallery: see `load_image`.
    """
    background = embedder.background
    picture = load_image(query, background, invert=invert)
    paths = [Path(gallery, image) for image in find_images(Path(gallery), "`gallery`")[1]]
    with ThreadPoolExecutor(8) as pool:
        query_key, *keys = pool.map(file_key, [Path(query), *paths])
    same = [path for path, key in zip(paths, keys, strict=True) if key == query_key]
    if invert != "never":
        keys = [f"{key}-{invert}" for key in keys]
    data = Images(paths, list(map(str, paths)), background, invert)
    new = {keys[index] for index in open_cache(embedder, background).missing(keys)}
    unread = [index for index, key in enumerate(keys) if key in new]
    positions = on_main(accelerator, find_readable, data, unread, on_bad_image)
    data = data.select(index for index in positions if paths[index] not in same)
    if not len(data):
        raise InputError(f"`gallery`: {gallery} holds nothing but the query")
    keys = [keys[row] for row in data.rows]
    cache = extract(embedder, data, keys)
    if not accelerator.is_main_process:
        return None
    with accelerator.autocast():
        vector = embedder.to(accelerator.device).embed([picture])[0]
    similarities, order = search(vector, embed_cached(embedder, cache, keys, accelerator.device), count)
    return Matches(picture, same, similarities, data, order)


def find_readable(data: Images, unread: list[int], on_bad_image: str) -> list[int]:
    """Positions of what can be read, where only the positions `unread` need to be tried."""
    bad = scan(data.select(unread)).bad if unread else {}
    return readable(data, {unread[index]: message for index, message in bad.items()}, on_bad_image)


def file_key(path: Path) -> str:
    """What a file holds, unread as a picture."""
    try:
        return "file-" + hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
