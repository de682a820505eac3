import csv
import io
import json
import logging
import pickle
import struct
import zlib

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms

from sketch_perceptual.data.captions import captioned_dataset, captioned_folder
from sketch_perceptual.data.checks import drop_bad, scan
from sketch_perceptual.data.class_names import readable_class
from sketch_perceptual.data.image_sets import CaptionedImages
from sketch_perceptual.data.images import INTERPOLATIONS, fit_image, load_extras, load_image, to_pil, to_tensor
from sketch_perceptual.errors import InputError
from sketch_perceptual.seeds import generator

WHITE, BLACK, RED = (255, 255, 255), (0, 0, 0), (255, 0, 0)


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def image_of(mode, *pixels):
    """One row of pixels."""
    image = Image.new(mode, (len(pixels), 1))
    for x, pixel in enumerate(pixels):
        image.putpixel((x, 0), pixel)
    return image


def palette(*pixels):
    image = image_of("P", *pixels)
    image.putpalette([*BLACK, *RED, *WHITE])
    return image


def with_alpha(image, *alpha):
    image.putalpha(image_of("L", *alpha))
    return image


def raw_png(bits, colour_type, width, row, transparent):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, 1, bits, colour_type, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"tRNS", transparent), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks if each[1] or each[0] == b"IEND")


def arrays(mode, values, dtype):
    return Image.fromarray(np.array([values], dtype))


def quarters(orientation, kind):
    """Top left, top right, bottom left, bottom right as stored: 0, 80, 160, 240."""
    image = Image.new("L", (32, 16))
    for corner, level in zip(((16, 0), (0, 8), (16, 8)), (80, 160, 240), strict=True):
        image.paste(level, (*corner, 32 if corner[0] else 16, 16 if corner[1] else 8))
    exif = image.getexif()
    exif[0x0112] = orientation
    return saved(image, kind, exif=exif)


CLEAR, HALF = (0, 0, 0, 0), (0, 0, 0, 128)
SIXTEEN = struct.pack(">3H", 0, 40000, 65535)

