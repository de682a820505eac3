"""The embedded drawings: deterministic, recognisably inked, and pixel-aligned with their photos."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from sketch_perceptual.drawings import CLASSES, STYLES, draw, write_folder
from sketch_perceptual.drawings.__main__ import main
from sketch_perceptual.errors import InputError

pytestmark = pytest.mark.usefixtures("signals")

ALL_STYLES = (*STYLES, "photo")


def pixels(*args, **options):
    return np.asarray(draw(*args, size=64, **options))


def photo_edges(name, index):
    photo = np.asarray(draw(name, index, style="photo", size=128), float)
    steps = np.maximum(np.abs(np.diff(photo, axis=0))[:, :-1], np.abs(np.diff(photo, axis=1))[:-1])
    return steps.max(2) > 40


def near_ink(name, index, style):
    """True within two pixels of a stroke."""
    sketch = draw(name, index, style=style, size=128).convert("L").filter(ImageFilter.MinFilter(5))
    return np.asarray(sketch)[:-1, :-1] < 128


@pytest.mark.parametrize("style", ALL_STYLES)
def test_same_arguments_give_the_same_pixels_in_any_order(style):
    forwards = [pixels(name, 3, style=style) for name in CLASSES[::3]]
    backwards = [pixels(name, 3, style=style) for name in CLASSES[::-3]]
    for first, second in zip(forwards, backwards[::-1], strict=True):
        assert np.array_equal(first, second)


@pytest.mark.parametrize("style", ["pen", "photo"])
@pytest.mark.parametrize("name", CLASSES)
def test_index_and_seed_change_the_picture(name, style):
    pictures = [pixels(name, index, seed=seed, style=style) for seed, index in ((0, 0), (0, 1), (1, 0))]
    for i, one in enumerate(pictures):
        for other in pictures[:i]:
            assert np.abs(one.astype(int) - other).mean() > 4


@pytest.mark.parametrize("name", CLASSES)
def test_styles_differ_in_ink(name):
    ink = {style: 255 - pixels(name, 0, style=style).mean() for style in STYLES}
    assert ink["marker"] > 1.2 * ink["pen"]
    assert not np.array_equal(pixels(name, 0, style="hatching"), pixels(name, 0, style="pen"))


def test_hatching_darkens_inside_the_shapes_only():
    hatched, plain = (np.mean([255 - pixels(name, 0, style=s) for name in CLASSES]) for s in ("hatching", "pen"))
    assert hatched > 1.1 * plain
    corner = np.asarray(draw("teapot", 0, style="hatching", size=128))[:12, 50:78]
    assert (corner == 255).all()  # the wall above the teapot


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", CLASSES)
def test_sketches_are_grey_mostly_white_and_not_blank(name, style):
    for index in range(2):
        sketch = pixels(name, index, style=style)
        assert (sketch == sketch[..., :1]).all()
        assert 0.05 < 1 - sketch.mean() / 255 < 0.35
        assert (sketch > 200).mean() > 0.5
        assert sketch.min() < 80


@pytest.mark.parametrize("name", CLASSES)
def test_photos_are_coloured(name):
    photo = pixels(name, 0, style="photo").astype(int)
    assert (photo.max(2) - photo.min(2)).mean() > 15
    assert photo.std() > 20


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", CLASSES)
def test_strokes_lie_on_the_edges_of_the_photo(name, style):
    edges = photo_edges(name, 0)
    assert edges.mean() > 0.02
    same, another = (near_ink(name, index, style)[edges].mean() for index in (0, 5))
    assert same > 0.95
    assert another < same - 0.05


def test_a_small_picture_shows_the_same_scene_as_a_large_one():
    large = draw("owl", 0, style="photo", size=256).resize((64, 64), Image.Resampling.BOX)
    same, another = (np.abs(np.asarray(large, int) - pixels("owl", i, style="photo")).mean() for i in (0, 1))
    assert same < 4 < 15 < another


@pytest.mark.parametrize(("styles", "suffixes"), [(("photo",), [""]), (("pen", "photo"), ["_pen", "_photo"])])
def test_folder_holds_what_its_metadata_says(tmp_path, styles, suffixes):
    count = write_folder(tmp_path / "set", per_class=2, seed=4, size=32, styles=styles, classes=("owl", "car"))
    lines = (tmp_path / "set" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    texts = {row["file_name"]: row["text"] for row in map(json.loads, lines)}
    written = {path.relative_to(tmp_path / "set").as_posix() for path in (tmp_path / "set").rglob("*.png")}
    assert written == set(texts) == {f"{n}/000{i}{s}.png" for n in ("owl", "car") for i in (0, 1) for s in suffixes}
    assert count == len(lines) == len(written)
    assert texts[f"owl/0001{suffixes[-1]}.png"] == "a photo of an owl"
    picture = Image.open(tmp_path / "set" / f"car/0001{suffixes[-1]}.png")
    assert np.array_equal(picture, draw("car", 1, seed=4, style="photo", size=32))


def test_articles(tmp_path):
    write_folder(tmp_path, per_class=1, size=16)
    rows = map(json.loads, (tmp_path / "metadata.jsonl").read_text(encoding="utf-8").splitlines())
    texts = {row["text"] for row in rows}
    assert len(texts) == len(CLASSES) >= 12
    assert {"a sketch of an owl", "a sketch of an umbrella", "a sketch of a house"} <= texts


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"name": "hous"}, "'hous'.*lighthouse"),
        ({"style": "oil"}, "'oil'.*pen.*photo"),
        ({"size": 15}, "`size` must be at least 16 pixels, got 15"),
    ],
)
def test_bad_arguments_are_named(given, named):
    with pytest.raises(InputError, match=named):
        draw(**{"name": "house", "index": 0, **given})


def test_an_unknown_class_or_style_writes_nothing(tmp_path):
    for wrong in ({"classes": ("cat", "dgo")}, {"styles": ("pen", "oil")}, {"size": 8}):
        with pytest.raises(InputError):
            write_folder(tmp_path / "set", per_class=1, **wrong)
    assert not (tmp_path / "set").exists()


def test_command_line(tmp_path, capsys):
    main(["--output_dir", str(tmp_path), "--per_class", "1", "--size", "16", "--styles", "marker", "photo"])
    assert capsys.readouterr().out == f"{2 * len(CLASSES)} images written to {tmp_path}\n"
    with pytest.raises(SystemExit):
        main(["--output_dir", str(tmp_path), "--styles", "oil"])
    assert "unknown style 'oil': choose from pen, marker, hatching, photo" in capsys.readouterr().err


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_drawing_again_into_a_folder_is_fine(tmp_path):
    for count in (1, 2, 2):
        write_folder(tmp_path, per_class=count, size=16, classes=("owl",))
    written = contents(tmp_path)
    (tmp_path / "metadata.jsonl").unlink()  # as if killed before the end
    (tmp_path / "owl" / "0001.png").unlink()
    write_folder(tmp_path, per_class=2, size=16, classes=("owl",))
    assert contents(tmp_path) == written


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("metadata.jsonl", '{"file_name": "my/0.png", "text": "mine"}\n', "metadata.jsonl already exists and lists"),
        ("metadata.jsonl", '{"file_name": "owl/0000.png", "text": "my owl"}\n', "metadata.jsonl already exists"),
        ("metadata.jsonl", "\xff", "metadata.jsonl already exists"),
        ("owl/0000.png", "mine", "0000.png already exists and is another image"),
    ],
)
def test_no_file_of_the_user_is_replaced(name, text, sentence, tmp_path):
    (tmp_path / "owl").mkdir()
    (tmp_path / name).write_text(text, encoding="latin-1")
    before = contents(tmp_path)
    with pytest.raises(InputError, match=f"`output_dir`: .*{sentence}"):
        write_folder(tmp_path, per_class=1, size=16, classes=("owl",))
    assert contents(tmp_path) == before


def test_a_dangling_link_is_not_followed(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "metadata.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="already exists"):
        write_folder(tmp_path / "set", per_class=1, size=16, classes=("owl",))
    assert not (tmp_path / "elsewhere").exists()


def test_what_cannot_be_written_is_a_sentence(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        main(["--output_dir", str(tmp_path / "file"), "--per_class", "1", "--size", "16"])
    assert stop.value.code == 2
    assert "--output_dir " in capsys.readouterr().err

    def full(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match=r"boat.0000\.png cannot be written: No space left on device"):
        write_folder(tmp_path / "set", per_class=1, size=16)
