"""The scenes of each class, laid out in hundredths of the picture's side.

x goes from -50 to 50, y from 0, the top, to 100.
"""

import math
from itertools import pairwise

import numpy as np

from .outlines import blob, both, cloud, oval, rect, shift, smooth, tube, turn, vase
from .scene import Scene

# sky at the top and lower down, ground (hue, saturation, value), the range of the horizon, details
BACKDROPS = {
    "meadow": ((0.57, 0.45, 0.95), (0.55, 0.12, 1), (0.28, 0.5, 0.72), (68, 78), ("sun", "grass")),
    "road": ((0.56, 0.4, 0.95), (0.1, 0.12, 1), (0.6, 0.05, 0.62), (68, 74), ("sun",)),
    "snow": ((0.6, 0.42, 0.8), (0.58, 0.14, 0.95), (0.58, 0.05, 0.97), (66, 76), ("stars",)),
    "sea": ((0.57, 0.35, 0.97), (0.1, 0.15, 1), (0.55, 0.55, 0.72), (62, 68), ("sun", "ripples")),
    "reef": ((0.52, 0.4, 0.92), (0.57, 0.6, 0.65), (0.12, 0.35, 0.85), (86, 90), ("bubbles", "weed")),
    "table": ((0.12, 0.15, 0.95), (0.1, 0.22, 0.85), (0.07, 0.5, 0.58), (70, 78), ()),
    "rain": ((0.6, 0.2, 0.7), (0.6, 0.08, 0.92), (0.58, 0.1, 0.6), (88, 93), ("drops",)),
    "air": ((0.57, 0.5, 0.95), (0.55, 0.1, 1), (0.3, 0.45, 0.75), (90, 95), ("sun", "grass")),
    "dusk": ((0.68, 0.45, 0.5), (0.04, 0.35, 0.95), (0.62, 0.35, 0.4), (84, 90), ("moon", "stars")),
    "space": ((0.66, 0.6, 0.25), (0.72, 0.5, 0.5), (0.08, 0.15, 0.6), (92, 95), ("moon", "stars")),
}


def backdrop(s, kind):
    top, low, ground, horizon, parts = BACKDROPS[kind]
    s.sky, s.colours["ground"] = (s.mix(*top), s.mix(*low)), s.mix(*ground)
    y = s.u(*horizon)
    if "moon" in parts or ("sun" in parts and s.chance(0.5)):
        s.fill(oval(s.pick(-39, 39), s.u(9, 15), *[s.u(5.5, 8)] * 2), "light" if "moon" in parts else "sun")
    elif "sun" in parts:
        s.fill(cloud(s.pick(-34, 34), s.u(8, 16), 12, 6, 7), "snow")
    s.fill([*smooth((-80, y), (0, y - s.u(0, 3)), (80, y)), (80, 130), (-80, 130)], "ground")
    for x in (s.u(-48, -20), s.u(20, 48), s.pick(-1, 1) * s.u(30, 48)):
        high, deep = s.u(20, y - 10), s.u((y + 100) / 2, 96)
        if "grass" in parts:
            s.line(shift([(-2, -3), (0, 0), (0.5, -4.5), (1, 0), (3.5, -3)], x, deep), "fir")
        if "ripples" in parts:
            s.line(shift(smooth((-7, 0), (-3, -1.5), (0, 0), (4, -1.5), (8, 0)), x, deep), "glass")
        if "stars" in parts:  # flakes, when it snows
            for angle in (0, 60, 120):
                s.line(turn([(x - 1.8, high), (x + 1.8, high)], angle, x, high), "white")
        if "drops" in parts:
            s.line([(x, high), (x - 2, high + 7)], "glass")
        if "bubbles" in parts:
            s.fill(oval(x, high, 1.8, 1.8), "glass")
        if "weed" in parts:
            bend = s.u(2, 5)
            s.fill(tube(smooth((x, 100), (x + bend, 88), (x - bend, 77), (x, 68)), 2.2, 0.3), "fir")


