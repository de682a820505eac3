"""A scene: coloured shapes, and the random choices that make them."""

import colorsys
import random
from dataclasses import dataclass

import numpy as np

from .outlines import oval, shift, turn

# hue (None: any), saturation, value
PALETTE = {
    "bright": (None, 0.65, 0.88), "accent": (None, 0.6, 0.85), "third": (None, 0.6, 0.9),
    "pastel": (None, 0.25, 0.95), "trim": (None, 0.5, 0.6),
    "white": (0.1, 0.04, 0.98), "snow": (0.58, 0.04, 0.97), "cream": (0.1, 0.15, 0.95), "red": (0, 0.7, 0.77),
    "pink": (0.96, 0.5, 0.9), "orange": (0.07, 0.75, 0.93), "gold": (0.12, 0.7, 0.88), "sun": (0.13, 0.6, 1),
    "light": (0.14, 0.25, 1), "leaf": (0.29, 0.6, 0.64), "green": (0.33, 0.6, 0.5), "fir": (0.37, 0.6, 0.45),
    "autumn": (0.09, 0.75, 0.85), "blue": (0.6, 0.6, 0.65), "violet": (0.78, 0.55, 0.85),
    "glass": (0.54, 0.3, 0.94), "sea": (0.57, 0.6, 0.6), "sand": (0.1, 0.35, 0.85), "brown": (0.07, 0.45, 0.55),
    "rust": (0.04, 0.6, 0.6), "wood": (0.07, 0.5, 0.42), "rock": (0.08, 0.15, 0.5), "slate": (0.6, 0.15, 0.35),
    "silver": (0.6, 0.06, 0.85), "grey": (0.6, 0.08, 0.6), "black": (0.62, 0.12, 0.22), "dark": (0.07, 0.4, 0.22),
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    points: np.ndarray  # 0..1 over the picture
    colour: np.ndarray  # 8-bit RGB
    closed: bool
    solid: bool  # inked all over in a sketch: pupils, buttons
    plain: bool  # never hatched: the backdrop


class Scene:
    """Shapes in painter's order, and the random choices that make them."""

    def __init__(self, key):
        self.rng = random.Random(key)  # a string is seeded through SHA-512: the same in every process
        self.shapes, self.colours, self.sky = [], {}, None
        self.plain, self.transform = True, lambda points: np.array(points)
        self.waves = [(self.u(5, 9), self.u(0, 6), self.u(5, 9), self.u(0, 6)) for _ in range(2)]

    def u(self, low, high):
        return self.rng.uniform(low, high)

    def pick(self, *choices):
        return self.rng.choice(choices)

    def chance(self, share):
        return self.rng.random() < share

    def mix(self, h, s, v):
        """Return an RGB colour near this hue, saturation and value."""
        h = self.u(0, 1) if h is None else h + self.u(-0.02, 0.02)
        s, v = (min(1, max(0, c + self.u(-0.06, 0.06))) for c in (s, v))
        return 255 * np.array(colorsys.hsv_to_rgb(h % 1, s, v))

    def paint(self, name):
        if name not in self.colours:
            self.colours[name] = self.mix(*PALETTE[name])
        return self.colours[name]

    def fill(self, points, colour, solid=False):
        self._add([*points, points[0]], colour, True, solid)

    def line(self, points, colour="dark"):
        self._add(points, colour, False, False)

    def fills(self, points, colour, x=0, solid=False):
        """Fill an outline, given relative to the axis x, and its mirror image."""
        for side in (1, -1):
            self.fill(np.array(points) * (side, 1) + (x, 0), colour, solid)

    def lines(self, points, colour="dark", x=0):
        for side in (1, -1):
            self.line(np.array(points) * (side, 1) + (x, 0), colour)

    def dot(self, x, y, r):
        self.fill(oval(x, y, r, r), "black", solid=True)

    def pose(self, flip, lean):
        """Start the object: everything added from now on is scaled, moved, tilted and maybe flipped."""
        scale, x, y, angle = self.u(0.84, 1), self.u(-4, 4), self.u(-1.5, 1.5), self.u(-lean, lean)
        size = scale * (self.pick(1, -1) if flip else 1), scale
        self.plain = False
        self.transform = lambda points: shift(turn(shift(points, 0, -50) * size, angle), x, 50 + y)

    def _add(self, points, colour, closed, solid):
        p = _dense(self.transform(points)) / 100 + (0.5, 0)
        # the whole scene is bent a little, so that no line is perfectly straight
        (a, b, c, d), (e, f, g, h) = self.waves
        dx = np.sin(a * p[:, 1] + b) + np.sin(c * p[:, 0] + d)
        dy = np.sin(e * p[:, 0] + f) + np.sin(g * p[:, 1] + h)
        p = p + 0.007 * np.stack([dx, dy], 1)
        self.shapes.append(Shape(p, self.paint(colour), closed, solid, self.plain))


def _dense(points):
    """Add points so that none is further than 1.5 from the next; corners stay."""
    steps = np.diff(points, axis=0)
    counts = np.maximum(1, np.ceil(np.hypot(*steps.T) / 1.5)).astype(int)
    share = np.concatenate([np.arange(n) / n for n in counts])[:, None]
    between = np.repeat(points[:-1], counts, 0) + share * np.repeat(steps, counts, 0)
    return np.concatenate([between, points[-1:]])
