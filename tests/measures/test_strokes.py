"""Known answers: drawings whose strokes and paper are known."""

import math

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from sketch_perceptual.drawings import CLASSES, draw
from sketch_perceptual.errors import InputError
from sketch_perceptual.measures.strokes import (
    FAR,
    LEVEL,
    UNITS,
    describe_strokes,
    equal_ink_level,
    mean_strokes,
    measure_strokes,
    stroke_differences,
    stroke_distance,
)

SCALE = 8  # drawn large and reduced, so that edges are smooth


def drawn(*shapes, side=128):
    """A drawing of `(kind, coordinates, width)`, black on white."""
    image = Image.new("L", (side * SCALE, side * SCALE), 255)
    pen = ImageDraw.Draw(image)
    for kind, coordinates, width in shapes:
        scaled = [SCALE * value for value in coordinates]
        getattr(pen, kind)(
            scaled, **({"width": SCALE * width} | ({"outline": 0} if kind == "ellipse" else {"fill": 0}))
        )
    return image.resize((side, side), Image.Resampling.BOX)


BAR = ("line", (20, 64, 108, 64), 4)
UPRIGHT = ("line", (64, 20, 64, 108), 4)
RING = ("ellipse", (24, 24, 104, 104), 4)


@pytest.mark.parametrize(
    ("shapes", "ends", "junctions", "pieces"),
    [
        ([BAR], 2, 0, 1),
        ([RING], 0, 0, 1),
        ([BAR, UPRIGHT], 4, 1, 1),
        ([("line", (20, 64, 60, 64), 4), ("line", (70, 64, 108, 64), 4)], 4, 0, 2),
        ([("line", (-10, 64, 140, 64), 4)], 0, 0, 1),
    ],
    ids=["a bar", "a ring", "a cross", "a broken bar", "a bar through the frame"],
)
def test_ends_junctions_and_pieces(shapes, ends, junctions, pieces):
    image = drawn(*shapes)
    strokes = measure_strokes(image)
    skeleton = 100 * ends / strokes.ends if ends else None
    assert strokes.pieces == pieces
    if skeleton is None:
        assert strokes.ends == 0
    else:
        assert 70 < skeleton < 180
        assert strokes.junctions == pytest.approx(100 * junctions / skeleton)


@pytest.mark.parametrize("width", [2, 3, 4, 6, 9])
@pytest.mark.parametrize("angle", [0, 30])
def test_width(width, angle):
    image = drawn(("line", (20, 64, 108, 64), width)).rotate(angle, Image.Resampling.BICUBIC, fillcolor=255)
    assert measure_strokes(image).width == pytest.approx(width, abs=0.8)


@pytest.mark.parametrize("angle", [0, 15, 45, 90])
def test_a_blur_widens_edges_by_its_deviation_in_any_direction(angle):
    sharp = drawn(("line", (20, 64, 108, 64), 8)).rotate(angle, Image.Resampling.BICUBIC, fillcolor=255)
    edges = {r: measure_strokes(sharp.filter(ImageFilter.GaussianBlur(r))).edge for r in (0, 1, 1.5)}
    assert edges[0] < 1.1
    for deviation in (1, 1.5):  # 10 to 90 % of a Gaussian's integral is 2.56 deviations
        assert edges[deviation] == pytest.approx(2.56 * deviation, rel=0.06)


@pytest.mark.parametrize("angle", [0, 5, 10, 15, 40])
def test_a_line_of_one_pixel_is_one_piece(angle):
    line = drawn(("line", (20, 64, 108, 64), 1)).rotate(angle, Image.Resampling.BICUBIC, fillcolor=255)
    strokes = measure_strokes(line)
    assert strokes.pieces == 1
    assert 30 < 100 / strokes.ends < 48  # two ends, on 67 to 88 px of skeleton


@pytest.mark.parametrize("angle", range(0, 90, 15))
@pytest.mark.parametrize("width", [2, 3, 4, 6])
def test_a_cross_has_a_junction_at_any_angle(width, angle):
    image = drawn(("line", (20, 64, 108, 64), width), ("line", (64, 20, 64, 108), width))
    strokes = measure_strokes(image.rotate(angle, Image.Resampling.BICUBIC, fillcolor=255))
    assert strokes.junctions > 0
    assert strokes.pieces == 1


def test_dots_have_two_ends():
    lines = (drawn(*(("line", (x, 64, x + dash, 64), 4) for x in range(12, 108, 12))) for dash in (8, 4))
    dashes, dots = map(measure_strokes, lines)
    assert (dashes.pieces, dots.pieces) == (8, 8)
    assert dots.ends > 1.5 * dashes.ends


def test_paper_is_measured_apart_from_ink():
    levels = np.full((64, 64, 3), 255, np.uint8) - np.array([0, 20, 40], np.uint8)
    levels[20:24, 8:56] = 0
    strokes = measure_strokes(Image.fromarray(levels))
    grey = (0.299 * 255 + 0.587 * 235 + 0.114 * 215) / 255
    assert strokes.paper == pytest.approx(grey, abs=0.005)
    assert strokes.paper_spread == pytest.approx(0, abs=1e-6)
    assert strokes.tint == pytest.approx(40 / 255)
    assert strokes.stroke == 0
    assert strokes.ink == pytest.approx(4 * 48 / 64**2)


