import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from sketch_perceptual.errors import InputError
from sketch_perceptual.johnson import main, stylize
from sketch_perceptual.networks.johnson import JohnsonNet, load_johnson


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return JohnsonNet(width=4).eval()


@pytest.fixture(scope="module")
def model(network, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    network.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("upsampling", ["transposed", "resize"])
@pytest.mark.parametrize("size", [(1, 1), (3, 70), (8, 8), (33, 18), (64, 64)])
def test_the_output_has_the_size_of_the_input(upsampling, size):
    images = torch.rand(2, 3, *size) * 2 - 1
    found = JohnsonNet(upsampling=upsampling, width=4)(images)
    assert found.shape == images.shape
    assert found.abs().max() < 150 / 127.5


def test_the_published_network_has_its_weights():
    network = JohnsonNet()
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.ConvTranspose2d)]
    widths = [m.out_channels for m in convolutions]
    assert widths == [32, 64, 128, *[128] * 10, 64, 32, 3]
    assert [m.kernel_size[0] for m in convolutions] == [9, *[3] * 14, 9]
    assert [m.stride[0] for m in convolutions] == [1, 2, 2, *[1] * 10, 2, 2, 1]
    assert {m.padding_mode for m in convolutions if isinstance(m, torch.nn.Conv2d)} == {"reflect"}
    assert sum(isinstance(m, torch.nn.InstanceNorm2d) for m in network.modules()) == 15
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in JohnsonNet("batch").modules()) == 15


def test_it_loads_as_it_was_saved(network, model):
    images = torch.rand(1, 3, 20, 30) * 2 - 1
    assert torch.equal(load_johnson(model)(images), network(images))
    for source, sentence in (("nowhere/net", "no style network at nowhere/net"), ("tests", "there is no config.json")):
        with pytest.raises(InputError, match=sentence):
            load_johnson(source)
    with pytest.raises(InputError, match="--norm must be one of instance, batch"):
        JohnsonNet("layer")


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


def test_a_folder_is_converted_whatever_its_sizes_and_the_batch(model, tmp_path):
    sizes = [(20, 20), (20, 20), (31, 17), (20, 20)]
    for number, size in enumerate(sizes):
        pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), np.uint8)
        path = tmp_path / "photos" / ("deep" if number % 2 else "") / f"{number}.{'png' if number else 'bmp'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    for batch in "13":
        options = ["--model", model, "--input", str(tmp_path / "photos"), "--output", str(tmp_path / batch)]
        main([*options, "--batch_size", batch])
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
    assert "bad.png: it is not an image" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--model", "nowhere/net"], "no style network at nowhere/net"),
        (["--input", "empty"], "--input: there are no images in empty"),
        (["--input", "nowhere.png"], "nowhere.png: there is no such file"),
        (["--output", "sketch.xyz"], "--output sketch.xyz cannot be written"),
    ],
)
def test_a_users_mistake_is_a_sentence(model, options, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (9, 9)).save("one.png")
    with pytest.raises(SystemExit) as exit:
        main(["--model", model, "--input", "one.png", "--output", "sketch.png", *options])
    assert exit.value.code == 2
    assert sentence in capsys.readouterr().err


def test_it_runs_as_a_module_without_a_warning():
    command = [sys.executable, "-m", "sketch_perceptual.johnson", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "RuntimeWarning" not in done.stderr
