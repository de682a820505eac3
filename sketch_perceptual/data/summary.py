"""What a person should know of a data set before the first step, as a short table."""

import os
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence

from ..errors import first_names, shown
from .datasets import CaptionedImages, Images, LabelledImages
from .scan_cache import FAINT, NEGATIVE, TINTED, Look

OF_DRAWINGS = (FAINT, NEGATIVE, TINTED)  # which a photo may be
FADED = 0.75  # pixels: thinner strokes lose a quarter of their black or more
SHOWN = 3  # names, captions, classes


def data_report(data: Images, looks: Mapping[int, Look], bad: Sequence[int], what: str = "drawings") -> str:
    """A line for each thing to know, with the first names.

    Args:
        looks: by position in `data`, of all that can be read; `bad` are the other positions.
        what: "drawings" or "photos", whose paper is nobody's concern.
    """
    names = [data.names[row] for row in data.rows]
    folder = os.path.commonpath([os.path.dirname(name) for name in names])
    if os.path.isdir(folder):
        names = [os.path.relpath(name, folder) for name in names]
        lines = [(what, f"{len(data)} in {shown(folder)}")]
    else:
        lines = [(what, str(len(data)))]
    if isinstance(data, LabelledImages):
        lines.append(("classes", _classes(data)))
    if isinstance(data, CaptionedImages):
        lines += _captions(data)
    if looks:
        lines.append(("sizes", _sizes(list(looks.values()))))
    if what == "drawings" and (strokes := [look.stroke for look in looks.values() if look.stroke]):
        lines.append(("strokes", f"about {statistics.median(strokes):.1f} px wide"))
    if bad:
        lines.append(("left out", f"{len(bad)} cannot be read ({_first([names[index] for index in bad])})"))
    oddities = _oddities(looks, names, what)
    if what == "drawings" and isinstance(data, CaptionedImages):
        thin = [names[index] for index, look in looks.items() if 0 < look.stroke * _zoom(data, look) < FADED]
        if thin:
            oddities.append(
                f"{len(thin)} whose strokes become thinner than a pixel and grey at `resolution` {data.resolution}:"
                f" use a larger one, or parts of the pages ({_first(thin)})"
            )
    if data.fit == "crop" and (cut := sum(min(look[:2]) < 0.9 * max(look[:2]) for look in looks.values())):
        oddities.append(
            f"{cut} lose more than a tenth of their area to cropping: `fit` pad or bucket keeps them whole"
        )
    lines += [("to check" if number == 0 else "", text) for number, text in enumerate(oddities)]
    return "\n".join(f"  {head:<10}{text}" for head, text in lines)


def _classes(data: LabelledImages) -> str:
    counts = Counter(data.labels)
    fewest, most = min(counts.values()), max(counts.values())
    size = f"{fewest} each" if fewest == most else f"{fewest} to {most}"
    names = _first([f"{data.classes[label]} {counts[label]}" for label in sorted(counts)])
    empty = len(data.classes) - len(counts)
    return f"{len(counts)} of {size} ({names})" + (f"; {empty} more have none" if empty else "")


def _captions(data: CaptionedImages) -> list[tuple[str, str]]:
    """Where captions come from, and examples from all over them; none if they are empty, as those of photos."""
    captions = list(dict.fromkeys(caption for row in data.rows for caption in data.captions[row]))
    if not any(captions):
        return []
    examples = dict.fromkeys(captions[number * len(captions) // SHOWN] for number in range(SHOWN))
    origin = f"; {data.origin}" if data.origin else ""
    return [("captions", f"{len(captions)} different ones{origin}"), *(("", repr(example)) for example in examples)]


def _sizes(looks: Sequence[Look]) -> str:
    shapes = Counter((look.width > look.height) - (look.width < look.height) for look in looks)
    kinds = {0: "square", 1: "landscape", -1: "portrait"}
    shares = ", ".join(f"{shapes[shape] / len(looks):.0%} {kind}" for shape, kind in kinds.items() if shapes[shape])
    sizes = sorted({(look.width * look.height, look.width, look.height) for look in looks})
    ends = [f"{width} x {height}" for _, width, height in (sizes[0], sizes[-1])]
    return f"{' to '.join(dict.fromkeys(ends))} pixels; {shares}"


def _zoom(data: CaptionedImages, look: Look) -> float:
    """How much an image grows when it is fitted."""
    sides = {"crop": min(look[:2]), "pad": max(look[:2]), "bucket": (look.width * look.height) ** 0.5}
    return data.resolution / sides[data.fit]


def _oddities(looks: Mapping[int, Look], names: Sequence[str], what: str) -> list[str]:
    noted: dict[str, list[str]] = {}
    first: dict[str, int] = {}
    pairs = []
    for index, look in looks.items():
        for note in look.notes:
            if what == "drawings" or note not in OF_DRAWINGS:
                noted.setdefault(note, []).append(names[index])
        if first.setdefault(look.key, index) != index:
            pairs.append(f"{names[index]} is {names[first[look.key]]}")
    oddities = [f"{len(noted[note])} {note} ({_first(noted[note])})" for note in sorted(noted)]
    return oddities + ([f"{len(pairs)} the same as one before ({_first(pairs)})"] if pairs else [])


def _first(names: Sequence[str]) -> str:
    return first_names(names, count=SHOWN)
