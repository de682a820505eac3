"""sketch-perceptual compare: two drawings, or two folders of them, compared from the shell."""

import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageChops, ImageOps, ImageStat

from sketch_perceptual import PerceptualLoss, to_tensor
from sketch_perceptual.commands.compare import main, same_size
from sketch_perceptual.drawings import draw
from sketch_perceptual.networks.style_net import JohnsonNet

pytestmark = pytest.mark.usefixtures("signals")


@pytest.fixture
def folders(tmp_path):
    """Two folders: two scenes, and each in another style; one drawing without a pair."""
    for name in ("boat", "cat"):
        for folder, style, ending in (("a", "pen", "png"), ("b", "marker", "webp")):
            (tmp_path / folder).mkdir(exist_ok=True)
            draw(name, 0, 0, style, 96).save(tmp_path / folder / f"{name}.{ending}", lossless=True)
    draw("owl", 0, 0, "pen", 96).save(tmp_path / "a" / "owl.png")
    return tmp_path


def test_a_pair_is_the_loss_of_both_by_layer(folders, capsys):
    one, other = folders / "a" / "boat.png", folders / "b" / "cat.webp"
    main([str(one), str(other), "--json"])
    found = json.loads(capsys.readouterr().out)
    pair = [to_tensor(Image.open(path))[None] for path in (one, other)]
    loss = PerceptualLoss(resolution=64)
    with torch.no_grad():
        assert found["mean"] == found["pairs"][0]["distance"] == pytest.approx(float(loss(*pair)), rel=1e-5)
        layers = loss(*pair, per_layer=True)
    assert found["pairs"][0]["layers"] == pytest.approx({name: float(value) for name, value in layers.items()})
    assert (found["backbone"], found["resolution"]) == ("bundled", 64)
    main([str(one), str(other), "--json", "--backbone", "bundled"])
    assert json.loads(capsys.readouterr().out) == found
    main([str(one), str(one)])
    assert capsys.readouterr().out.splitlines()[1].startswith("0.000 ")


def test_folders_are_paired_by_name(folders, capsys):
    main([str(folders / "a"), str(folders / "b"), "--figure", str(folders / "difference.png")])
    out, err = capsys.readouterr()
    head, boat, cat, mean = out.splitlines()
    assert head.split() == ["distance", "relu1_2", "relu2_2", "relu3_3", "relu4_3"]
    values = [float(line.split()[0]) for line in (boat, cat, mean)]
    assert values[2] == pytest.approx(sum(values[:2]) / 2, abs=1e-3)
    assert "boat.webp" in boat
    assert "without a pair" in err
    assert "owl.png" in err
    figure = Image.open(folders / "difference.png")
    assert figure.width > 3 * 256
    reds = [pixel for _, pixel in figure.getcolors(10**7) if pixel[0] > pixel[1] + 5]
    assert reds


def test_the_map_is_red_where_a_part_is_missing(tmp_path):
    whole = draw("cat", 0, 0, "pen", 128)
    whole.save(tmp_path / "a.png")
    whole.paste("white", (0, 0, 128, 60))
    whole.save(tmp_path / "b.png")
    main([str(tmp_path / "a.png"), str(tmp_path / "b.png"), "--figure", str(tmp_path / "f.png")])
    figure = Image.open(tmp_path / "f.png")
    shown = figure.crop((figure.width - 260, figure.height - 260, figure.width - 4, figure.height - 4))
    red, green, _ = shown.split()
    redness = ImageChops.subtract(red, green)
    above, below = (ImageStat.Stat(redness.crop((0, top, 256, top + 80))).mean[0] for top in (16, 176))
    assert above > 3 * below


def test_two_sizes_are_refused_scaled_or_put_on_a_canvas(folders, capsys):
    small, large = folders / "small.png", folders / "large.png"
    draw("boat", 0, 0, "pen", 256).save(large)
    Image.open(large).resize((128, 128), Image.Resampling.LANCZOS).save(small)
    with pytest.raises(SystemExit) as stop:
        main([str(small), str(large)])
    assert stop.value.code == 2
    assert re.search(r"128 x 128 and 256 x 256\b.*--fit", capsys.readouterr().err)
    distances = {}
    for fit in ("pad", "canvas"):
        main([str(small), str(large), "--fit", fit, "--json"])
        result = json.loads(capsys.readouterr().out)
        assert result["fit"] == fit
        distances[fit] = result["mean"]
    assert distances["pad"] < 0.02
    assert distances["canvas"] > 0.3


