"""--dry_run and --figure_data, for all four trainers, and --invert from the command line to the pixels."""

import logging

import numpy as np
import pytest
import torch
from conftest import draw_class, reset_accelerate
from PIL import Image, ImageOps

import train_backbone
import train_johnson
import train_lora_sketch
import train_retrieval
from sketch_perceptual.cli import entry
from sketch_perceptual.data.datasets import CaptionedImages, Images, LabelledImages
from sketch_perceptual.data.images import to_tensor
from sketch_perceptual.data.preview import fitted, sheet_rows
from sketch_perceptual.errors import InputError
from sketch_perceptual.networks.backbone import BUNDLED, load_backbone
from sketch_perceptual.networks.embedder import make_embedder

TRAINERS = {
    train_lora_sketch: "--pretrained_model_name_or_path nowhere",
    train_backbone: "--init_weights nowhere",
    train_johnson: "--backbone nowhere --style drawings/house",
    train_retrieval: "--backbone nowhere",
}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """Two classes of three drawings, 40 x 36; the last is white on black."""
    monkeypatch.chdir(tmp_path)
    for name in ("house", "cat"):
        draw_class(tmp_path / "drawings" / name, 0 if name == "cat" else 3, 3)
    last = tmp_path / "drawings/house/5.png"
    ImageOps.invert(Image.open(last)).save(last)
    return tmp_path


@pytest.fixture
def call(workplace, caplog, signals):
    def call(trainer, *more):
        reset_accelerate()
        caplog.clear()
        options = [*TRAINERS[trainer].split(), "--train_data_dir", "drawings", "--resolution", "32", *more]
        with caplog.at_level(logging.INFO):
            trainer.main(trainer.parse_args(options))
        return caplog.text

    return call


def left(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda trainer: trainer.__name__)
def test_a_dry_run_reports_draws_and_leaves_nothing_else(trainer, call, workplace):
    text = call(trainer, "--dry_run")
    assert ("photos    6 in drawings" if trainer is train_johnson else "drawings  6 in drawings") in text
    if trainer is not train_johnson:  # its drawings are style, photos may be dark
        assert "1 white on black: `invert` auto makes them black on white (house/5.png)" in text
    assert left(workplace) == ["drawings"]
    call(trainer, "--dry_run", "--figure_data", "data.png")
    assert left(workplace) == ["data.png", "drawings"]
    sheet = Image.open("data.png")
    assert sheet.height > 6 * 160 and np.asarray(sheet.convert("L")).std() > 10


@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda trainer: trainer.__name__)
def test_drawings_are_inverted_where_they_are_asked_to_be(trainer, call):
    text = call(trainer, "--dry_run", "--invert", "auto")
    assert "1 inverted to black on white" in text and "white on black" not in text


def test_without_a_dry_run_the_training_goes_on(call):
    with pytest.raises(InputError, match="nowhere"):
        call(train_lora_sketch)


def test_a_dry_run_ends_as_the_training_would(call, workplace, capsys):
    (workplace / "drawings/cat/9.png").write_bytes(b"damaged")
    args = train_backbone.parse_args("--train_data_dir drawings --dry_run".split())
    with pytest.raises(SystemExit) as ended:
        entry.run(train_backbone.main, args)
    assert ended.value.code == 2
    assert "1 of 7 images cannot be read" in capsys.readouterr().err