# --- the classes ------------------------------------------------------------------------------------------
# Outlines are packed by hand: one point a line would hide the shapes.
# fmt: off


def house(s):
    half, top = s.u(27, 37), s.u(44, 54)
    peak, ridge, x = top - s.u(22, 31), s.pick(0, 0, 12), s.pick(-18, 18)
    if s.chance(0.75):
        s.line(smooth((x, peak), (x + 3, peak - 6), (x - 2, peak - 10), (x + 3, peak - 15)), "white")
        s.fill(rect(x - 4.5, peak + 2, x + 4.5, top), "brown")
    s.fill(rect(-half, top, half, 92), "pastel")
    s.fill(both((ridge, peak), (6 + half, top + 1)), s.pick("red", "rust", "blue"))
    door, *windows = s.rng.sample([-0.6 * half, 0, 0.6 * half], 3)
    s.fill(rect(door - 6.5, 70, door + 6.5, 92), "trim")
    s.dot(door + 4, 82, 1)
    y = s.u(63, 67)
    for x in windows:
        s.fill(rect(x - 6, y - 6, x + 6, y + 7), "glass")
        s.line([(x, y - 6), (x, y + 7)], "trim")
        s.line([(x - 6, y), (x + 6, y)], "trim")
    if not ridge:
        s.fill(oval(0, peak * 0.4 + top * 0.6, 4.5, 4.5), "glass")


def tree(s):
    width = s.u(3.5, 6)
    s.fill(vase((width * 0.7, 40), (width, 78), (4 + width * 1.5, 93)), "wood")
    if s.chance(0.35):  # a fir, from its lowest tier up
        tiers, spread = s.pick(3, 4), s.u(26, 34)
        for k in np.arange(tiers, 0, -1) / tiers:
            tip, low, half = 4 + 56 * (k - 1 / tiers), 10 + 66 * k, spread * (0.4 + 0.6 * k)
            s.fill(both(*smooth((0, tip), (half * 0.4, (tip + low) / 2), (half, low)), (0, low + 3)), "green")
        return
    rx, ry, y = s.u(30, 40), s.u(26, 32), s.u(36, 40)
    s.line([(0, 80), (2, 72)])
    s.fill(cloud(0, y, rx, ry, s.pick(9, 10, 11, 12)), s.pick("leaf", "leaf", "green", "autumn"))
    for dx, dy in ((-0.5, 0.2), (-0.15, -0.45), (0.45, -0.3), (0.1, 0.15), (0.55, 0.35), (-0.2, 0.6)):
        spot = dx * rx, y + dy * ry
        if s.chance(0.5):
            s.fill(oval(*spot, 2.8, 2.8), "red")
        else:
            s.line(oval(*spot, 4, 3, 200, 340))


def cat(s):
    fur, iris = s.pick("orange", "sand", "grey", "brown", "black"), s.pick("sun", "leaf", "glass")
    wide, curl, ear = s.u(17, 22), s.u(-5, 5), s.u(14, 18)
    x, y = s.u(-3, 3), s.u(29, 33)
    s.fill(tube(smooth((12, 86), (30, 86), (36, 70), (30 + curl, 56), (36 + curl, 46)), 4.5, 1.2), fur)
    s.fill(vase((0, 40), (wide * 0.7, 50), (wide, 75), (2 + wide, 88), (6, 92)), fur)
    s.fill(blob((0, 48), (7, 58), (0, 70), (-7, 58)), "cream")
    s.lines(smooth((10, 66), (11, 80), (10, 87)))
    s.fills(oval(6, 90, 5.5, 3.5), "cream")
    s.fills([(6, y - 10), (19, y - ear - 10), (20, y - 2)], fur, x)
    s.fills([(10, y - 10), (17, y - ear - 3), (17, y - 6)], "pink", x)
    s.fill(oval(x, y, 22.5, s.u(16.5, 18.5)), fur)
    if s.chance(0.6):
        for dx in (-5, 0, 5):
            s.fill([(x + dx - 1.4, y - 15), (x + dx + 1.4, y - 15), (x + dx * 0.8, y - 8)], "dark")
    s.fills(oval(9, y, 4.2, 4.5), iris, x)
    s.fills(oval(9, y, 1.6, 3.8), "black", x, solid=True)
    for dy in (-2, 1.5, 5):
        s.lines([(11, y + 7 + dy * 0.4), (29, y + 6 + dy)], "dark", x)
    s.lines(smooth((0, y + 8.5), (2.5, y + 11), (6, y + 9.5)), "dark", x)
    s.fill([(x - 2.5, y + 5.5), (x + 2.5, y + 5.5), (x, y + 8.5)], "pink", solid=True)