def test_a_frame_holds_both_images(tmp_path):
    """Each as large as it can be, in the middle, on the background."""
    for name, size in (("wide", (40, 10)), ("high", (10, 20))):
        Image.new("RGB", size, "black").save(tmp_path / f"{name}.png")
    boxes = {"pad": [(0, 5, 40, 15), (15, 0, 25, 20)], "canvas": [(0, 5, 40, 15), (15, 0, 25, 20)]}
    for fit, expected in boxes.items():
        pair = same_size(tmp_path / "wide.png", tmp_path / "high.png", fit, "white")
        assert [image.size for image in pair] == [(40, 20)] * 2
        assert [ImageOps.invert(image).getbbox() for image in pair] == expected
    Image.new("RGB", (5, 5), "black").save(tmp_path / "high.png")
    enlarged, kept = (same_size(tmp_path / "wide.png", tmp_path / "high.png", fit, "white")[1] for fit in boxes)
    assert ImageOps.invert(enlarged).getbbox() == (15, 0, 25, 10)
    assert ImageOps.invert(kept).getbbox() == (17, 2, 22, 7)


def test_a_distance_that_is_not_finite_is_no_result(folders, capsys, monkeypatch):
    monkeypatch.setattr(PerceptualLoss, "forward", lambda self, a, b, **_: {"relu1_2": torch.tensor([math.nan])})
    one, other = (str(folders / name) for name in ("a/boat.png", "b/cat.webp"))
    with pytest.raises(SystemExit) as stop:
        main([one, other])
    printed = capsys.readouterr()
    assert (stop.value.code, printed.out) == (2, "")
    assert all(name in printed.err for name in (one, other, "nan", "--backbone"))


def test_names_are_one_line_each_and_exact_in_json(folders, capsys):
    name = "a\nb\x1b[2J.png"
    for folder in "ab":
        draw("owl", 0, 0, "pen", 32).save(folders / folder / name)
    main([str(folders / "a"), str(folders / "b")])
    out, _ = capsys.readouterr()
    assert len(out.splitlines()) == 5
    assert "a\\nb\\x1b[2J.png" in out and "\x1b" not in out
    main([str(folders / "a"), str(folders / "b"), "--json"])
    assert json.loads(capsys.readouterr().out)["pairs"][0]["first"] == str(folders / "a" / name)


WITHOUT = """
import sys

for name in "accelerate diffusers peft transformers datasets torchvision matplotlib psutil scipy".split():
    sys.modules[name] = None
from sketch_perceptual.__main__ import main

main(sys.argv[1:])
"""


@pytest.mark.slow
def test_comparing_and_stylizing_need_little(folders):
    """What is installed with the package without an extra."""
    torch.manual_seed(0)
    JohnsonNet(width=4).save_pretrained(folders / "net")
    for command in (
        "compare a b --figure f.png",
        "stylize --model net --input a --output s",
        "env",
        "compare a gone.png",
    ):
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT, *command.split()],
            cwd=folders,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == (2 if "gone" in command else 0), done.stderr
        assert "Traceback" not in done.stderr
    assert Image.open(folders / "f.png").width and len(list((folders / "s").iterdir())) == 3


@pytest.mark.slow
def test_a_figure_is_written_whoever_reads(folders):
    command = f"{sys.executable} -m sketch_perceptual compare a b --figure f.png | head -1"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, shell=True, cwd=folders, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("distance")
    assert "Traceback" not in done.stderr
    assert (folders / "f.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "b/cat.webp"], "must be two images or two folders"),
        (["a/none.png", "b/cat.webp"], "Cannot read the image .*none.png"),
        (["a", "empty"], "there are no images in"),
        (["a", "twice"], "x.png and .*x.webp "),
        (["a", "other"], "no image of .* has the name"),
        (["a/cat.png", "b/cat.webp", "--layers", "relu5_1"], "ends at relu4_3"),
        (["a/cat.png", "b/cat.webp", "--resolution", "8"], "at least 16"),
        (["a/cat.png", "b/cat.webp", "--resolution", "0"], "--resolution: must be a number of at least 16"),
        (["a/cat.png", "b/cat.webp", "--figure", "gone/f.png"], "--figure gone/f.png cannot be written"),
        (["a/cat.png", "b/cat.webp", "--figure", "f.txt"], "--figure f.txt must end in .png"),
        (["a/cat.png", "b/cat.webp", "--figure", "b/cat.webp"], "--figure b/cat.webp would replace b/cat.webp"),
        (["a", "b", "--figure", "a/cat.png"], "--figure a/cat.png would replace a/cat.png"),
        (["a/cat.png", "b/cat.webp", "--background", "no colour"], "--background: 'no colour' is not a colour"),
    ],
)
def test_mistakes_are_sentences(folders, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(folders)
    (folders / "empty").mkdir()
    (folders / "other").mkdir()
    (folders / "twice").mkdir()
    for name in ("other/else.png", "twice/x.png", "twice/x.webp"):
        draw("owl", 0, 0, "pen", 32).save(folders / name)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)
