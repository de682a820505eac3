"""Train/validation splits that keep near-duplicates together."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import InputError


@dataclass(frozen=True)
class Split:
    """Positions in the data, each in one of three ascending lists.

    Args:
        train: what to train on.
        validation: the held-out images; no near-duplicate of one is in `train`.
        left_out: images in neither, because a near-duplicate is in `validation`; empty without groups.
        copied: number of images with a near-duplicate.
        copy_groups: number of groups of near-duplicates.
        unvalidated: number of classes without an image in `validation`.
        untrained: number of classes without an image in `train`.
        summary: all this in a few short phrases.
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
    validation_share: float = 0.1,
) -> Split:
    """Return a stratified split that depends only on the images' contents, not on their order or names.

    Units, which are sets of near-duplicates or `groups`, are ordered by hash. Each in turn is held out if that brings
    the classes closer to their share. Every class with an image keeps one to train on.

    Without groups, a class has held-out images if it has two units, one of them in no other class. With groups, each
    group is on one side, and near-duplicates of held-out images are left out of training.

    Args:
        labels: the class of each image.
        keys: the `content_key` of each.
        copies: the result of `near_duplicates` for them.
        groups: the group of each, e.g. its artist; groups are not divided.
        validation_share: held-out fraction of each class, between 0 and 1; at least one image where possible.

    Raises InputError.
    """
    if not 0 < validation_share < 1:
        raise InputError(f"`validation_share` must be between 0 and 1, got {validation_share}.")
    if not len(labels):
        raise InputError("there are no images to split.")
    copies = np.asarray(copies).tolist()
    units = _units(copies, keys) if groups is None else _named_units(groups)
    classes = [Counter(labels[index] for index in unit) for unit in units]
    chosen = _choose(classes, validation_share, fill=groups is None)
    validation = {index for unit in chosen for index in units[unit]}
    seen = {copies[index] for index in validation}
    left_out = {index for index, copy in enumerate(copies) if copy in seen} - validation
    train = set(range(len(labels))) - validation - left_out
    if not (validation and train):
        argument = "`validation_share`" if groups is None else "`group_column`"
        raise InputError(f"{argument}: one side would be empty: each class must keep an image to train on.")
    return _report(labels, copies, sorted(train), sorted(validation), sorted(left_out))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _units(copies: list[int], keys: Sequence[str]) -> list[list[int]]:
    """Return sets of near-duplicates in an order that depends only on their contents."""
    units = _collect(copies).values()
    if len(units) < 2:
        raise InputError("all images are copies of one picture: there is nothing to split.")
    # Hashed again: the minimum of many keys is small, so large sets would come first.
    return sorted(units, key=lambda unit: _digest(min(keys[index] for index in unit)))


def _named_units(groups: Sequence[str]) -> list[list[int]]:
    missing = sum(group in (None, "") for group in groups)
    if missing:
        raise InputError(f"`group_column`: {missing} of {len(groups)} images have no group.")
    units = _collect(groups)
    if len(units) < 2:
        raise InputError(f"`group_column`: all images are in the group {groups[0]!r}, at least two are needed.")
    return [units[name] for name in sorted(units, key=lambda name: _digest(str(name)))]


def _collect(names: Sequence) -> dict:
    """Return the positions of each name."""
    positions = {}
    for index, name in enumerate(names):
        positions.setdefault(name, []).append(index)
    return positions


def _choose(classes: list[Counter], share: float, fill: bool) -> list[int]:
    """Return the units to hold out, given the number of images of each class in each unit.

    With `fill`, a second round, small units first, is for classes that have none held out after the first.
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
    images = sum(map(len, copied))
    lines = [f"{len(train)} images for training, {len(validation)} held out"]
    if copied:
        lines.append(f"with near-duplicates: {images} in {len(copied)} groups, {across} of them in several classes")
    if left_out:
        lines.append(f"left out of training as near-duplicates of held-out images: {len(left_out)}")
    if unvalidated:
        lines.append(f"classes without a held-out image: {unvalidated}")
    if untrained:
        lines.append(f"classes without a training image: {untrained}")
    return Split(train, validation, left_out, images, len(copied), unvalidated, untrained, "; ".join(lines))


def describe_split(
    result: Split, keys: Sequence[str], validation_share: float, group_column: str | None = None
) -> dict:
    """Return a split as a dictionary to save as JSON."""
    return {
        "about": "content keys (data.near_duplicates) of the held-out images; all others were trained on",
        "validation_share": validation_share,
        "group_column": group_column,
        "summary": result.summary,
        "train_images": len(result.train),
        "validation_images": len(result.validation),
        "validation": sorted(keys[index] for index in result.validation),
        "left_out": sorted(keys[index] for index in result.left_out),
    }


def split_hash(record: dict) -> str:
    """Return a hash of the held-out images, 12 hexadecimal digits; `record` is from `describe_split`."""
    return _digest(" ".join(record["validation"]))[:12]