def fish(s):
    deep, tail = s.u(19, 27), s.u(15, 22)
    x = np.linspace(43, -27, 40)
    edge = deep * np.sin(np.pi * ((43 - x) / 70) ** 0.8) ** 0.75
    s.fill(blob((-22, 50), (-43, 50 - tail), (-37, 50), (-43, 50 + tail), (-26, 53)), "accent")
    s.fill(blob((22, 50 - deep * 0.7), (5, 42 - deep), (-14, 44 - deep * 0.9), (-10, 50)), "accent")
    s.fill(blob((12, 50 + deep * 0.7), (-2, 57 + deep), (-8, 50 + deep * 0.7)), "accent")
    s.fill(np.stack([[*x, *x[::-1]], [*(50 - edge), *(50 + edge[::-1])]], 1), "bright")
    if s.chance(0.5):
        for left in (-14, -3, 8):
            a, b = np.interp((left, left + 5), x[::-1], edge[::-1])
            s.fill([*smooth((left, 50 - a), (left - 3, 50), (left, 50 + a)),
                    *smooth((left + 5, 50 + b), (left + 2, 50), (left + 5, 50 - b))], "accent")
    else:
        for left in (-16, -7, 2, 11):
            for k in (-0.5, 0, 0.5):
                s.line(oval(left, 50 + k * np.interp(left, x[::-1], edge[::-1]), 3.5, 4.5, 90, 270), "trim")
    s.line(smooth((20, 50 - deep * 0.6), (16.5, 50), (20, 50 + deep * 0.6)), "trim")
    s.fill(oval(29, 46, 4.2, 4.2), "white")
    s.dot(30, 46, 2)
    s.line(smooth((40, 54.5), (36.5, 56), (33.5, 55)))
    s.fill(blob((14, 55), (3, 55), (2, 65)), "accent")


def flower(s):
    petal, y, lean = s.pick("pink", "red", "sun", "violet", "blue", "white"), s.u(33, 36), s.u(-6, 6)
    s.fill(tube(smooth((0, y), (lean, 62), (0, 95)), 1.4, 1.8), "green")
    for side in (-1, 1):
        low, high = s.u(78, 86), s.u(60, 70)
        s.fill(blob((0, low), (side * 12, high), (side * 27, high - 1), (side * 16, low - 2)), "green")
        s.line([(side * 4, low - 3), (side * 20, high + 2)], "fir")
    if s.chance(0.25):  # a tulip
        s.fill(blob((0, 10), (13, 28), (0, 50), (-13, 28)), petal)
        s.fills([*smooth((0, 51), (17, 44), (21, 12)), *smooth((6, 28), (0, 42))], petal)
        return
    count, inner, long = s.pick(5, 6, 8, 10), s.u(7.5, 10), s.u(25, 28)
    half, bend = 27 * math.sin(math.pi / count) * s.pick(0.75, 1) + 1.5, y - long * 0.65
    for k in range(count):
        leaf = blob((0, y), (half, bend), (0, y - long), (-half, bend))
        s.fill(turn(leaf, 360 * k / count + lean, 0, y), petal)
    s.fill(oval(0, y, inner, inner), "gold")
    for x, seed in oval(0, y, inner * 0.55, inner * 0.55)[::12]:
        s.dot(x, seed, 0.8)


