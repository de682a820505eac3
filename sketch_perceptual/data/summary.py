"""Summary of a data set, logged before training."""

import os
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence

from ..errors import first_names, shown
from .datasets import CaptionedImages, Images, LabelledImages
from .scan_cache import FAINT, NEGATIVE, TINTED, ImageInfo

OF_DRAWINGS = (FAINT, NEGATIVE, TINTED)  # nothing unusual for a photo
FADED = 0.75  # pixels: thinner strokes lose at least a quarter of their black
SHOWN = 3  # names, captions, classes


def data_report(data: Images, infos: Mapping[int, ImageInfo], bad: Sequence[int], kind: str = "drawings") -> str:
    """Return a table of facts and oddities, with the first names of each.

    Args:
        infos: of the readable images, by position in `data`; `bad` are the other positions.
        kind: "drawings" or "photos", which are not checked for strokes and paper.
    """
    names = [data.names[row] for row in data.rows]
    folder = os.path.commonpath([os.path.dirname(name) for name in names])
    if os.path.isdir(folder):
        names = [os.path.relpath(name, folder) for name in names]
        lines = [(kind, f"{len(data)} in {shown(folder)}")]
    else:
        lines = [(kind, str(len(data)))]
    if isinstance(data, LabelledImages):
        lines.append(("classes", _classes(data)))
    if isinstance(data, CaptionedImages):
        lines += _captions(data)
    if infos:
        lines.append(("sizes", _sizes(list(infos.values()))))
    measured = isinstance(data, CaptionedImages)  # at `resolution`, see `describe_strokes`
    if kind == "drawings" and not measured and (strokes := [info.stroke for info in infos.values() if info.stroke]):
        lines.append(("strokes", f"about {statistics.median(strokes):.1f} px wide"))
    if bad:
        lines.append(("left out", f"{len(bad)} cannot be read ({_first([names[index] for index in bad])})"))
    oddities = _oddities(infos, names, kind)
    if kind == "drawings" and isinstance(data, CaptionedImages):
        thin = [names[index] for index, info in infos.items() if 0 < info.stroke * _zoom(data, info) < FADED]
        if thin:
            oddities.append(
                f"{len(thin)} whose strokes become thinner than a pixel and grey at `resolution` {data.resolution}:"
                f" use a larger one, or crops of the pages ({_first(thin)})"
            )
    if data.fit == "crop" and (cut := sum(min(info[:2]) < 0.9 * max(info[:2]) for info in infos.values())):
        oddities.append(
            f"{cut} lose more than a tenth of their area to cropping: use `fit` pad or bucket to keep them whole"
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
    """Describe the captions, with evenly spaced examples; no lines if all are empty, like those of photos."""
    captions = list(dict.fromkeys(caption for row in data.rows for caption in data.captions[row]))
    if not any(captions):
        return []
    examples = dict.fromkeys(captions[number * len(captions) // SHOWN] for number in range(SHOWN))
    origin = f"; {data.origin}" if data.origin else ""
    return [("captions", f"{len(captions)} different ones{origin}"), *(("", repr(example)) for example in examples)]


def _sizes(infos: Sequence[ImageInfo]) -> str:
    shapes = Counter((info.width > info.height) - (info.width < info.height) for info in infos)
    names = {0: "square", 1: "landscape", -1: "portrait"}
    shares = ", ".join(f"{shapes[shape] / len(infos):.0%} {name}" for shape, name in names.items() if shapes[shape])
    sizes = sorted({(info.width * info.height, info.width, info.height) for info in infos})
    ends = [f"{width} x {height}" for _, width, height in (sizes[0], sizes[-1])]
    return f"{' to '.join(dict.fromkeys(ends))} pixels; {shares}"


def _zoom(data: CaptionedImages, info: ImageInfo) -> float:
    """Return the factor by which an image is enlarged when it is fitted."""
    sides = {"crop": min(info[:2]), "pad": max(info[:2]), "bucket": (info.width * info.height) ** 0.5}
    return data.resolution / sides[data.fit]


def _oddities(infos: Mapping[int, ImageInfo], names: Sequence[str], kind: str) -> list[str]:
    noted: dict[str, list[str]] = {}
    first: dict[str, int] = {}
    pairs = []
    for index, info in infos.items():
        for note in info.notes:
            if kind == "drawings" or note not in OF_DRAWINGS:
                noted.setdefault(note, []).append(names[index])
        if first.setdefault(info.key, index) != index:
            pairs.append(f"{names[index]} is {names[first[info.key]]}")
    oddities = [f"{len(noted[note])} {note} ({_first(noted[note])})" for note in sorted(noted)]
    return oddities + ([f"{len(pairs)} equal to an earlier one ({_first(pairs)})"] if pairs else [])


def _first(names: Sequence[str]) -> str:
    return first_names(names, count=SHOWN)
