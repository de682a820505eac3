"""Training and held-out images that share no drawing: near-duplicates stay together."""

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
        left_out: what would be in `train` but for a near-duplicate in `validation`; empty without groups.
        copied: how many images have a near-duplicate.
        copy_groups: in how many groups of them.
        unvalidated: how many classes have no image in `validation`.
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
    validation_share: float = 0.1,
) -> Split:
    """A stratified split that follows from what the images show, whatever their order and names.

    A hash puts units, which are near-duplicates or `groups`, in an order. One after the other is held out if that
    brings the classes closer to their share. Every class with an image keeps one to train on.

    Without groups, a class has held-out images if it has two units, one of them in no other class. With groups, whole
    groups are on one side, and near-duplicates of held-out images are left out of training.

    Args:
        labels: the class of each image.
        keys: the `content_key` of each.
        copies: what `near_duplicates` returns for them.
        groups: what must not be divided, for example who drew each image.
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
        raise InputError(f"{argument}: one side stays empty: each class must keep an image to train on.")
    return _report(labels, copies, sorted(train), sorted(validation), sorted(left_out))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _units(copies: list[int], keys: Sequence[str]) -> list[list[int]]:
    """Groups of near-duplicates in an order that depends on their contents alone."""
    units = _collect(copies).values()
    if len(units) < 2:
        raise InputError("all images are copies of one picture, there is nothing to split.")
    # Hashed again: the smallest key of many is small, so large groups would come first.
    return sorted(units, key=lambda unit: _digest(min(keys[index] for index in unit)))


def _named_units(groups: Sequence[str]) -> list[list[int]]:
    missing = sum(group in (None, "") for group in groups)
    if missing:
        raise InputError(f"`group_column`: {missing} of {len(groups)} images have no group.")
    units = _collect(groups)
    if len(units) < 2:
        raise InputError(f"`group_column`: all images are of the group {groups[0]!r}, at least two are needed.")
    return [units[name] for name in sorted(units, key=lambda name: _digest(str(name)))]


def _collect(names: Sequence) -> dict:
    """The positions of each name."""
    positions = {}
    for index, name in enumerate(names):
        positions.setdefault(name, []).append(index)
    return positions


def _choose(classes: list[Counter], share: float, fill: bool) -> list[int]:
    """Which units are held out, from how many images of each class every one has.

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
    """A split as it is saved."""
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
    """12 hexadecimal digits for the held-out images of what `describe_split` returns."""
    return _digest(" ".join(record["validation"]))[:12]