# mode -> source, what its first row must be
MODES = {
    "RGB": (saved(image_of("RGB", RED, BLACK)), [RED, BLACK]),
    "RGBA": (saved(image_of("RGBA", CLEAR, HALF, (255, 0, 0, 255))), [WHITE, (127, 127, 127), RED]),
    "RGBA in a WebP": (saved(image_of("RGBA", CLEAR, (0, 0, 0, 255)), "WEBP", lossless=True), [WHITE, BLACK]),
    "RGBA of 16 bits": (raw_png(16, 6, 1, struct.pack(">4H", 0, 0, 0, 0), b""), [WHITE]),
    "RGBa": (image_of("RGBa", CLEAR, (255, 0, 0, 255)), [WHITE, RED]),
    "LA": (saved(image_of("LA", (0, 0), (0, 255), (200, 255))), [WHITE, BLACK, (200, 200, 200)]),
    "La": (image_of("LA", (0, 0), (0, 255)).convert("La"), [WHITE, BLACK]),
    "PA": (with_alpha(palette(0, 0, 1), 0, 255, 255), [WHITE, BLACK, RED]),
    "P": (saved(palette(0, 1, 2)), [BLACK, RED, WHITE]),
    "P with a clear entry": (saved(palette(0, 1), transparency=0), [WHITE, RED]),
    "P with alpha by entry": (saved(palette(0, 1), transparency=bytes([0, 255])), [WHITE, RED]),
    "GIF with a clear entry": (saved(palette(0, 1), "GIF", transparency=0), [WHITE, RED]),
    "L with a clear level": (saved(image_of("L", 0, 7), transparency=0), [WHITE, (7, 7, 7)]),
    "1 with a clear level": (saved(image_of("1", 0, 255), transparency=0), [WHITE, WHITE]),
    "RGB with a clear colour": (saved(image_of("RGB", BLACK, RED), transparency=BLACK), [WHITE, RED]),
    "I;16 with a clear level": (saved(arrays("I;16", [0, 255, 65535], "u2"), transparency=0), [WHITE, BLACK, WHITE]),
    "L": (saved(image_of("L", 0, 99)), [BLACK, (99, 99, 99)]),
    "1": (saved(image_of("1", 0, 255)), [BLACK, WHITE]),
    "I;16": (raw_png(16, 0, 3, SIXTEEN, b""), [BLACK, (156, 156, 156), WHITE]),
    "I;16B": (saved(arrays("I;16B", [0, 40000], ">u2"), "TIFF"), [BLACK, (156, 156, 156)]),
    "I of 16 bits": (b"P5 3 1 65535\n" + SIXTEEN, [BLACK, (156, 156, 156), WHITE]),
    "I of 8 bits": (saved(arrays("I", [0, 99, 255], "i4"), "TIFF"), [BLACK, (99, 99, 99), WHITE]),
    "F to 1": (saved(arrays("F", [0, 0.2, 1], "f4"), "TIFF"), [BLACK, (51, 51, 51), WHITE]),
    "F to 255": (saved(arrays("F", [0, 51, 255], "f4"), "TIFF"), [BLACK, (51, 51, 51), WHITE]),
    "CMYK in a TIFF": (saved(image_of("CMYK", CLEAR, (0, 255, 255, 0)), "TIFF"), [WHITE, RED]),
    "HSV": (image_of("HSV", (0, 255, 255), (0, 0, 255)), [RED, WHITE]),
    "LAB": (image_of("LAB", (128, 128, 128)), [(119, 119, 119)]),
    "YCbCr": (image_of("YCbCr", (0, 128, 128), (255, 128, 128)), [BLACK, WHITE]),
    "first frame of a GIF": (
        saved(image_of("L", 0, 9), "GIF", save_all=True, append_images=[image_of("L", 255, 9)]),
        [BLACK, (9, 9, 9)],
    ),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_has_its_colours(mode):
    source, expected = MODES[mode]
    image = load_image(source)
    assert image.mode == "RGB"
    assert [image.getpixel((x, 0)) for x in range(image.width)] == expected


def test_cmyk_jpegs_are_inverted_once():
    # Adobe stores 255 for no ink, and the marker APP14 says that Adobe wrote the file.
    for ink, colour in ((CLEAR, WHITE), ((0, 0, 0, 255), BLACK)):
        data = saved(Image.new("CMYK", (8, 8), ink), "JPEG", quality=100)
        assert b"Adobe" in data
        assert load_image(data).getpixel((4, 4)) == colour


@pytest.mark.parametrize("background, expected", [("black", BLACK), ("#ff0000", RED), ("rgb(1, 2, 3)", (1, 2, 3))])
def test_background_shows_where_an_image_is_clear(background, expected):
    image = load_image(saved(image_of("RGBA", CLEAR, (9, 9, 9, 255))), background)
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [expected, (9, 9, 9)]


# orientation -> the stored quarters in the order in which they must show
UPRIGHT = {
    1: (0, 80, 160, 240),
    2: (80, 0, 240, 160),
    3: (240, 160, 80, 0),
    4: (160, 240, 0, 80),
    5: (0, 160, 80, 240),
    6: (160, 0, 240, 80),
    7: (240, 80, 160, 0),
    8: (80, 240, 0, 160),
}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_undone_once(kind, orientation):
    image = load_image(quarters(orientation, kind))
    assert image.size == ((32, 16) if orientation < 5 else (16, 32))
    right, bottom = image.width - 1, image.height - 1
    shown = [image.getpixel(corner)[0] for corner in ((0, 0), (right, 0), (0, bottom), (right, bottom))]
    assert shown == pytest.approx(UPRIGHT[orientation], abs=4)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("exif", [b"", b"nonsense", b"II*\0", b"II*\0\x08\0\0\0\xff\xff\1"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_leaves_the_pixels(kind, exif):
    broken = saved(Image.new("RGB", (16, 8)), kind, exif=b"Exif\0\0" + exif)
    assert load_image(broken).size == (16, 8)
    assert load_extras(broken) == (None, b"")


def test_orientation_survives_other_broken_entries():
    maker = struct.pack(">HHIf", 0x010F, 11, 1, 0.5)  # a float where text belongs: Pillow cannot write it back
    turned = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\2" + maker + turned + b"\0" * 4
    broken = saved(Image.new("RGB", (16, 8)), "JPEG", exif=exif)
    assert load_image(broken).size == (8, 16)
    assert load_extras(broken) == (None, b"")


def test_paths_bytes_and_what_datasets_gives_are_the_same(tmp_path):
    path = tmp_path / "früher Entwurf 速写 'a'.png"
    path.write_bytes(saved(image_of("RGB", RED)))
    data = path.read_bytes()
    for source in (path, str(path), data, {"bytes": data, "path": None}, {"bytes": None, "path": str(path)}):
        assert load_image(source).getpixel((0, 0)) == RED


def test_the_given_image_stays_as_it_was():
    image = image_of("RGB", RED)
    load_image(image).putpixel((0, 0), BLACK)
    assert image.getpixel((0, 0)) == RED


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "PA", "RGBX"]),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_every_image_becomes_rgb_of_its_size(mode, size):
    image = load_image(Image.new(mode, size))
    assert (image.mode, image.size) == ("RGB", size)


def test_tensors_by_hand():
    expected = torch.tensor([[[1.0]], [[-1.0]], [[51 / 127.5 - 1]]])
    array = np.array([[[255, 0, 51]]], np.uint8)
    images = [image_of("RGB", (255, 0, 51)), array, array[:, ::-1], torch.tensor(array)]
    images += [np.array([[[1.0]], [[0.0]], [[0.2]]]), torch.tensor([[[1.0]], [[0.0]], [[0.2]]]).double()]
    for image in images:
        x = to_tensor(image)
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, expected)