def boat(s):
    mast, top, right = s.u(-4, 4), s.u(7, 12), s.u(28, 36)
    if s.chance(0.7):
        s.fill([(mast, top - 4), (mast - 12, top - 1), (mast, top + 2.5)], "red")
    s.fill([*smooth((mast, top + 2), (right - 13, 36), (right, 62)), (mast, 62)], s.pick("bright", "white"))
    s.fill([*smooth((mast, top + 10), (mast - 15, 40), (-34, 62)), (mast, 62)], "accent")
    s.fill(rect(mast - 1.4, top, mast + 1.4, 75), "wood")
    if s.chance(0.5):
        s.line(smooth((mast + 3, 42), (right - 12, 41)), "trim")
    s.fill([(-40, 68), (42, 66), *smooth((36, 77), (28, 87)), *smooth((-24, 87), (-34, 80))],
           s.pick("rust", "brown", "blue", "red"))
    s.line([(-38, 73), (39, 71.5)], "white")
    if s.chance(0.5):
        for x in (-16, 0, 16):
            s.fill(oval(x, 77.5, 2.5, 2.5), "glass")
    s.plain, x = True, np.linspace(-80, 80, 90)
    crests = 85.5 - 2.2 * np.abs(np.sin(x * s.u(0.14, 0.2)))
    s.fill([*np.stack([x, crests], 1), (80, 130), (-80, 130)], "sea")


def mushroom(s):
    half, y, top, w = s.u(34, 42), s.u(48, 54), s.u(10, 18), s.u(8, 12)
    s.fill(oval(0, y, half * 0.97, 10), "sand")
    for k in (0.32, 0.55, 0.75):
        s.lines([(k * half, y + 9.5 * math.sqrt(1 - k * k)), (k * half * 0.8, y)], "brown")
    s.fill(vase((w, y - 5), (w, 70), (3 + w * 1.3, 86), (w, 93)), "cream")
    if s.chance(0.5):
        s.fill(both(*smooth((w, y + 10), (5 + w, y + 17)), (0, y + 20)), "cream")
    s.fill(vase((0, top), (half * 0.65, top * 0.7 + y * 0.3), (half, y + 1), (half * 0.6, y + 2), (0, y + 3)),
           s.pick("red", "red", "rust", "autumn", "brown"))
    for dx, dy, r in ((-0.1, 0.22, 5), (0.35, 0.35, 4.5), (-0.5, 0.6, 5), (0.08, 0.68, 6), (0.66, 0.78, 4)):
        s.fill(oval(dx * half, top + dy * (y - top), r * s.u(0.8, 1.15), r * 0.8), "white")


def umbrella(s):
    wide, high, panels = s.u(40, 44), s.u(30, 37), s.pick(4, 5, 6)
    s.fill(tube(np.array([(0, 7), (0, 80), *oval(-6, 82, 6, 9, 0, 170)]), 1.4, 1.8), "wood")
    angle = np.linspace(0, np.pi / 2, 24)
    ribs = [
        np.stack([k * wide * np.sin(angle), 48 - high * np.cos(angle)], 1)
        for k in np.sin(np.linspace(-np.pi / 2, np.pi / 2, panels + 1))
    ]
    for n, (left, right) in enumerate(pairwise(ribs)):
        middle = (left[-1] + right[-1]) / 2 - (0, 4.5)
        s.fill([*left, *smooth(left[-1], middle, right[-1]), *right[::-1]], ("bright", "accent")[n % 2])


