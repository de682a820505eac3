"""Readable class names, and the 1000 classes of ImageNet."""

import functools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path


@functools.cache
def imagenet_classes() -> dict[str, str]:
    """Return ImageNet's 1000 classes in order: "n01440764" -> "tench, Tinca tinca" (WordNet 3.0's synonyms)."""
    lines = (Path(__file__).parent / "imagenet_synsets.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split(" ", 1) for line in lines)


def readable_class(name: str) -> str:
    """Return a class's name for people: "n01440764" and "tench, Tinca tinca" -> "tench", "hot_dog" -> "hot dog".

    "t-shirt" stays as it is. Not unique: two classes of ImageNet become "crane".
    """
    name = imagenet_classes().get(name, name)
    return name.split(",")[0].replace("_", " ").strip() or name


def class_names(classes: Sequence[str]) -> list[str]:
    """Return the readable name of each class, with its id if another has the same name: "crane (n02012849)"."""
    readable = [readable_class(name) for name in classes]
    twice = {name for name, count in Counter(readable).items() if count > 1}
    return [f"{name} ({id})" if name in twice else name for name, id in zip(readable, classes, strict=True)]


def are_imagenets(classes: Sequence[str]) -> bool:
    """Return whether these are ImageNet's 1000 classes in its order, as ids or as names."""
    ids = imagenet_classes()
    exact = {*ids, *ids.values()}
    return len(classes) == len(ids) and all(
        name in (id, ids[id], readable_class(id)) or (name not in exact and readable_class(name) == readable_class(id))
        for name, id in zip(classes, ids, strict=True)
    )


def find_classes(prompts: Sequence[str], classes: Sequence[str]) -> Iterator[set[int]]:
    """Yield the class that each prompt names (the longest of several) in readable form: "hot dog" for "hot_dog".

    A set, since two classes may have the same readable name; empty if no class is named.
    """
    readings: dict[str, set[int]] = {}
    for index, name in enumerate(classes):
        readings.setdefault(readable_class(name).casefold(), set()).add(index)
    names = sorted(readings, key=len, reverse=True)
    pattern = re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, names)) + r")(?!\w)")
    for prompt in prompts:
        named = pattern.findall(prompt.casefold())
        yield readings[max(named, key=len)] if named else set()