def test_to_pil_undoes_to_tensor_and_clamps():
    image = Image.fromarray(np.arange(768, dtype=np.uint16).astype(np.uint8).reshape(16, 16, 3))
    assert to_pil(to_tensor(image)).tobytes() == image.tobytes()
    assert to_pil(torch.tensor([[[-5.0]], [[0.0]], [[7.0]]])).getpixel((0, 0)) == (0, 128, 255)


@pytest.mark.parametrize(
    "image",
    [
        torch.zeros(1, 3, 4, 4),
        torch.zeros(4, 4, 3),
        torch.zeros(3, 4, 4, dtype=torch.uint8),
        torch.full((3, 2, 2), -1.0),
        np.full((3, 2, 2), 255.0),
        torch.full((3, 2, 2), float("nan")),
        torch.zeros(3, 2, 2, dtype=torch.int64),
        np.zeros((2, 2, 3), np.uint16),
        np.full((3, 2, 2), "x", object),
        torch.zeros(3, 0, 4),
        "sketch.png",
    ],
)
def test_other_arrays_are_refused_with_the_layout(image):
    with pytest.raises(InputError, match=r"uint8 \(H, W, 3\) or floats in \[0, 1\] \(3, H, W\), got"):
        to_tensor(image)


@pytest.mark.parametrize("x", [torch.zeros(1, 4, 4), torch.zeros(3, 4, 4).byte(), torch.full((3, 1, 1), torch.nan)])
def test_to_pil_refuses_what_is_no_image(x):
    with pytest.raises(InputError, match=r"floats in \[-1, 1\] \(3, H, W\)"):
        to_pil(x)


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def stripes(width, height):
    """Column x is red x, row y is green y: a pixel tells where it came from."""
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([columns, rows, np.zeros_like(rows)], -1).astype(np.uint8))