def car(s):
    roof, front, r = s.u(30, 36), s.u(10, 18), s.u(9.5, 12)
    tail, back = s.pick((-38, -34), (-30, -20), (-24, -14))
    pillar = (back + front) / 2
    s.fill([(tail, 58), *smooth((tail, 54), (back, roof), (front - 4, roof), (front + 15, 56)), (30, 60)],
           "bright")
    s.fill([(tail + 6, 54), (back + 3, roof + 5), (pillar - 1.5, roof + 4.5), (pillar - 1.5, 54)], "glass")
    s.fill([(pillar + 1.5, 54), (pillar + 1.5, roof + 4.5), (front - 3, roof + 5), (front + 10, 54)], "glass")
    s.fill(smooth((-44, 80), (-45, 60), (-40, 55), (-10, 54.5), (25, 56), (40, 60), (45, 70), (44, 80)),
           "bright")
    s.line([(pillar, 56), (pillar, 78)])
    s.line([(pillar + 5, 62), (pillar + 10, 62)])
    s.fill(oval(40, 65, 2.5, 3.5), "light")
    s.fill(rect(-45, 63, -41.5, 68), "red")
    s.fill(rect(-47, 76, 47, 81), "silver")
    for x in (-25, 26):
        s.fill(oval(x, 81, r, r), "black")
        s.fill(oval(x, 81, r * 0.55, r * 0.55), "silver")
        s.dot(x, 81, 1.4)


def snail(s):
    x, y, r = s.u(-10, -5), s.u(50, 54), s.u(27, 31)
    skin, head, tilt = s.pick("sand", "gold", "leaf", "cream"), s.u(40, 48), s.u(-2, 3)
    for foot in (31, 38):
        tip = foot * 1.6 - 18 + tilt, head - 18
        s.line(smooth((foot, head + 5), (foot * 1.3 - 9, head - 8), tip), skin)
        s.dot(*tip, 2)
    s.fill(blob((-47, 89), (-25, 77), (5, 77), (19, 70), (23, head + 5), (33, head - 2), (43, head + 6),
                (40, 72), (28, 89), (-10, 90.5)), skin)
    s.fill(oval(x, y, r, r), "accent")
    turns = np.linspace(0, 2 * np.pi * s.u(2.3, 3), 90)
    reach = r * (1 - turns / turns[-1])
    s.line(np.stack([x + reach * np.cos(turns + 1), y + reach * np.sin(turns + 1)], 1))
    s.line(smooth((42, head + 12), (38.5, head + 14), (35, head + 12)))


def teapot(s):
    wide, top, low = s.u(25, 29), s.u(30, 38), 90
    y = (top + low) / 2
    grip = smooth((6 - wide, top + 10), (-12 - wide, top + 5), (-16 - wide, y), (4 - wide, 78))
    s.fill(tube(grip, 2.4, 2.4), "trim")
    s.fill(blob((wide - 8, y - 2), (wide + 6, y - 6), (wide + 10, top + 2), (wide + 20, top - 2),
                (wide + 18, top + 8), (wide + 12, y + 6), (wide - 6, y + 14)), "accent")
    s.fill(both((wide * 0.55, low - 3), (wide * 0.6, low + 3)), "trim")
    s.fill(vase((wide * 0.5, top), (wide, y - 6), (wide * 0.96, y + 9), (wide * 0.55, low)), "accent")
    s.fill(vase((0, top - 11), (wide * 0.4, top - 7), (wide * 0.56, top + 1), (0, top + 3)), "trim")
    s.fill(oval(0, top - 13, 3.5, 3.5), "trim")
    if s.chance(0.5):
        for k in (0.2, 0.6):
            s.fills(oval(k * wide, y + 4 - 4 * k, 3.5, 3.5), "white")
    else:
        for dy in (-5, 6):
            s.line(smooth((0.5 - wide, y + dy), (0, y + dy + 5), (wide - 0.5, y + dy)), "trim")
    for x in (wide + 15, wide + 20):
        s.line(smooth((x, top - 6), (x - 3, top - 12), (x + 1, top - 17), (x - 2, top - 23)), "grey")


