"""What is said of a data set before it is trained on."""

import json

import pytest
from PIL import Image, ImageDraw, ImageOps

from sketch_perceptual.data.captions import captioned_folder
from sketch_perceptual.data.datasets import Images, LabelledImages
from sketch_perceptual.data.image_stats import stroke_width
from sketch_perceptual.data.scan import scan
from sketch_perceptual.data.summary import data_report


def drawing(shift=0, size=(40, 40), paper="white", ink="black"):
    image = Image.new("RGB", size, paper)
    ImageDraw.Draw(image).line((shift, 5, 30, 35 - shift), ink, 2)
    return image


def report(data, what="drawings"):
    found = scan(data)
    return data_report(data, found.infos, list(found.bad), what)


def images(folder, pictures, **options):
    """Saved by name, and as a data set."""
    for name, picture in pictures.items():
        if isinstance(picture, bytes):
            (folder / name).write_bytes(picture)
        else:
            picture.save(folder / name)
    paths = [folder / name for name in pictures]
    return Images(paths, list(map(str, paths)), **options)


# name of the other picture beside a.png, which is fine -> picture, the lines that it adds
ODD = {
    "blank.png": (
        Image.new("RGB", (40, 40), "white"),
        ["to check  1 near-constant: perhaps their transparency was lost (blank.png)"],
    ),
    "chalk.png": (
        ImageOps.invert(drawing(1)),
        ["to check  1 white on black: `invert` auto makes them black on white (chalk.png)"],
    ),
    "cream.png": (
        drawing(1, paper="#f5e8c8"),
        ["to check  1 on grey or coloured paper (cream.png)"],
    ),
    "grey.png": (
        drawing(1, paper="#d8d8d8"),
        ["to check  1 on grey or coloured paper (grey.png)"],
    ),
    "nearly white.png": (drawing(1, paper="#f4f2ee"), []),
    "12 bits.png": (
        drawing(1).point(lambda level: level // 16),
        [
            "to check  1 nearly black all over: perhaps 10 to 14 bits stored in 16, whose levels must be stretched"
            " (12 bits.png)"
        ],
    ),
    "again.bmp": (drawing(), ["to check  1 equal to an earlier one (again.bmp is a.png)"]),
    "cut.png": (b"\x89PNG", ["left out  1 cannot be read (cut.png)"]),
    "framed.png": (ImageOps.expand(drawing(1, (38, 38)), 1, "black"), []),
}


@pytest.mark.parametrize("name", ODD)
def test_what_looks_wrong_is_counted_and_named(name, tmp_path):
    picture, lines = ODD[name]
    data = images(tmp_path, {"a.png": drawing(), name: picture})
    head = [f"drawings  2 in {tmp_path}", "sizes     40 x 40 pixels; 100% square"]
    said = [line.removeprefix("  ") for line in report(data).splitlines()]
    assert [line for line in said if not line.startswith("strokes")] == head + lines


@pytest.mark.parametrize("paper, ink", [("white", "black"), ("black", "white"), ("#eeddcc", "#445566")])
@pytest.mark.parametrize("width", [1, 2, 5])
def test_how_wide_strokes_are(width, paper, ink):
    image = Image.new("RGB", (1600, 1600), paper)
    for number in range(9):  # as a fan, so that all directions count as much
        ImageDraw.Draw(image).line((100, 100 + 150 * number, 1500, 1400 - 150 * number), ink, 4 * width)
    assert stroke_width(image.resize((400, 400), Image.Resampling.BOX)) == pytest.approx(width, rel=0.15)


@pytest.mark.parametrize("fit, enough", [("crop", 48), ("pad", 72), ("bucket", 60)])
def test_strokes_that_fade_are_named(fit, enough, tmp_path):
    """Of 2 pixels, on a page of 100 x 160."""
    drawing(size=(100, 160)).save(tmp_path / "a.png")

    def said(resolution):
        data = captioned_folder(tmp_path, default_caption="a", fit=fit, resolution=resolution)
        return f"1 whose strokes become thinner than a pixel and grey at `resolution` {resolution}" in report(data)

    assert (said(enough // 2), said(enough)) == (True, False)


def test_many_are_counted_and_three_of_them_named(tmp_path):
    pictures = {f"{number}.png": Image.new("RGB", (8, 8 + number), "white") for number in range(5)}
    assert "5 near-constant: perhaps their transparency was lost (0.png, 1.png, 2.png, and 2 more)" in report(
        images(tmp_path, pictures)
    )


def test_inverted_drawings_are_counted_and_advised_on_no_more(tmp_path):
    data = images(tmp_path, {"a.png": drawing(), "chalk.png": ImageOps.invert(drawing(1))}, invert="auto")
    assert report(data).endswith("to check  1 inverted to black on white (chalk.png)")


def test_the_paper_of_photos_is_nobodys_concern(tmp_path):
    data = images(tmp_path, {"cream.png": drawing(1, paper="#f5e8c8"), "night.png": ImageOps.invert(drawing(1))})
    assert "photos    2" in report(data, "photos") and "to check" not in report(data, "photos")


def test_sizes_and_shapes_and_what_cropping_loses(tmp_path):
    sizes = {"a.png": (40, 40), "b.png": (80, 40), "c.png": (40, 42), "d.png": (60, 60)}
    pictures = {name: drawing(number, size) for number, (name, size) in enumerate(sizes.items())}
    data = images(tmp_path, pictures)
    assert "sizes     40 x 40 to 60 x 60 pixels; 50% square, 25% landscape, 25% portrait" in report(data)
    assert "cropping" not in report(data)
    data.fit = "crop"
    assert "1 lose more than a tenth of their area" in report(data) and "`fit` pad or bucket" in report(data)


def test_captions_are_shown_with_their_origin(tmp_path):
    images(tmp_path, {f"{number}.png": drawing(number) for number in range(6)})
    rows = [{"file_name": f"{number}.png", "text": f"drawing {number // 2 * 2}"} for number in range(6)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = report(captioned_folder(tmp_path)).splitlines()
    assert lines[1].startswith("  captions  3 different ones; ") and "metadata" in lines[1]
    assert [line.strip() for line in lines[2:5]] == ["'drawing 0'", "'drawing 2'", "'drawing 4'"]


def test_classes_are_counted(tmp_path):
    sources = [drawing(number) for number in range(4)]
    data = LabelledImages(sources, [f"row {n} of toy" for n in range(4)], [0, 0, 0, 2], ["boat", "car", "tree"])
    lines = report(data).splitlines()
    assert lines[:2] == ["  drawings  4", "  classes   2 of 1 to 3 (boat 3, tree 1); 1 more have none"]
    assert "classes   1 of 3 each (boat 3)" in report(data.select([0, 1, 2]))