@pytest.mark.parametrize("position, left", [((0, 0), 0), ((0.5, 0.5), 6), ((1, 1), 12), ((0.3, 0.9), 4)])
def test_crop_keeps_whole_pixels_at_the_position(position, left):
    wide, tall = noise(20, 8), noise(8, 20)
    assert fit_image(wide, 8, position=position).tobytes() == wide.crop((left, 0, left + 8, 8)).tobytes()
    assert fit_image(tall, 8, position=position[::-1]).tobytes() == tall.crop((0, left, 8, left + 8)).tobytes()


@pytest.mark.parametrize("size", [(100, 73), (73, 100), (64, 64), (41, 30), (301, 200)])
def test_centre_crop_agrees_with_torchvision(size):
    theirs = transforms.Resize(32, transforms.InterpolationMode.LANCZOS), transforms.CenterCrop(32)
    image = stripes(*size)
    difference = np.asarray(transforms.Compose(theirs)(image)).astype(int) - np.asarray(fit_image(image, 32))
    # Pillow picks the order of its two passes by cost, and a pass rounds.
    assert np.abs(difference).max() <= 2


def test_pad_is_centred_on_the_background():
    image = np.asarray(fit_image(Image.new("RGB", (16, 8), RED), 8, "pad", "black"))
    expected = np.zeros((8, 8, 3))
    expected[2:6] = RED
    assert (image == expected).all()


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(st.integers(1, 60), st.integers(1, 60)) | st.sampled_from([(2, 9000), (9000, 1)]),
    st.integers(1, 40),
    st.sampled_from(["crop", "pad"]),
    st.sampled_from(sorted(INTERPOLATIONS)),
    st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_fit_is_always_exactly_square_and_paints_no_other_colour(size, resolution, fit, interpolation, position):
    image = fit_image(Image.new("RGB", size, RED), resolution, fit, "red", interpolation, position)
    assert image.getcolors() == [(resolution**2, RED)]


def test_interpolations_are_those_of_torchvision():
    modes = {mode.name.lower() for mode in transforms.InterpolationMode}
    assert set(INTERPOLATIONS) == modes
    checks = Image.fromarray(np.indices((4, 4)).sum(0).astype(np.uint8) % 2 * 255).convert("RGB")
    assert {c for _, c in fit_image(checks, 6, interpolation="nearest_exact").getcolors()} == {WHITE, BLACK}
    assert {c for _, c in fit_image(checks, 6, interpolation="bilinear").getcolors()} > {WHITE, BLACK}


@pytest.mark.parametrize(
    "name, expected",
    [
        ("tench, Tinca tinca", "tench"),
        ("hot_dog", "hot dog"),
        ("t-shirt", "t-shirt"),
        ("jack-o'-lantern", "jack-o'-lantern"),
        ('"quoted"', '"quoted"'),
        ("  spaced  ", "spaced"),
        ("n01440764", "tench"),
        ("n00000000", "n00000000"),
        ("château", "château"),
        ("椅子", "椅子"),
        ("_", "_"),
    ],
)
def test_readable_class(name, expected):
    assert readable_class(name) == expected


