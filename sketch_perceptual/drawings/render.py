"""Rendering of scenes as sketches and coloured pictures."""

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from ..errors import InputError
from .outlines import turn
from .scenes import CLASSES, compose

STYLES = ("pen", "marker", "hatching")
OVERSAMPLING = 4
INK = 24


@dataclass(frozen=True)
class Stroke:
    width: float  # fraction of the picture's side
    thinnest: float  # pixels; keeps a fine pen visible in a small picture
    swing: float = 0.0  # relative change of the width along a stroke
    wobble: float = 0.0  # fraction of the picture's side
    hatched: bool = False


STROKES = {
    "pen": Stroke(0.008, 1.0, 0.25, 0.0028),
    "marker": Stroke(0.018, 1.7, 0.2, 0.0034),
    "hatching": Stroke(0.007, 0.9, 0.3, 0.0022, hatched=True),
    "photo": Stroke(0.009, 0.9),
}


def _noise(rng, length):
    """Return smooth noise in about -1..1 along a path, at each of its lengths (in picture sides)."""
    slow, fast = (np.sin(length * rng.uniform(*f) + rng.uniform(0, 6.3)) for f in ((20, 40), (70, 110)))
    return 0.7 * slow + 0.3 * fast


def _paint_path(pen, points, widths, ink):
    """Move a round nib along the points; everything in pixels."""
    for (x0, y0), (x1, y1), width in zip(points, points[1:], widths, strict=False):
        pen.line((x0, y0, x1, y1), fill=ink, width=round(width))
        r = width / 2
        pen.ellipse((x0 - r, y0 - r, x0 + r, y0 + r), fill=ink)
    (x, y), r = points[-1], widths[-1] / 2
    pen.ellipse((x - r, y - r, x + r, y + r), fill=ink)


def _hatch(image, outline, darkness, width, rng):
    """Hatch an outline from its shaded side: further and denser for darker colours."""
    region, lines = Image.new("L", image.size), Image.new("L", image.size)
    ImageDraw.Draw(region).polygon([tuple(p) for p in outline], fill=255)
    pen = ImageDraw.Draw(lines)
    for angle, share in ((-45, 0.1 + 1.4 * darkness), (20, 1.8 * darkness - 0.9)):
        upright = turn(outline, -angle)  # here the hatching runs along x
        (left, light), (right, shade) = upright.min(0), upright.max(0)
        x = np.linspace(left, right, max(3, int((right - left) / width / 3)))
        y, gap = shade, width * (3.8 - 2 * darkness)
        stop = shade - share * (shade - light) if share > 0.25 else shade  # light colours stay white
        while y > max(stop, light):
            line = np.stack([x, y + gap * 0.2 * _noise(rng, x / image.width)], 1)
            line = turn(line, angle + rng.uniform(-1.5, 1.5))
            pen.line([tuple(p) for p in line], 255, round(width * 0.75))
            y, gap = y - gap, gap * 1.02
    image.paste(INK, mask=ImageChops.multiply(lines, region))


def sketch(scene, stroke, size, rng):
    """Draw a scene on paper, as an RGB image of size x size pixels; `rng` is a random.Random for the strokes."""
    side = size * OVERSAMPLING
    base = max(stroke.width * side, stroke.thinnest * OVERSAMPLING)
    image = Image.new("L", (side, side), 255)
    pen = ImageDraw.Draw(image)
    for shape in scene.shapes:
        steps = np.linalg.norm(np.diff(shape.points, axis=0, prepend=shape.points[:1]), axis=1)
        length = np.cumsum(steps)
        drift = np.stack([_noise(rng, length), _noise(rng, length)], 1)
        points = (shape.points + stroke.wobble * drift) * side
        width = base * min(1, 0.4 + 5 * np.ptp(shape.points, axis=0).max())  # small parts, finer lines
        if shape.closed:
            pen.polygon([tuple(p) for p in points], fill=INK if shape.solid else 255)
            if stroke.hatched and not shape.solid and not shape.plain:
                darkness = 1 - np.dot(shape.colour, (0.3, 0.59, 0.11)) / 255
                _hatch(image, points, darkness, base, rng)
        _paint_path(pen, points, width * (1 + stroke.swing * _noise(rng, length)), INK)
    return image.reduce(OVERSAMPLING).convert("RGB")


def _gradient(corners, size):
    """Return a colour ramp over (width, height) from four corner colours in reading order."""
    ramp = np.array(corners).reshape(2, 2, 3).clip(0, 255).astype(np.uint8)
    return Image.fromarray(ramp).resize(size, Image.Resampling.BICUBIC)


def _photo(scene, size):
    side = size * OVERSAMPLING
    width = max(STROKES["photo"].width * side, STROKES["photo"].thinnest * OVERSAMPLING)
    top, low = scene.sky
    image = _gradient((top, top, low, low), (side, side))
    for shape in scene.shapes:
        points, colour = shape.points * side, shape.colour
        if not shape.closed:
            _paint_path(ImageDraw.Draw(image), points, [width] * len(points), tuple(colour.astype(int)))
            continue
        corner = np.floor(points.min(0)).astype(int)
        across, down = (np.ceil(points.max(0)).astype(int) - corner + 1).tolist()
        box = across, down
        mask = Image.new("L", box)
        ImageDraw.Draw(mask).polygon([tuple(p) for p in points - corner], fill=255)
        lit = colour + 0.35 * (255 - colour)
        image.paste(_gradient((lit, colour, colour, colour * 0.68), box), tuple(int(n) for n in corner), mask)
    return image.reduce(OVERSAMPLING)


def check(names, styles, size):
    for values, choices, noun in ((names, CLASSES, "class"), (styles, (*STYLES, "photo"), "style")):
        for value in values:
            if value not in choices:
                raise InputError(f"unknown {noun} {value!r}: choose from {', '.join(choices)}")
    if size < 16:
        raise InputError(f"`size` must be at least 16 pixels, got {size}")


def draw(name, index, seed=0, style="pen", size=256):
    """Draw an RGB image of size x size pixels.

    name is one of CLASSES; style one of STYLES, or "photo" for the coloured counterpart. Geometry and colours depend
    on (seed, name, index); the style only changes the rendering. The same arguments give the same pixels. InputError
    for an unknown name or style and for a size below 16.
    """
    check([name], [style], size)
    scene = compose(name, index, seed)
    if style == "photo":
        return _photo(scene, size)
    return sketch(scene, STROKES[style], size, random.Random(f"{seed}/{name}/{index}/{style}"))
