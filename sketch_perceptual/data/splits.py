"""A training and a validation side that share no picture: copies are found and stay together."""

import argparse
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..errors import InputError

THUMBNAIL = 32  # pixels a side
# Of 9,500 line drawings, turned, resized and saved again as JPEG of quality 50, the worst still correlates 0.996
# with its original. Above 0.995 two drawings look the same; a locked and an unlocked padlock reach 0.991.
COPY = 0.995
BLANK = 2  # grey levels: what deviates less is paper, or JPEG noise on it
CHUNK = 512  # rows of the correlation matrix in memory at a time


def thumbnail(image: Image.Image) -> np.ndarray:
    """uint8 (32, 32): an RGB image in grey, its longer side squeezed."""
    # Bicubic, because Pillow's box filter weighs whole pixels and so depends on the size: 0.97 for some copies.
    return np.asarray(image.convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC))


def content_key(image: Image.Image) -> str:
    """16 hexadecimal digits that stand for the size and the pixels of an RGB image."""
    return _digest(repr(image.size).encode() + image.tobytes())[:16]


def find_copies(keys: Sequence[str], thumbnails: np.ndarray) -> np.ndarray:
    """(N,) integers, equal for pictures that are copies of each other, directly or by way of others.

    Copies have the same key, or look the same after one of the 8 flips and quarter turns; near-constant pictures
    need the same key. It takes seconds for 50,000 pictures.

    Args:
        keys: the `content_key` of each picture.
        thumbnails: uint8 (N, 32, 32), the `thumbnail` of each.
    """
    # In the order of the keys, so that the order of the pictures does not even change how sums are rounded.
    _, first, which = np.unique(np.asarray(keys, str), return_index=True, return_inverse=True)
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
    return copies[which]


@dataclass(frozen=True)
class Split:
    """Positions in the data, each in one of three ascending lists.

    Args:
        train: what to train on.
        validation: what to validate on; no copy of it is in `train`.
        left_out: what would be in `train` but for a copy in `validation`; empty without groups.
        copied: how many pictures have a copy.
        copy_groups: in how many groups of copies.
        unvalidated: how many classes have no picture in `validation`.
        untrained: how many have none in `train`.
        summary: the same in a few short phrases.
    """

    train: list[int]
    validation: list[int]
    left_out: list[int]
    copied: int
    copy_groups: int
    unvalidated: int
    untrained: int
    summary: str


def split(
    labels: Sequence[int],
    keys: Sequence[str],
    copies: Sequence[int],
    groups: Sequence[str] | None = None,
    share: float = 0.1,
) -> Split:
    """A stratified split that follows from what the pictures show, whatever their order and names.

    A hash puts units, which are copies or `groups`, in an order. One after the other goes to validation if that
    brings the classes closer to their share. Every class with a picture keeps one outside validation.

    Without groups, a class has validation pictures if it has two units, one of them in no other class. With
    groups, whole groups are on one side, and copies of validation pictures are left out of training.

    Args:
        labels: the class of each picture.
        keys: the `content_key` of each.
        copies: what `find_copies` returns for them.
        groups: what must not be divided, for example who drew each picture.
        share: of each class for validation, between 0 and 1; at least one picture where possible.

    Raises InputError.
    """
    if not 0 < share < 1:
        raise InputError(f"--validation_share must be between 0 and 1, got {share}.")
    if not len(labels):
        raise InputError("--validation_share: there are no images to split.")
    copies = np.asarray(copies).tolist()
    units = _units(copies, keys) if groups is None else _named_units(groups)
    classes = [Counter(labels[index] for index in unit) for unit in units]
    chosen = _choose(classes, share, fill=groups is None)
    validation = {index for unit in chosen for index in units[unit]}
    seen = {copies[index] for index in validation}
    left_out = {index for index, copy in enumerate(copies) if copy in seen} - validation
    train = set(range(len(labels))) - validation - left_out
    if not (validation and train):
        option = "--validation_share" if groups is None else "--group_column"
        raise InputError(f"{option}: one side stays empty: each class must keep a picture that validation lacks.")
    return _report(labels, copies, sorted(train), sorted(validation), sorted(left_out))