def write(path, content=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def sketch(path, size=(16, 8), mark=4):
    image = Image.new("RGB", size, "white")
    image.paste(BLACK, (0, 0, mark, mark))
    return write(path, saved(image))


@pytest.fixture
def striped(tmp_path):
    """Six images whose columns differ, with two captions each."""
    paths = [write(tmp_path / f"{i}.png", saved(stripes(40, 8))) for i in range(6)]
    return CaptionedImages(paths, [p.name for p in paths], [["a", "b"]] * 6, resolution=8, random_flip=True)


def fingerprints(loader):
    return {
        name: (caption, pixels.sum().item(), pixels[0, 0, 0].item())
        for batch in loader
        for name, caption, pixels in zip(batch["name"], batch["caption"], batch["pixel_values"], strict=True)
    }


def test_draws_do_not_depend_on_workers_order_or_subset(striped):
    keys = [(3, index) for index in range(6)]
    alone = fingerprints(DataLoader(striped, sampler=keys))
    assert len(set(alone.values())) > 3  # draws differ between items
    torch.manual_seed(1)
    assert fingerprints(DataLoader(striped, sampler=keys[::-1], batch_size=4, num_workers=2)) == alone
    spawned = DataLoader(striped, sampler=keys, num_workers=1, multiprocessing_context="spawn")
    assert fingerprints(spawned) == alone
    subset = striped.select([5, 2]).select([1])
    assert fingerprints(DataLoader(subset, sampler=[(3, 0)])) == {"2.png": alone["2.png"]}


def test_draws_change_with_epoch_and_seed_and_leave_the_global_generator(striped):
    def draws(data, epoch):
        return fingerprints(DataLoader(data, sampler=[(epoch, i) for i in range(6)]))

    other = CaptionedImages(striped.sources, striped.names, striped.captions, resolution=8, random_flip=True, seed=1)
    assert draws(striped, 0) != draws(striped, 1)
    assert draws(striped, 0) != draws(other, 0)
    before = torch.random.get_rng_state()
    striped[0, 0]
    assert torch.equal(before, torch.random.get_rng_state())


def test_every_crop_flip_and_caption_comes_up(striped):
    items = [striped[epoch, 0] for epoch in range(400)]
    assert {item["caption"] for item in items} == {"a", "b"}
    rows = [((item["pixel_values"][0, 0] + 1) * 127.5).round().int() for item in items]
    assert {int(row.min()) for row in rows} == set(range(33))
    assert 160 < sum(bool(row[0] > row[1]) for row in rows) < 240


def test_centre_crop_without_flip_is_the_same_each_epoch(striped):
    plain = CaptionedImages(striped.sources, striped.names, striped.captions, resolution=8, center_crop=True)
    pixels = [plain[epoch, 0]["pixel_values"] for epoch in range(20)]
    assert all(torch.equal(x, to_tensor(fit_image(stripes(40, 8), 8))) for x in pixels)


def test_switching_the_flip_on_leaves_crop_and_caption(striped):
    still = CaptionedImages(striped.sources, striped.names, striped.captions, resolution=8)
    for epoch in range(10):
        flipped, plain = striped[epoch, 0], still[epoch, 0]
        assert flipped["caption"] == plain["caption"]
        assert torch.equal(flipped["pixel_values"].sort().values, plain["pixel_values"].sort().values)


def test_generator_is_its_key():
    assert torch.rand(1, generator=generator(0, "noise", 3)) == torch.rand(1, generator=generator(0, "noise", 3))
    keys = [(0, 1, 23), (0, 12, 3), (0, 1, "23"), (1, 0, 23), (0,), ("0",)]
    assert len({torch.rand(1, generator=generator(*key)).item() for key in keys}) == len(keys)


def captions_of(data):
    return {data[0, i]["name"].rsplit("/", 1)[-1]: data.captions[data.rows[i]] for i in range(len(data))}


def test_caption_sources_in_their_order(tmp_path):
    for folder in ("hot_dog", "t-shirt"):
        for name in ("1.png", "2.PNG"):
            sketch(tmp_path / folder / f"{folder}{name}")
    write(tmp_path / "t-shirt/t-shirt2.txt", "ein Hemd\r\n\n  a shirt \n")
    assert captions_of(captioned_folder(tmp_path)) == {
        "hot_dog1.png": ["a sketch of a hot dog"],
        "hot_dog2.PNG": ["a sketch of a hot dog"],
        "t-shirt1.png": ["a sketch of a t-shirt"],
        "t-shirt2.PNG": ["ein Hemd", "a shirt"],
    }
    rows = [
        {"file_name": "hot_dog/hot_dog1.png", "text": ["x", "y"]},
        {"file_name": "t-shirt/t-shirt1.png", "text": ""},
    ]
    write(tmp_path / "metadata.jsonl", "\n".join(map(json.dumps, rows)))
    data = captioned_folder(tmp_path, default_caption="d", on_missing_caption="default")
    assert captions_of(data) == {
        "hot_dog1.png": ["x", "y"],
        "hot_dog2.PNG": ["d"],
        "t-shirt1.png": ["d"],
        "t-shirt2.PNG": ["ein Hemd", "a shirt"],
    }


def test_the_template_names_the_class(tmp_path):
    sketch(tmp_path / "tench, Tinca tinca/deep/1.JPEG")
    data = captioned_folder(tmp_path, caption_template="{class}, {drawn} in ink")
    assert captions_of(data) == {"1.JPEG": ["tench, {drawn} in ink"]}


def test_two_classes_of_one_name_stay_two(tmp_path):
    for folder in ("crane, bird", "crane, machine"):
        sketch(tmp_path / folder / "1.png")
    assert len(captioned_folder(tmp_path)) == 2
    labels = datasets.ClassLabel(names=["crane, bird", "crane, machine"])
    features = datasets.Features({"image": datasets.Image(), "label": labels})
    rows = {"image": [str(tmp_path / "crane, bird/1.png")] * 2, "label": [0, 1]}
    assert len(captioned_dataset(datasets.Dataset.from_dict(rows, features), name="cranes")) == 2


def test_metadata_csv_from_a_spreadsheet(tmp_path):
    sketch(tmp_path / "é 1.png")
    sketch(tmp_path / "2.png")
    with open(tmp_path / "metadata.csv", "w", encoding="utf-8-sig", newline="") as file:
        rows = [["file_name", "n", "caption"], ["é 1.png", 1, 'a "house", drawn'], ["./2.png", 2, "two\nlines"]]
        csv.writer(file).writerows(rows)
    data = captioned_folder(tmp_path, caption_column="caption")
    assert captions_of(data) == {"é 1.png": ['a "house", drawn'], "2.png": ["two\nlines"]}


def test_metadata_lines_end_at_newlines_only(tmp_path):
    sketch(tmp_path / "1.png")
    line = json.dumps({"file_name": "1.png", "text": "a\u2028b 椅子"}, ensure_ascii=False)
    write(tmp_path / "metadata.jsonl", "\ufeff" + line + "\r\n\r\n")
    assert captions_of(captioned_folder(tmp_path)) == {"1.png": ["a\u2028b 椅子"]}


def test_metadata_in_a_sub_folder_is_relative_to_it(tmp_path):
    sketch(tmp_path / "set/images/1.png")
    write(tmp_path / "set/metadata.csv", "file_name,text\nimages/1.png,one\nimages/1.png,uno\n")
    assert captions_of(captioned_folder(tmp_path)) == {"1.png": ["one", "uno"]}


def test_images_that_metadata_forgets_are_counted_not_dropped(tmp_path, caplog):
    for name in ("1.png", "2.png", "3.png"):
        sketch(tmp_path / "images" / name)
    write(tmp_path / "metadata.csv", "file_name,text\nimages/1.png,one\nimages/3.png,  \n")
    with pytest.raises(InputError, match=r"2 of 3 images .*2\.png, .*3\.png.*metadata.csv has the columns file_name"):
        captioned_folder(tmp_path)
    data = captioned_folder(tmp_path, on_missing_caption="skip")
    assert captions_of(data) == {"1.png": ["one"]}
    assert "2 of 3 images have no caption" in caplog.text


def test_the_default_is_for_folders_without_captions_and_for_gaps_on_request(tmp_path):
    for name in ("1.png", "2.png"):
        sketch(tmp_path / name)
    assert captions_of(captioned_folder(tmp_path, default_caption="d")) == {"1.png": ["d"], "2.png": ["d"]}
    write(tmp_path / "1.txt", "one")
    with pytest.raises(InputError, match="1 of 2 images have no caption"):
        captioned_folder(tmp_path, default_caption="d")
    write(tmp_path / "2.txt", " \n")
    data = captioned_folder(tmp_path, default_caption="d", on_missing_caption="default")
    assert captions_of(data) == {"1.png": ["one"], "2.png": ["d"]}


def test_order_is_that_of_the_paths(tmp_path):
    for name in ("b/1.png", "a/2.png", "a/10.png", "a/1.JPEG"):
        sketch(tmp_path / name)
    data = captioned_folder(tmp_path)
    assert [str(tmp_path / name) for name in ("a/1.JPEG", "a/10.png", "a/2.png", "b/1.png")] == data.names


def test_leftovers_make_no_class_and_are_named(tmp_path, caplog):
    sketch(tmp_path / "cat/1.png")
    for hidden in (".ipynb_checkpoints/1.png", "cat/._1.png", "__MACOSX/cat/1.png", "cat/.hidden/1.png"):
        sketch(tmp_path / hidden)
    for stray in ("Thumbs.db", ".DS_Store", "notes.md", "cat/notes.md"):
        write(tmp_path / stray)
    (tmp_path / "empty dog").mkdir()
    assert captioned_folder(tmp_path).names == [str(tmp_path / "cat/1.png")]
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert "empty dog holds no images" in warnings[0]
    assert warnings[1].endswith(": notes.md")


def test_a_linked_class_folder_is_read_and_a_loop_is_an_error(tmp_path):
    sketch(tmp_path / "elsewhere/1.png")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/cat").symlink_to(tmp_path / "elsewhere")
    assert captions_of(captioned_folder(tmp_path / "root")) == {"1.png": ["a sketch of a cat"]}
    (tmp_path / "elsewhere/again").symlink_to(tmp_path / "root")
    with pytest.raises(InputError, match=r"root.cat.again links to a folder that is read already"):
        captioned_folder(tmp_path / "root")


def rows_of(tmp_path, **columns):
    path = str(sketch(tmp_path / "1.png", (20, 8)))
    count = len(next(iter(columns.values()), [0]))
    return datasets.Dataset.from_dict({"image": [path] * count, **columns}).cast_column("image", datasets.Image())


def test_dataset_columns(tmp_path):
    rows = rows_of(tmp_path, text=["a 'b', c", "é"], many=[["x", "y"], ["z"]], kind=[1, 0])
    rows = rows.cast_column("kind", datasets.ClassLabel(names=["hot_dog", "tench, Tinca tinca"]))
    for column, expected in {
        "text": [["a 'b', c"], ["é"]],
        "many": [["x", "y"], ["z"]],
        "kind": [["a sketch of a tench"], ["a sketch of a hot dog"]],
    }.items():
        data = captioned_dataset(rows, name="toy", caption_column=column, resolution=8)
        assert data.captions == expected
        assert data[0, 1]["name"] == "row 1 of toy"
        assert data[0, 1]["pixel_values"].shape == (3, 8, 8)
    # A format set by the caller must not reach the captions or the images.
    formatted = captioned_dataset(rows.with_format("numpy"), name="toy", caption_column="many", resolution=8)
    assert formatted.captions == [["x", "y"], ["z"]]


def test_a_lone_class_label_captions_and_says_so(tmp_path, caplog):
    rows = rows_of(tmp_path, label=[0, -1]).cast_column("label", datasets.ClassLabel(names=["cat"]))
    data = captioned_dataset(rows, name="toy", on_missing_caption="skip")
    assert (data.captions[0], len(data)) == (["a sketch of a cat"], 1)
    assert "toy has no column 'text'" in caplog.text


def test_a_data_set_of_images_alone_takes_the_default(tmp_path):
    assert captioned_dataset(rows_of(tmp_path), name="toy", default_caption="d").captions == [["d"]]


def test_dataset_rows_are_undecoded_and_cross_to_workers(tmp_path):
    buffer = saved(image_of("RGBA", *[CLEAR] * 4))
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"image": [{"bytes": buffer, "path": None}] * 2, "text": ["a", "b"]}, features)
    data = captioned_dataset(rows, name="toy", resolution=4)
    assert data.sources[0]["bytes"] == buffer  # so that load_image sees the transparency
    loader = DataLoader(data, sampler=[(0, 0), (0, 1)], num_workers=1, multiprocessing_context="spawn")
    assert [(b["caption"], b["pixel_values"].min().item()) for b in loader] == [(["a"], 1.0), (["b"], 1.0)]


