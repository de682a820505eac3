"""Outlines of shapes, as arrays of points (n, 2)."""

import math

import numpy as np


def oval(x, y, rx, ry, start=0, end=360):
    angle = np.radians(np.linspace(start, end, max(8, round(abs(end - start) / 5))))
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], 1)


def rect(x0, y0, x1, y1):
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])


def smooth(*points, closed=False):
    """Return a Catmull-Rom curve through the points."""
    p = np.array(points, float)
    p = np.concatenate([p[-1:], p, p[:2]] if closed else [p[:1], p, p[-1:]])
    t = np.linspace(0, 1, 12, endpoint=False)[:, None]
    parts = [
        b + t / 2 * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
        for a, b, c, d in zip(p, p[1:], p[2:], p[3:], strict=False)
    ]
    return np.concatenate(parts if closed else [*parts, p[-1:]])


def blob(*points):
    return smooth(*points, closed=True)


def cloud(x, y, rx, ry, bumps):
    angle = np.linspace(0, 2 * np.pi, 16 * bumps, endpoint=False)
    radius = 0.85 + 0.2 * np.abs(np.sin(angle * bumps / 2))
    return np.stack([x + rx * radius * np.cos(angle), y + ry * radius * np.sin(angle)], 1)


def tube(path, start, end):
    """Return the outline of a path whose half width changes from start to end."""
    along = np.gradient(path, axis=0)
    side = np.stack([-along[:, 1], along[:, 0]], 1) / np.linalg.norm(along, axis=1, keepdims=True)
    side *= np.linspace(start, end, len(path))[:, None]
    return np.concatenate([path + side, (path - side)[::-1]])


def both(*half):
    """Close the right half of a symmetric outline, given from top to bottom, with its mirror image."""
    return np.concatenate([half, (np.array(half) * (-1, 1))[::-1]])


def vase(*half):
    return both(*smooth(*half))


def shift(points, x, y):
    return np.array(points) + np.array([x, y])


def turn(points, degrees, x=0, y=0):
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return (np.array(points) - (x, y)) @ np.array([(c, s), (-s, c)]) + (x, y)
