"""Names of classes, and ImageNet's thousand."""

import functools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path


@functools.cache
def imagenet_classes() -> dict[str, str]:
    """The 1000 classes of ImageNet in their order: "n01440764" -> "tench, Tinca tinca" (WordNet 3.0's synonyms)."""
    lines = (Path(__file__).parent / "imagenet_synsets.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split(" ", 1) for line in lines)


def readable_class(name: str) -> str:
    """What people call a class: "n01440764" and "tench, Tinca tinca" -> "tench", "hot_dog" -> "hot dog".

    "t-shirt" stays as it is. Two classes may both read "crane", so the folder or label is what tells them apart.
    """
    name = imagenet_classes().get(name, name)
    return name.split(",")[0].replace("_", " ").strip() or name


def class_names(classes: Sequence[str]) -> list[str]:
    """What people call the classes; of two that would read alike each keeps its id: "crane (n02012849)"."""
    readable = [readable_class(name) for name in classes]
    twice = {name for name, count in Counter(readable).items() if count > 1}
    return [f"{name} ({id})" if name in twice else name for name, id in zip(readable, classes, strict=True)]


def are_imagenets(classes: Sequence[str]) -> bool:
    """Whether these are ImageNet's 1000 classes in its order, as ids or as names."""
    ids = imagenet_classes()
    exact = {*ids, *ids.values()}
    return len(classes) == len(ids) and all(
        name in (id, ids[id], readable_class(id)) or (name not in exact and readable_class(name) == readable_class(id))
        for name, id in zip(classes, ids, strict=True)
    )