@pytest.fixture
def mixed(tmp_path):
    """good, cut by a crop, blank, blank but for a speck, three unreadable."""
    sketch(tmp_path / "a good.png", (10, 10))
    sketch(tmp_path / "b wide.png", (20, 8))
    sketch(tmp_path / "c blank.png", (10, 10), 0)
    sketch(tmp_path / "d speck.png", (200, 200), 1)
    write(tmp_path / "e empty.png")
    write(tmp_path / "f cut short.png", (tmp_path / "a good.png").read_bytes()[:-20])
    write(tmp_path / "g text.png", "hello")
    sketch(tmp_path / "h good.png", (11, 10))
    return captioned_folder(tmp_path, default_caption="d", resolution=8)


def test_scan_finds_the_unreadable_the_blank_and_the_cut(mixed):
    found = scan(mixed, workers=3)
    assert [index for index, _ in found.bad] == [4, 5, 6]
    assert (found.blank, found.cut) == ([2, 3], 1)
    for part in ("8 images", "unreadable: 3", "near-constant: 2", "c blank.png", "d speck.png", ": 1, --fit pad"):
        assert part in found.summary
    assert pickle.loads(pickle.dumps(found)) == found
    mixed.fit = "pad"
    assert scan(mixed).cut == 0


def test_thin_lines_are_not_blank_and_whole_data_has_a_short_summary(tmp_path):
    image = Image.new("RGB", (512, 512), "white")
    image.paste(BLACK, (100, 100, 130, 101))
    path = write(tmp_path / "line.png", saved(image))
    found = scan(CaptionedImages([path], ["line"], ["x"]))
    assert (found.bad, found.blank, found.cut, found.summary) == ([], [], 0, "1 images")