def test_a_dry_run_lists_all_that_is_wrong(workplace, call, capsys):
    """Captions, images, masks, shapes and the split, in one go; then without any of it."""
    flat, options = workplace / "flat", ["--alpha_mask", "--fit", "bucket", "--validation_share", "0.5"]
    for number, size in enumerate([(40, 40)] * 5 + [(400, 2)]):
        (flat / "mask").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (number, 0, 0)).save(flat / f"{number}.png")
        (flat / f"{number}.txt").write_text("a fox")
    (flat / "0.txt").write_text("")
    (flat / "1.png").write_bytes(b"damaged")
    Image.new("L", (40, 40), 0).save(flat / "mask/2.png")
    Image.new("L", (20, 40), 9).save(flat / "mask/3.png")
    (flat / "mask/4.png").write_bytes(b"damaged")
    with pytest.raises(InputError) as error:
        call(train_lora_sketch, "--dry_run", "--train_data_dir", "flat", *options, "--figure_data", "data.png")
    message = str(error.value)
    assert message.startswith("5 things are wrong:\n1. 1 of 6 images have no caption: flat/0.png.")
    for part in (
        "\n2. 1 of 6 images cannot be read.\nCannot read the image flat/1.png",
        "\n3. flat/5.png: `fit` bucket",
        "\n4. `alpha_mask`: 2 masks cannot be used.\nflat/mask/3.png has 20 x 40 pixels, its image 40 x 40",
        "\nCannot read the image flat/mask/4.png",
        "\n5. `alpha_mask`: empty masks: flat/2.png",
    ):
        assert part in message
    assert not (workplace / "data.png").exists()
    mended = ["--default_caption", "a cat", "--on_bad_image", "skip", "--fit", "pad"]
    assert "flat/0.png" in call(train_lora_sketch, "--dry_run", "--train_data_dir", "flat", *mended)


@pytest.mark.parametrize("trainer", [train_backbone, train_retrieval], ids=lambda trainer: trainer.__name__)
def test_a_dry_run_of_classes_lists_images_and_the_split(trainer, call, workplace):
    (workplace / "drawings/cat/9.png").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"(?s)1\. 1 of 7 images cannot .*2\. `validation_share` must be between"):
        call(trainer, "--dry_run", "--validation_share", "2")


@pytest.mark.parametrize(
    "target, sentence", [("data.jpg", r"must end in \.png"), ("no/data.png", "cannot be written")]
)
def test_a_figure_that_cannot_be_written_is_refused_at_once(target, sentence, call, monkeypatch):
    monkeypatch.setattr(Images, "image", None)
    for more in ([], ["--dry_run"]):
        with pytest.raises(InputError, match=f"`figure_data` .*{sentence}"):
            call(train_backbone, "--figure_data", target, *more)


def pictures(count=20, size=(40, 30)):
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 256, (size[1], size[0], 3), np.uint8)) for _ in range(count)]


def names(count=20):
    return [f"{number}.png" for number in range(count)]


def test_the_sheet_shows_what_the_data_set_gives(monkeypatch):
    captions = [f"cat {number}" for number in range(20)]
    data = CaptionedImages(pictures(), names(), captions, resolution=160, random_flip=True)
    rows = sheet_rows(data)
    shown = [int(title.split(":")[0]) - 1 for title in rows]
    assert list(rows) == [f"{index + 1}: {index}.png cat {index}" for index in sorted(set(shown))]
    assert len(rows) == 8
    for index, row in zip(shown, rows.values(), strict=True):
        for epoch, picture in enumerate(row):
            assert np.abs(to_tensor(picture) - data[epoch, index]["pixel_values"]).max() < 1 / 64
    assert any(len({picture.tobytes() for picture in row}) > 1 for row in rows.values())


def test_one_column_where_nothing_is_random_and_one_row_for_each_of_few():
    data = CaptionedImages(pictures(3), ["same.png"] * 3, [["a fox", "a red fox"]] * 3, resolution=32, fit="pad")
    rows = sheet_rows(data)
    assert list(rows) == [f"{number}: same.png a fox | a red fox" for number in (1, 2, 3)]
    assert all(len(images) == 1 for images in rows.values())


def test_classes_stand_beside_their_drawings():
    data = LabelledImages(pictures(2), names(2), [1, 0], ["cat", "fox"], resolution=32)
    assert list(sheet_rows(data)) == ["1: 0.png fox", "2: 1.png cat"]


def test_pictures_that_are_not_square_stay_as_they_are():
    rows = sheet_rows(Images(pictures(1), names(1)), lambda data, index: [torch.ones(3, 16, 32)])
    (picture,) = rows["1: 0.png "]
    assert picture.size == (160, 160)
    assert (picture.getpixel((80, 10)), picture.getpixel((80, 80))) == ((128, 128, 128), (255, 255, 255))


def test_fitted_is_what_an_embedder_prepares():
    embedder = make_embedder(load_backbone(BUNDLED), resolution=64, background="red")
    data = Images(pictures(1), names(1))
    assert torch.equal(fitted(64, "pad", "red", data, 0)[0], embedder.prepare(data.image(0)))
