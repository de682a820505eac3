"""Triplets of drawings: which of two shows the same thing as the first, as every person would answer."""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import datasets
import numpy as np
import torch
from PIL import Image

from sketch_perceptual import drawings, to_tensor
from sketch_perceptual.data.near_duplicates import content_key, near_duplicates, thumbnail
from sketch_perceptual.data.splits import split
from sketch_perceptual.drawings.outlines import turn
from sketch_perceptual.drawings.render import STROKES, sketch
from sketch_perceptual.drawings.scene import Shape


@dataclass
class Triplets:
    """Rows (anchor, same, other) of positions in `images`, and what each row is about, for intervals by subject."""

    images: Sequence[Image.Image]
    rows: list[tuple[int, int, int]]
    subjects: list[str]

    def tensors(self, rows: Sequence[int], side: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The distinct drawings of some rows, (N, 3, side, side), and each row's positions in them, (rows, 3)."""
        used = sorted({index for row in rows for index in self.rows[row]})
        batch = torch.stack([to_tensor(resize(self.images[index], side)) for index in used])
        row_of = {index: position for position, index in enumerate(used)}
        return batch, torch.tensor([[row_of[index] for index in self.rows[row]] for row in rows])


def resize(image: Image.Image, side: int) -> Image.Image:
    return image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)


@dataclass
class Labelled:
    """Drawings of things by hands; `copies` are equal for drawings that are copies of each other."""

    images: list[Image.Image]
    things: list[str]
    hands: list[str]
    copies: list[int]

    def select(self, chosen: Sequence[int]) -> "Labelled":
        return Labelled(*([column[i] for i in chosen] for column in vars(self).values()))

    def sides(self) -> tuple[list[int], list[int]]:
        """Rows that `train_backbone.py --group_column` trains on, and those that it keeps apart, by hand."""
        keys = [content_key(image) for image in self.images]
        labels = {thing: label for label, thing in enumerate(sorted(set(self.things)))}
        parts = split([labels[thing] for thing in self.things], keys, self.copies, self.hands)
        return parts.train, parts.validation


def load_labelled(name: str, label_column: str = "label", group_column: str = "set") -> Labelled:
    rows = datasets.load_dataset(name, split="train")
    images = [image.convert("RGB") for image in rows["image"]]
    copies = near_duplicates([content_key(x) for x in images], np.stack([thumbnail(x) for x in images]))
    feature, labels = rows.features[label_column], rows[label_column][:]
    things = feature.int2str(labels) if isinstance(feature, datasets.ClassLabel) else labels
    return Labelled(images, things, rows[group_column][:], copies.tolist())


def synonyms(data: Labelled) -> dict[str, set[str]]:
    """Thing -> things that share a drawing with it: "add" and "plus" are one thing under two names."""
    names = defaultdict(set)
    for thing, copy in zip(data.things, data.copies, strict=True):
        names[copy].add(thing)
    same = defaultdict(set)
    for group in names.values():
        for thing in group:
            same[thing] |= group
    return same


def by_hands(data: Labelled, count: int, same_thing: dict[str, set[str]], seed: int = 0) -> Triplets:
    """A drawing, the same thing by another hand, and another thing by that other hand; no two of them copies."""
    draw, rows_of, drawn_by, drawn = random.Random(seed), defaultdict(list), defaultdict(set), defaultdict(set)
    for index, (thing, hand) in enumerate(zip(data.things, data.hands, strict=True)):
        rows_of[thing, hand].append(index)
        drawn_by[thing].add(hand)
        drawn[hand].add(thing)
    things = sorted(thing for thing, hands in drawn_by.items() if len(hands) > 1)
    rows, subjects = [], []
    while len(rows) < count:
        thing = draw.choice(things)
        hand, other_hand = draw.sample(sorted(drawn_by[thing]), 2)
        if not (others := sorted(drawn[other_hand] - same_thing[thing])):
            continue
        wanted = (thing, hand), (thing, other_hand), (draw.choice(others), other_hand)
        anchor, same, other = (draw.choice(rows_of[key]) for key in wanted)
        if len({data.copies[index] for index in (anchor, same, other)}) == 3:
            rows.append((anchor, same, other))
            subjects.append(thing)
    return Triplets(data.images, rows, subjects)


def redraws(count: int, side: int, classes: Sequence[str] = drawings.CLASSES, seed: int = 0) -> Triplets:
    """A scene, the same scene by an unsteady hand in another style, and another scene of that class like the first.

    The other two are moved, turned and bent a little, so that no stroke lies where it lay.
    """
    draw, images, rows, subjects = random.Random(seed), [], [], []
    for number in range(count):
        name, (style, other_style) = draw.choice(classes), draw.sample(drawings.STYLES, 2)
        scene, other = (drawings.compose(name, 2 * number + k, seed + 1000) for k in (0, 1))
        images.append(sketch(scene, STROKES[style], side, draw))
        for unsteady, its_style in ((scene, other_style), (other, style)):
            stroke = STROKES[its_style]
            unsteady.shapes = moved(unsteady.shapes, draw)
            images.append(sketch(unsteady, replace(stroke, wobble=3 * stroke.wobble), side, draw))
        rows.append((3 * number, 3 * number + 1, 3 * number + 2))
        subjects.append(f"{name} {number}")
    return Triplets(images, rows, subjects)


def moved(shapes: list[Shape], draw: random.Random) -> list[Shape]:
    scale, angle, shift = draw.uniform(0.9, 1.1), draw.uniform(-6, 6), [draw.uniform(-0.05, 0.05) for _ in range(2)]
    waves = [(draw.uniform(5, 9), draw.uniform(0, 6)) for _ in range(2)]

    def move(points: np.ndarray) -> np.ndarray:
        points = turn((points - 0.5) * scale, angle) + 0.5 + shift
        return points + 0.02 * np.stack([np.sin(f * points[:, 1 - k] + p) for k, (f, p) in enumerate(waves)], 1)

    return [replace(shape, points=move(shape.points)) for shape in shapes]


def colour_pairs(name: str, count: int, seed: int = 0) -> Triplets:
    """A line drawing, its coloured twin, and another coloured picture of its class: OpenMoji's columns."""
    rows = datasets.load_dataset(name, split="train")
    draw, classes = random.Random(seed), defaultdict(list)
    for index, label in enumerate(rows["label"]):
        classes[label].append(index)
    images, triplets, subjects = [], [], []
    for index in draw.sample(range(len(rows)), len(rows)):
        others = [other for other in classes[rows[index]["label"]] if other != index]
        if not others or len(triplets) == count:
            continue
        images += [rows[index]["line"], rows[index]["colour"], rows[draw.choice(others)]["colour"]]
        triplets.append((len(images) - 3, len(images) - 2, len(images) - 1))
        subjects.append(rows[index]["text"])
    return Triplets(images, triplets, subjects)