def test_bad_images_are_skipped_and_named_and_the_rest_keeps_its_draws(mixed, caplog):
    kept = drop_bad(mixed, scan(mixed), "skip")
    assert [kept.name(i)[-6:] for i in range(len(kept))] == ["od.png", "de.png", "nk.png", "ck.png", "od.png"]
    assert "3 of 8 images" in caplog.text and "f cut short.png" in caplog.text
    assert torch.equal(kept[1, 4]["pixel_values"], mixed[1, 7]["pixel_values"])


def test_the_error_lists_ten_and_counts_the_others(tmp_path):
    paths = [write(tmp_path / f"{i:02}.png") for i in range(12)] + [sketch(tmp_path / "good.png")]
    data = CaptionedImages(paths, list(map(str, paths)), ["x"] * 13)
    with pytest.raises(InputError) as error:
        drop_bad(data, scan(data), "error")
    message = str(error.value)
    assert "12 of 13" in message and "09.png" in message and "10.png" not in message and "and 2 more" in message
    assert message.endswith("--on_bad_image skip goes on with the other 1.")


def test_no_image_left_is_an_error(tmp_path):
    path = write(tmp_path / "1.png")
    data = CaptionedImages([path], ["the only one"], ["x"])
    with pytest.raises(InputError, match=r"(?s)No image is left.*the only one"):
        drop_bad(data, scan(data), "skip")
