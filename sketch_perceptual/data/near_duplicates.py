"""Detection of near-duplicates: drawings that are equal, resized, recompressed, flipped or rotated."""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

THUMBNAIL = 32  # pixels a side
# Of 9,500 line drawings, turned, resized and saved again as JPEG of quality 50, the worst still correlates 0.996
# with its original. Above 0.995 two drawings look the same; a locked and an unlocked padlock reach 0.991.
COPY = 0.995
BLANK = 2  # grey levels: an image that deviates less is blank paper, or JPEG noise on it
CHUNK = 512  # rows of the correlation matrix in memory at a time


def thumbnail(image: Image.Image) -> np.ndarray:
    """Return an RGB image in grey, squeezed to a square, uint8 (32, 32)."""
    # Bicubic, because Pillow's box filter weighs whole pixels and so depends on the size: 0.97 for some copies.
    return np.asarray(image.convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC))


def content_key(image: Image.Image) -> str:
    """Return a hash of the size and the pixels of an RGB image, 16 hexadecimal digits."""
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()[:16]


def near_duplicates(keys: Sequence[str], thumbnails: np.ndarray) -> np.ndarray:
    """Return (N,) integers that are equal for near-duplicates, directly or through others.

    Near-duplicates have the same key, or look the same after one of the 8 flips and quarter turns; near-constant
    images need the same key. Takes seconds for 50,000 images.

    Args:
        keys: the `content_key` of each image.
        thumbnails: uint8 (N, 32, 32), the `thumbnail` of each.
    """
    # In the order of the keys, so that the order of the images does not even change the rounding of sums.
    _, first, inverse = np.unique(np.asarray(keys, str), return_index=True, return_inverse=True)
    grey = thumbnails[first].astype(np.float32)
    grey -= grey.mean((1, 2), keepdims=True)
    norms = np.linalg.norm(grey, axis=(1, 2))
    inked = np.flatnonzero(norms >= BLANK * THUMBNAIL)
    pictures = grey[inked] / norms[inked, None, None]
    vectors, same = pictures.reshape(-1, THUMBNAIL * THUMBNAIL), np.arange(len(inked))
    for row, others in _candidates(pictures):
        others = others[same[others] != same[row]]
        if len(others):
            copies = others[(vectors[others] @ _turns(pictures[row]).T).max(1) >= COPY]
            same[np.isin(same, same[copies])] = same[row]
    copies = np.arange(len(first))
    copies[inked] = inked[same]
    return copies[inverse]


def _candidates(pictures: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each row with the later rows that may be its near-duplicates; `pictures` (N, 32, 32) have mean 0, norm 1.

    The mean over a picture's 8 turns is the same for all of them. The correlation of two pictures, however turned, is
    at most the product of these means plus the product of the norms of the residuals.
    """
    means = (pictures + pictures[:, ::-1]) / 2
    means = (means + means[:, :, ::-1]) / 2
    means = (means + means.swapaxes(1, 2)) / 2
    half = THUMBNAIL // 2
    quarters = 2 * means[:, :half, :half].reshape(len(means), half * half)  # the other three mirror it
    rest = np.sqrt(np.maximum(0, 1 - np.square(quarters).sum(1, keepdims=True)))
    vectors = np.concatenate([quarters, rest], 1)
    for start in range(0, len(vectors), CHUNK):
        near = vectors[start : start + CHUNK] @ vectors[start:].T >= COPY - 1e-4  # rounding
        for row, hits in enumerate(near):
            yield start + row, start + row + 1 + np.flatnonzero(hits[row + 1 :])


def _turns(picture: np.ndarray) -> np.ndarray:
    """Return the flips and quarter turns of a picture, (8, 1024)."""
    return np.stack([np.rot90(face, k).ravel() for face in (picture, picture.T) for k in range(4)])