def butterfly(s):
    high, wide, low = s.u(10, 17), s.u(36, 43), s.u(82, 90)
    s.fills(blob((2, 52), (10, 28), (wide * 0.8, high), (wide, high + 12), (wide * 0.85, 45), (16, 56)),
            "bright")
    s.fills(blob((2, 54), (18, 54), (wide * 0.8, 64), (wide * 0.7, low - 6), (16, low), (6, 70)), "accent")
    s.fills(oval(wide * 0.66, high + 16, 6, 7.5), "third")
    s.fills(oval(wide * 0.5, 69, 5, 6), "third")
    s.fills(oval(12, 45, 2.8, 3.5), "accent")
    s.lines(smooth((1, 32), (5, 20), (12, 12)))
    s.fills(oval(12, 12, 1.4, 1.4), "black", solid=True)
    s.fill(blob((0, 36), (3.5, 50), (0, 78), (-3.5, 50)), "wood")
    s.fill(oval(0, 34.5, 4, 4), "wood")


def snowman(s):
    low, middle, top = s.u(17.5, 20), s.u(13, 14.2), s.u(10, 11.2)
    base = 93 - low
    chest = base - low - middle * 0.72
    face = chest - middle - top * 0.68
    neck, brim, crown = face + top * 0.78, face - top * 0.72, s.u(10, 13)
    for side in (-1, 1):
        x, y = s.u(36, 42), chest - s.u(2, 16)
        s.line(np.array([(10, chest), (26, chest + 2), (x, y)]) * (side, 1), "wood")
        s.line(np.array([(x - 3, y - 7), (x - 4, y + 1), (x + 5, y + 2)]) * (side, 1), "wood")
    for y, r in ((base, low), (chest, middle), (face, top)):
        s.fill(oval(0, y, r * 1.05, r), "snow")
    if s.chance(0.7):
        s.fill(blob((4, neck), (12, neck + 14), (6, neck + 17), (2, neck + 4)), "accent")
        s.fill(vase((0, neck), (10, neck - 3), (11, neck + 2), (0, neck + 5)), "accent")
    for y in (chest - 2, chest + 6, base - 6):
        s.dot(0, y, 1.6)
    s.fills(oval(4.5, face - 2.5, 1.5, 1.5), "black", solid=True)
    s.line(oval(0, face + 2.5, 6, 4.5, 25, 155))
    s.fill([(-1, face), (0, face + 3.5), (14, face + 3.5)], "orange")
    s.fill(rect(-9, brim - crown, 9, brim), "slate")
    s.fill(rect(-9, brim - 4, 9, brim), "accent")
    s.fill(oval(0, brim, 15, 2.2), "slate")


def lighthouse(s):
    colour, bands = s.pick("red", "red", "blue", "green"), s.pick(3, 5, 7)
    if s.chance(0.6):
        s.fills([(5, 22), (75, 4), (75, 32)], "light")
    edge = np.linspace((9, 29), (s.u(16, 19), 86), bands + 1)
    for k, band in enumerate(pairwise(edge)):
        s.fill(both(*band), (colour, "white")[k % 2])
    s.fill(rect(-6, 17, 6, 27), "sun")
    s.lines([(2, 17), (2, 27)], "slate")
    s.fill(vase((0, 7), (5, 10), (9, 17.5)), colour)
    s.fill(rect(-12, 26.5, 12, 30), "slate")
    for y in (42, 58):
        s.fill(rect(-2.5, y, 2.5, y + 7), "slate")
    s.fill([(-5.5, 86), *oval(0, 76, 5, 5, 180, 360), (5.5, 86)], "wood")
    crags = [(x, 88 - s.u(0, 5)) for x in (-36, -24, -13, 2, 14, 26, 37)]
    s.fill([(-44, 110), *crags, (45, 110)], "rock")


