"""sketch-perceptual compare: two drawings, or two folders of them, compared from the shell."""

import json
import re

import pytest
import torch
from PIL import Image, ImageChops, ImageStat

from sketch_perceptual import PerceptualLoss, to_tensor
from sketch_perceptual.compare import main
from sketch_perceptual.drawings import draw


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


def test_two_sizes_are_refused_or_padded(folders, capsys):
    small, large = folders / "small.png", folders / "a" / "boat.png"
    Image.open(large).crop((16, 16, 80, 80)).save(small)
    with pytest.raises(SystemExit) as stop:
        main([str(small), str(large)])
    assert stop.value.code == 2
    assert "64 x 64 and 96 x 96: resize one, or let --fit be pad" in capsys.readouterr().err
    main([str(small), str(large), "--fit", "pad"])
    assert 0 < float(capsys.readouterr().out.splitlines()[1].split()[0]) < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "b/cat.webp"], "must be two images or two folders"),
        (["a/none.png", "b/cat.webp"], "Cannot read the image .*none.png"),
        (["a", "empty"], "there are no images in"),
        (["a", "twice"], "x.png and .*x.webp have one name"),
        (["a", "other"], "no image of .* has the name"),
        (["a/cat.png", "b/cat.webp", "--layers", "relu5_1"], "ends at relu4_3"),
        (["a/cat.png", "b/cat.webp", "--resolution", "8"], "at least 16"),
        (["a/cat.png", "b/cat.webp", "--figure", "gone/f.png"], "--figure .* cannot be written"),
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