def test_specks():
    image = drawn(BAR, *(("line", (x, 20, x + 4, 20), 4) for x in (20, 40, 60)))
    strokes = measure_strokes(image)
    assert (strokes.pieces, strokes.specks) == (4, 3)


@pytest.mark.parametrize("grey", [0, 255])
def test_an_empty_page_has_no_strokes(grey):
    strokes = measure_strokes(Image.new("RGB", (32, 32), (grey,) * 3))
    if grey:
        assert (strokes.ink, strokes.pieces, strokes.paper) == (0, 0, 1)
        assert math.isnan(strokes.width)
    else:
        assert strokes.ink == 1
        assert math.isnan(strokes.paper)


def drawings(seed):
    return [draw(name, 0, seed, "pen", 96) for name in CLASSES]


def test_equal_ink_undoes_a_tone_curve():
    pictures = drawings(0)
    darker = [image.convert("L").point(lambda x: 255 * (x / 255) ** 3) for image in pictures]
    ink = mean_strokes([measure_strokes(image) for image in pictures])["ink"]
    level = equal_ink_level(darker, ink)
    assert level < LEVEL - 0.2
    plain, undone, blacker = (
        mean_strokes([measure_strokes(image, at) for image in images])
        for images, at in ((pictures, LEVEL), (darker, level), (darker, LEVEL))
    )
    assert undone["ink"] == pytest.approx(ink, rel=0.02)
    assert undone["ends"] == pytest.approx(plain["ends"], rel=0.02)
    assert undone["width"] == pytest.approx(plain["width"], rel=0.02)
    assert blacker["width"] > plain["width"] + 0.2


def test_sets_differ_by_what_was_changed():
    true = [measure_strokes(image) for image in drawings(0)]
    assert stroke_distance(stroke_differences(true, true)) == 0
    like = stroke_differences([measure_strokes(image) for image in drawings(1)], true)
    grey = [image.convert("L").point(lambda x: 0.9 * x) for image in drawings(0)]
    greyer = stroke_differences([measure_strokes(image) for image in grey], true)
    assert greyer["paper"].difference == pytest.approx(-0.1, abs=0.01)
    assert greyer["paper"].distance == pytest.approx(0.1 / UNITS["paper"], rel=0.1)
    blurred = [measure_strokes(image.filter(ImageFilter.GaussianBlur(1))) for image in drawings(1)]
    assert stroke_distance(like) < stroke_distance(greyer)
    assert stroke_distance(like) < stroke_distance(stroke_differences(blurred, true))


def test_a_blank_page_is_far_from_a_drawing():
    true = [measure_strokes(image) for image in drawings(0)]
    like = [measure_strokes(image) for image in drawings(1)]
    blank = [measure_strokes(Image.new("L", (96, 96), 255))] * len(like)
    some, all_blank = (
        stroke_differences(blank[:count] + like[count:], true) for count in (len(like) // 2, len(blank))
    )
    assert all_blank["width"].distance == FAR
    assert some["width"].distance > FAR / 2
    assert stroke_distance(stroke_differences(like, true)) + 1 < stroke_distance(some) < stroke_distance(all_blank)
    assert stroke_distance(stroke_differences(blank, blank)) == 0
    single = stroke_differences(true[:1], true[:1])
    assert stroke_distance(single) == 0
    assert math.isnan(single["ink"].interval)


def test_drawings_without_paper_are_described():
    page = Image.new("L", (64, 64), 255)
    pen = ImageDraw.Draw(page)
    for x in range(0, 64, 6):
        pen.line((x, 0, x, 63), fill=0, width=2)
    text = describe_strokes([page])
    assert text.endswith("no paper between them") and "nan" not in text
    assert describe_strokes([Image.new("L", (8, 8), 255)]) == "no strokes"


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 2)])
def test_tiny_pictures_are_measured(size):
    image = Image.new("L", size, 255)
    image.putpixel((0, 0), 0)
    assert measure_strokes(image).pieces == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda: mean_strokes([]),
        lambda: describe_strokes([]),
        lambda: stroke_distance({}),
        lambda: equal_ink_level([], 0.1),
    ],
)
def test_nothing_to_measure_is_said(call):
    with pytest.raises(InputError):
        call()


def test_the_level_for_equal_ink_always_has_ink():
    binary = [image.convert("L").point(lambda x: 0 if x < 250 else 255) for image in drawings(0)]
    share = measure_strokes(binary[0]).ink
    level = equal_ink_level(binary[:1], share / 4)
    assert 0 < level < 1
    assert measure_strokes(binary[0], level).ink == pytest.approx(share)


@pytest.mark.parametrize("ink", [0, 1, -0.1, "a"])
def test_a_share_of_ink_lies_between_0_and_1(ink):
    with pytest.raises(InputError, match="ink"):
        equal_ink_level(drawings(0)[:1], ink)