def owl(s):
    wide, eye, tuft, iris = s.u(27, 31), s.u(9.5, 11.5), s.u(6, 12), s.pick("sun", "orange", "gold")
    feathers, wing = s.pick(("brown", "wood"), ("sand", "brown"), ("grey", "slate"))
    s.fill(tube(smooth((-70, 90), (-20, 87), (20, 90), (70, 86)), 3.5, 2.5), "wood")
    s.fill(both((0, 17), (10, 14), (wide * 0.9, 14 - tuft),
                *smooth((wide * 0.92, 28), (wide, 55), (wide * 0.8, 78), (0, 87))), feathers)
    s.fill(vase((0, 40), (wide * 0.62, 52), (wide * 0.6, 72), (0, 84)), "cream")
    for y, row in ((54, (-8, 0, 8)), (62, (-12, -4, 4, 12)), (70, (-8, 0, 8))):
        for x in row:
            s.line([(x - 2.2, y), (x, y + 3), (x + 2.2, y)], "brown")
    s.fills(blob((wide * 0.85, 42), (2 + wide * 1.08, 60), (wide * 0.75, 82), (wide * 0.62, 60)), wing)
    for x in (8, 12, 16):
        s.fills(oval(x, 87.5, 2, 3.5), "gold")
    s.fills(oval(11.5, 31, eye + 2.5, eye + 2.5), "cream")
    s.fills(oval(11.5, 31, eye * 0.75, eye * 0.75), iris)
    s.fills(oval(11.5, 31, eye * 0.42, eye * 0.42), "black", solid=True)
    s.fill([(-3.5, 35.5), (3.5, 35.5), (0, 45)], "gold")


def rocket(s):
    wide, nose, fire = s.u(12, 15), s.u(5, 9), s.u(20, 25)
    colour = s.pick("red", "orange", "blue", "leaf")
    s.fill(vase((9, 72), (10, 81), (0, 72 + fire)), "orange")
    s.fill(vase((5, 72), (5, 77), (0, 72 + fire * 0.55)), "sun")
    s.fills([*smooth((wide * 0.9, 50), (wide + 12, 62), (wide + 14, 82)), (wide * 0.7, 71)], colour)
    hull = smooth((0, nose), (wide * 0.75, 25), (wide, 45), (wide * 0.65, 72))
    s.fill(both(*hull), "silver")
    s.fill(both(*hull[:13]), colour)
    s.fill(oval(0, 38, 6.5, 6.5), "grey")
    s.fill(oval(0, 38, 4.5, 4.5), "glass")
    if s.chance(0.6):
        s.fill(oval(0, 54, 3.5, 3.5), "glass")
    s.fill(blob((0, 60), (2, 70), (0, 82), (-2, 70)), colour)


# class: its drawing, its backdrops, whether it may be flipped, how far it may lean (degrees)
SCENES = {
    "boat": (boat, ("sea",), True, 4),
    "butterfly": (butterfly, ("air", "meadow"), False, 20),
    "car": (car, ("road",), True, 1),
    "cat": (cat, ("meadow", "table"), True, 2),
    "fish": (fish, ("reef",), True, 12),
    "flower": (flower, ("meadow", "air"), True, 5),
    "house": (house, ("meadow", "snow"), True, 1),
    "lighthouse": (lighthouse, ("sea",), True, 2),
    "mushroom": (mushroom, ("meadow", "air"), True, 6),
    "owl": (owl, ("air", "dusk"), True, 3),
    "rocket": (rocket, ("space", "air"), False, 30),
    "snail": (snail, ("meadow",), True, 2),
    "snowman": (snowman, ("snow",), True, 3),
    "teapot": (teapot, ("table",), True, 2),
    "tree": (tree, ("meadow", "snow"), True, 3),
    "umbrella": (umbrella, ("rain",), True, 14),
}
CLASSES = tuple(SCENES)
# fmt: on


def compose(name, index, seed=0):
    """Return the scene of (seed, name, index)."""
    add_object, backdrops, flip, lean = SCENES[name]
    scene = Scene(f"{seed}/{name}/{index}")
    backdrop(scene, scene.pick(*backdrops))
    scene.pose(flip, lean)
    add_object(scene)
    return scene
