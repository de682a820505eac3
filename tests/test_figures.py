"""Figures whose names are anything a folder can be called."""

import io

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image, ImageOps

from sketch_perceptual import figures
from sketch_perceptual.figures import (
    as_label,
    fit_font,
    fonts,
    image_grid,
    is_missing,
    learning_curve,
    mark,
    ratio_bars,
    with_caption,
)

NAMES = [
    "a^b",
    "$x^",
    "$1 and $2",
    "$\\frac{",
    "{}[]()_%#&~",
    r"back\slash\$",
    "two\nlines",
    "half \ud83d",
    "é 椅子",
    "x" * 500,
    "",
]


def test_names_are_drawn_as_they_are():
    figure = ratio_bars({f"{name}{'.' * number}": 1.0 for number, name in enumerate(NAMES)}, "$x^ and $y_")
    figure.savefig(io.BytesIO(), format="png")
    shown = {text.get_text().replace(r"\$", "$") for text in figure.findobj(Text)}
    assert {"a^b", "$x^.", "$1 and $2..", "$\\frac{...", "$x^ and $y_"} <= shown


def test_a_plot_of_plain_names_is_what_it_was():
    figure = ratio_bars({"neither": 1.25, "both": 2.5}, "ratio")
    figure.savefig(io.BytesIO(), format="png")
    axes = figure.axes[0]
    assert [bar.get_height() for bar in axes.patches] == [1.25, 2.5]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["neither", "both"]


def test_a_grid_has_a_row_for_each_name_and_bounded_width():
    image = Image.new("RGB", (16, 16), "red")
    grid = image_grid({name: [image, image] for name in NAMES}, ["$a^", "b\nc"], 20)
    assert grid.height == 20 + len(NAMES) * 24
    assert grid.width < 1000
    assert np.asarray(grid)[30, -10].tolist() == [255, 0, 0]


def test_a_grid_keeps_proportions():
    grid = np.asarray(image_grid({"": [Image.new("RGB", (40, 20), "red")]}, size=20))
    red = (grid == (255, 0, 0)).all(2)
    assert (red.any(1).sum(), red.any(0).sum()) == (10, 20)


def test_letters_are_drawn_by_a_font_that_has_them():
    for name in ("fox", "é ж λ ع"):  # matplotlib's DejaVu Sans has these
        line, font = fit_font(name)
        assert line == name
        assert not any(is_missing(font, letter) for letter in name)
    assert fit_font("fox")[1] == fonts()[0]
    assert is_missing(fonts()[0], "椅") and not is_missing(fonts()[0], " ")


def test_letters_that_no_font_has_are_escaped_and_that_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(figures, "FONTS", ())
    caches = (figures.fonts, figures._warn_of_missing_letters)
    for cache in caches:
        cache.cache_clear()
    try:
        for _ in range(2):
            assert fit_font("a 椅 \U0001f98a")[0] == "a \\u6905 \\U0001f98a"
        assert len(caplog.records) == 1 and "font" in caplog.text
    finally:
        for cache in caches:
            cache.cache_clear()


def test_a_caption_shows_the_end_of_a_long_name():
    page = with_caption(Image.new("RGB", (60, 40), "red"), "folder-of-a-long-name/0001.png")
    assert page.width == 60 and page.getpixel((59, 39)) == (255, 0, 0)
    below = page.crop((0, 40, *page.size))
    assert ImageOps.invert(below).getbbox() and ImageOps.invert(below).getbbox()[2] <= 60


@pytest.mark.parametrize(
    ("name", "label"),
    [("x\x1b[2J", "x\\x1b[2J"), ("a\tb\nc ", "a b c"), ("\ud83d", "?"), ("y" * 81, "y" * 77 + "...")],
)
def test_a_label_is_one_line(name, label):
    assert as_label(name) == label


def test_right_and_wrong_are_told_apart_without_colours():
    image = Image.new("RGB", (60, 60), "white")
    corner = [mark(image, right).convert("L").getpixel((4, 4)) for right in (True, False)]
    assert corner[0] == 255
    assert corner[1] < 150


def test_a_learning_curve_has_training_beside_validation():
    record = {"train_loss": 1.0, "loss": 1.2, "train_top1": 0.5, "top1": 0.4, "top5": 0.8}
    figure = learning_curve([{"epoch": epoch, **record} for epoch in (1, 2)])
    assert [len(axes.lines) for axes in figure.axes] == [2, 3]
    figure.savefig(io.BytesIO(), format="png")