def _candidates(pictures: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each row with the later rows that may be its copies; `pictures` are (N, 32, 32) of mean 0 and norm 1.

    The mean of a picture's 8 turns is the same for all of them. What two pictures correlate, however turned, is
    at most the product of these means plus the product of the norms of what the means lack.
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
    """(8, 1024): the flips and quarter turns of a picture."""
    return np.stack([np.rot90(face, k).ravel() for face in (picture, picture.T) for k in range(4)])


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _units(copies: list[int], keys: Sequence[str]) -> list[list[int]]:
    """Groups of copies in an order that depends on their contents alone."""
    units = _collect(copies).values()
    if len(units) < 2:
        raise InputError("--validation_share: all images are copies of one picture, there is nothing to split.")
    # Hashed again: the smallest key of many is small, so large groups would come first.
    return sorted(units, key=lambda unit: _digest(min(keys[index] for index in unit).encode()))


def _named_units(groups: Sequence[str]) -> list[list[int]]:
    missing = sum(group in (None, "") for group in groups)
    if missing:
        raise InputError(f"--group_column: {missing} of {len(groups)} images have no group.")
    units = _collect(groups)
    if len(units) < 2:
        raise InputError(f"--group_column: all images are of the group {groups[0]!r}, at least two are needed.")
    return [units[name] for name in sorted(units, key=lambda name: _digest(str(name).encode()))]


def _collect(names: Sequence) -> dict:
    """The positions of each name."""
    found = {}
    for index, name in enumerate(names):
        found.setdefault(name, []).append(index)
    return found


def _choose(classes: list[Counter], share: float, fill: bool) -> list[int]:
    """Which units go to validation, from how many pictures of each class every one has.

    With `fill`, a second round, small units first, serves the classes that the first left without.
    """
    left, taken, target = Counter(), Counter(), {}
    for counts in classes:
        left.update(counts)
    units = Counter(label for counts in classes for label in counts)
    for label, count in left.items():
        target[label] = max(round(share * count), units[label] > 1)
    chosen = []

    def offer(unit: int, helps: bool) -> None:
        counts = classes[unit]
        if helps and all(left[label] > count for label, count in counts.items()):
            left.subtract(counts)
            taken.update(counts)
            chosen.append(unit)

    for unit, counts in enumerate(classes):
        missing = {label: target[label] - taken[label] for label in counts}
        offer(unit, sum(abs(missing[label] - count) - abs(missing[label]) for label, count in counts.items()) < 0)
    rest = set(range(len(classes))) - set(chosen) if fill else ()
    for unit in sorted(rest, key=lambda unit: (classes[unit].total(), unit)):
        offer(unit, not all(taken[label] for label in classes[unit]))
    return chosen


def _report(
    labels: Sequence[int], copies: list[int], train: list[int], validation: list[int], left_out: list[int]
) -> Split:
    copied = [group for group in _collect(copies).values() if len(group) > 1]
    across = sum(len({labels[index] for index in group}) > 1 for group in copied)
    unvalidated, untrained = (len(set(labels) - {labels[index] for index in side}) for side in (validation, train))
    pictures = sum(map(len, copied))
    lines = [f"{len(train)} images for training, {len(validation)} for validation"]
    if copied:
        lines.append(f"with copies: {pictures} in {len(copied)} groups, {across} of them in several classes")
    if left_out:
        lines.append(f"left out of training, since validation has a copy: {len(left_out)}")
    if unvalidated:
        lines.append(f"classes without a validation image: {unvalidated}")
    if untrained:
        lines.append(f"classes without a training image: {untrained}")
    return Split(train, validation, left_out, pictures, len(copied), unvalidated, untrained, "; ".join(lines))


def describe_split(args: argparse.Namespace, result: Split, keys: Sequence[str]) -> dict:
    """A split as it is saved."""
    return {
        "about": "content_key of sketch_perceptual.splits of the images kept apart; all others were trained on",
        "validation_share": args.validation_share,
        "group_column": args.group_column,
        "summary": result.summary,
        "train_images": len(result.train),
        "validation_images": len(result.validation),
        "validation": sorted(keys[index] for index in result.validation),
        "left_out": sorted(keys[index] for index in result.left_out),
    }


def split_hash(record: dict) -> str:
    """12 hexadecimal digits for what `describe_split` says was kept apart."""
    return hashlib.sha256(" ".join(record["validation"]).encode()).hexdigest()[:12]
