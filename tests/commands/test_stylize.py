import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from sketch_perceptual.commands import stylize as command
from sketch_perceptual.commands.stylize import main, stylize
from sketch_perceptual.data.images import HALVED
from sketch_perceptual.errors import TooLittleMemory
from sketch_perceptual.networks.style_net import JohnsonNet

pytestmark = pytest.mark.usefixtures("signals")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return JohnsonNet(width=4).eval()


@pytest.fixture(scope="module")
def model(network, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    network.save_pretrained(folder)
    return str(folder)


def test_a_picture_keeps_its_size_transparency_and_exif(network, model, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (21, 34, 4), np.uint8)
    photo = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112], exif[0x013B] = 6, "someone"  # to be turned a quarter; the artist
    photo.save(tmp_path / "photo.png", exif=exif)
    main(["--model", model, "--input", str(tmp_path / "photo.png"), "--output", str(tmp_path / "new" / "sketch.png")])
    sketch = Image.open(tmp_path / "new" / "sketch.png")
    assert sketch.size == (21, 34)
    upright = photo.transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(np.asarray(sketch)[..., 3], np.asarray(upright)[..., 3])
    assert dict(sketch.getexif()) == {0x013B: "someone"}
    paper = Image.new("RGB", (21, 34), "white")
    paper.paste(upright, mask=upright.getchannel("A"))
    assert np.array_equal(np.asarray(sketch)[..., :3], np.asarray(stylize(network, [paper])[0]))


def noise(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    "norm, upsampling, size",
    [("batch", "transposed", (301, 90)), ("instance", "transposed", (201, 270)), ("instance", "resize", (70, 301))],
)
def test_parts_of_a_large_picture_have_no_seams(norm, upsampling, size, monkeypatch):
    torch.manual_seed(0)
    network = JohnsonNet(norm, upsampling, width=4).eval()
    photo = noise(*size)
    whole = np.asarray(stylize(network, [photo])[0], int)
    monkeypatch.setattr(command, "WHOLE", 1000)
    monkeypatch.setattr(command, "TILE", 100)
    parts = np.asarray(stylize(network, [photo])[0], int)
    assert np.abs(parts - whole).max() <= 1  # the sample is the whole picture here


def test_parts_share_their_statistics(network, monkeypatch):
    """Whatever the parts, their sample is the same."""
    for name, value in (("WHOLE", 1000), ("SAMPLE", 64)):
        monkeypatch.setattr(command, name, value)
    pages = []
    for tile in (100, 400):
        monkeypatch.setattr(command, "TILE", tile)
        pages.append(np.asarray(stylize(network, [noise(330, 250)])[0], int))
    assert np.abs(pages[0] - pages[1]).max() <= 1


def test_parts_are_of_bounded_size(network, monkeypatch):
    monkeypatch.setattr(command, "WHOLE", 1000)
    for name, side in (("TILE", 64), ("SAMPLE", 64)):
        monkeypatch.setattr(command, name, side)
    shapes = []
    forward = JohnsonNet.forward
    monkeypatch.setattr(JohnsonNet, "forward", lambda self, x: shapes.append(tuple(x.shape)) or forward(self, x))
    stylize(network, [noise(400, 200)])
    assert shapes[0] == (8, 3, 64, 64)
    assert max(height * width for _, _, height, width in shapes[1:]) == (64 + 2 * 64) ** 2


def test_a_folder_is_converted_whatever_its_sizes_and_the_batch(model, tmp_path, capsys):
    sizes = [(20, 20), (20, 20), (31, 17), (20, 20)]
    for number, size in enumerate(sizes):
        pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), np.uint8)
        path = tmp_path / "photos" / ("deep" if number % 2 else "") / f"{number}.{'png' if number else 'bmp'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    for batch in "13":
        options = ["--model", model, "--input", str(tmp_path / "photos"), "--output", str(tmp_path / batch)]
        main([*options, "--batch_size", batch])
        assert capsys.readouterr().out == f"4 images written to {tmp_path / batch}\n"
    names = ["0.bmp.png", "2.png", "deep/1.png", "deep/3.png"]
    for folder in "13":
        found = sorted(path.relative_to(tmp_path / folder).as_posix() for path in (tmp_path / folder).rglob("*.png"))
        assert found == names
    for name, size in zip(names, ((20, 20), (31, 17), (20, 20), (20, 20)), strict=True):
        one, three = (np.asarray(Image.open(tmp_path / batch / name)).astype(int) for batch in "13")
        assert one.shape[:2] == size[::-1]
        assert abs(one - three).max() <= 1


def test_what_cannot_be_read_is_named_and_the_others_are_written(model, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "photos" / "good.png")
    (tmp_path / "photos" / "bad.png").write_bytes(b"nothing")
    with pytest.raises(SystemExit) as exit:
        main(["--model", model, "--input", str(tmp_path / "photos"), "--output", str(tmp_path / "out")])
    assert exit.value.code == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["good.png"]
    message = capsys.readouterr().err
    assert "bad.png: it is not an image" in message
    assert message.splitlines()[-1].startswith("1 of 2 images ")


def test_what_was_halved_is_not_written_at_half_its_size(model, tmp_path, monkeypatch, capsys):
    halved = Image.new("RGB", (9, 9))
    halved.info["notes"] = [HALVED]
    monkeypatch.setattr(command, "load_image", lambda *_: halved)
    Image.new("L", (9, 9)).save(tmp_path / "scan.png")
    with pytest.raises(SystemExit):
        main(["--model", model, "--input", str(tmp_path / "scan.png"), "--output", str(tmp_path / "out.png")])
    assert "scan.png has more pixels than Pillow's limit: make it smaller." in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()


def test_too_little_memory_is_no_bad_picture(model, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise TooLittleMemory("there is not enough memory to read it")

    monkeypatch.setattr(command, "load_image", fail)
    Image.new("L", (9, 9)).save(tmp_path / "scan.png")
    with pytest.raises(SystemExit):
        main(["--model", model, "--input", str(tmp_path / "scan.png"), "--output", str(tmp_path / "out.png")])
    message = capsys.readouterr().err
    assert "not enough memory" in message and "written" not in message


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--model", "nowhere/net"], "no style network at nowhere/net"),
        (["--input", "empty"], "--input: there are no images in empty"),
        (["--input", "nowhere.png"], "nowhere.png: there is no such file"),
        (["--output", "sketch.xyz"], "--output sketch.xyz must end in .png"),
        (["--batch_size", "0"], "--batch_size: must be a number of at least 1, got 0"),
        (["--device", "gpu"], "--device gpu cannot be used, try cpu or cuda"),
        (["--device", "meta"], "--device meta cannot be used"),
        (["--background", "blurple"], "error: --background: 'blurple' is not a colour"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used"),
        (["--output", "one.png"], "--output one.png would replace one.png, which is read"),
        (["--output", "empty/../one.png"], "one.png would replace one.png, which is read"),
        (["--output", "hard.png"], "--output hard.png would replace one.png"),
        (["--output", "soft.png"], "--output soft.png would replace one.png"),
        (["--input", "photos", "--output", "photos/a.png"], "--output photos/a.png would replace photos/a.png"),
        (["--input", "photos", "--output", "file"], "--output file cannot be written to: "),
        (["--output", "empty"], "--output empty must end in .png"),
        (["--output", "folder.png"], "--output folder.png cannot be written: it is a folder"),
        (["--output", "file/sketch.png"], "file is not a folder"),
        (["--input", "photos", "--output", "photos"], "--output photos contains all images of --input"),
        (["--input", "photos", "--output", "empty/../photos"], "all images of --input"),
        (["--input", "photos", "--output", "."], "all images of --input"),
        (["--input", "photos", "--output", "twin"], "--output twin/a.png would replace photos/a.png"),
        (
            ["--input", "alike", "--output", "new"],
            "alike/a.bmp.png would both be written to new/a.bmp.png",
        ),
        (["--input", "pipe.png"], "pipe.png: it is not a regular file"),
    ],
)
def test_a_users_mistake_is_a_sentence(model, options, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    for name in ("one.png", "photos/a.png", "alike/a.bmp", "alike/a.bmp.png"):
        Path(name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (9, 9)).save(name)
    os.link("one.png", "hard.png")
    Path("soft.png").symlink_to("one.png")
    Path("twin").mkdir()
    Path("twin/a.png").symlink_to("../photos/a.png")
    os.mkfifo("pipe.png")
    before = {path: path.read_bytes() for path in Path().rglob("*.*") if path.is_file()}
    with pytest.raises(SystemExit) as exit:
        main(["--model", model, "--input", "one.png", "--output", "sketch.png", *options])
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert sentence in message
    assert "are not converted" not in message
    assert {path: path.read_bytes() for path in Path().rglob("*.*") if path.is_file()} == before


def test_an_output_inside_the_input_is_no_input(model, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "one.png")
    for _ in range(2):
        main(["--model", model, "--input", str(tmp_path), "--output", str(tmp_path / "drawn")])
    written = [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*.png"))]
    assert written == ["drawn/one.png", "one.png"]


def test_it_runs_as_a_module_without_a_warning():
    command = [sys.executable, "-m", "sketch_perceptual.commands.stylize", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "RuntimeWarning" not in done.stderr
