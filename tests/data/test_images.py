import io
import struct
import zlib

import numpy as np
import pytest
import torch
from bad_images import IMAGES
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

from sketch_perceptual.data.images import (
    INTERPOLATIONS,
    bucket_size,
    fit_image,
    fit_key,
    load_extras,
    load_image,
    to_pil,
    to_tensor,
)
from sketch_perceptual.errors import InputError

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
    assert to_pil(to_tensor(image)).tobytes() == image.tobytes()  # which are upright already


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
    with path.open("rb") as file:
        for source in (file, file, io.BytesIO(data)):
            assert load_image(source).getpixel((0, 0)) == RED
    with (
        path.open() as file,
        pytest.raises(InputError, match=r"früher .*\.png: it is open as text: open it in mode rb"),
    ):
        load_image(file)


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


@pytest.mark.parametrize("position, left", [((0, 0), 0), (None, 6), ((1, 1), 12), ((0.3, 0.9), 3)])
def test_crop_keeps_whole_pixels_at_the_position(position, left):
    wide, tall = noise(20, 8), noise(8, 20)
    assert fit_image(wide, 8, position=position).tobytes() == wide.crop((left, 0, left + 8, 8)).tobytes()
    assert (
        fit_image(tall, 8, position=position and position[::-1]).tobytes()
        == tall.crop((0, left, 8, left + 8)).tobytes()
    )


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_centre_crop_is_torchvisions_to_the_bit(interpolation):
    mode, rng = transforms.InterpolationMode[interpolation.upper()], np.random.default_rng(0)
    for width, height, resolution in [(100, 73, 32), (73, 100, 32), *rng.integers(1, 150, (60, 3)).tolist()]:
        theirs = transforms.Compose([transforms.Resize(resolution, mode), transforms.CenterCrop(resolution)])
        image = noise(width, height)
        assert theirs(image).tobytes() == fit_image(image, resolution, interpolation=interpolation).tobytes()


def test_random_crops_are_as_likely_as_torchvisions():
    """All offsets from 0 to the free room, each for an equal share of the positions."""
    starts = [fit_image(stripes(12, 8), 8, position=(n / 1000, 0.5)).getpixel((0, 0))[0] for n in range(1000)]
    assert np.bincount(starts).tolist() == [200] * 5


def test_caches_of_crops_have_another_name_than_before():
    assert [fit_key(fit) for fit in ("crop", "pad", "bucket")] == ["crop-2", "pad", "bucket-2"]


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
    st.none() | st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_fit_is_always_exactly_square_and_paints_no_other_colour(size, resolution, fit, interpolation, position):
    image = fit_image(Image.new("RGB", size, RED), resolution, fit, "red", interpolation, position)
    assert image.getcolors() == [(resolution**2, RED)]


@settings(deadline=None)
@given(st.floats(-1, 1), st.sampled_from([(512, 8, 3.3), (768, 8, 3.3), (64, 4, 2)]))
def test_a_bucket_has_about_as_many_pixels_and_cuts_less_than_a_twentieth(log_ratio, where):
    resolution, multiple, longest = where
    log_ratio *= longest
    width, height = round(1000 * 2 ** (log_ratio / 2)), round(1000 / 2 ** (log_ratio / 2))
    found = bucket_size((width, height), resolution, multiple)
    assert all(side % multiple == 0 for side in found)
    assert 0.75 * resolution**2 <= found[0] * found[1] <= resolution**2
    scale = max(found[0] / width, found[1] / height)
    assert found[0] * found[1] / (width * height * scale**2) > 0.95


def test_buckets_are_multiples_of_64_where_those_will_do():
    assert bucket_size((300, 300), 512) == (512, 512)
    assert bucket_size((2000, 1000), 512) == (640, 320)
    assert bucket_size((1000, 2000), 512) == (320, 640)
    assert bucket_size((210, 297), 512) == (416, 608)
    assert bucket_size((200, 100), 64, 4) == (80, 40)
    with pytest.raises(InputError, match="keeps 95 % of an image of 9000 x 2 pixels; use a larger `resolution`, or"):
        bucket_size((9000, 2), 512)


def test_another_shape_than_a_square_is_filled_or_padded():
    image = stripes(60, 30)
    cropped = np.asarray(fit_image(image, (20, 30)))
    assert cropped.shape == (30, 20, 3)
    assert (cropped == np.asarray(image)[:, 20:40]).all()
    padded = np.asarray(fit_image(image, (60, 40), "pad", "white"))
    assert (padded[5:35] == np.asarray(image)).all()
    assert (padded[:5] == 255).all()
    assert (padded[35:] == 255).all()


def test_interpolations_are_those_of_torchvision():
    modes = {mode.name.lower() for mode in transforms.InterpolationMode}
    assert set(INTERPOLATIONS) == modes
    checks = Image.fromarray(np.indices((4, 4)).sum(0).astype(np.uint8) % 2 * 255).convert("RGB")
    assert {c for _, c in fit_image(checks, 6, interpolation="nearest_exact").getcolors()} == {WHITE, BLACK}
    assert {c for _, c in fit_image(checks, 6, interpolation="bilinear").getcolors()} > {WHITE, BLACK}


@pytest.mark.parametrize("case", IMAGES)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bad_image_is_named_with_the_reason(case, tmp_path):
    content, reason = IMAGES[case]
    path = tmp_path / "früher Entwurf.png"
    path.write_bytes(content)
    for source in (path, {"bytes": None, "path": str(path)}, {"bytes": content, "path": str(path)}):
        with pytest.raises(InputError, match=rf"^Cannot read the image .*früher Entwurf\.png: .*({reason}).*\.$"):
            load_image(source)
    with pytest.raises(InputError, match="row 3 of toy: "):
        load_image(content, name="row 3 of toy")


@pytest.mark.parametrize(
    "source, sentence",
    [
        ("no such/file.png", "image no such/file.png: there is no such file"),
        (".", r"image \.: it is a folder"),
        (b"", "given in memory: the file is empty"),
        (None, "got NoneType"),
        (np.zeros((2, 2, 3)), "got ndarray"),
        ({"bytes": None, "path": None}, "got None"),
        (7, "expected a path, bytes, an open file, a PIL image"),
        (Image.new("RGB", (0, 4)), "it has no pixels"),
    ],
)
def test_other_sources_are_refused(source, sentence):
    with pytest.raises(InputError, match=sentence):
        load_image(source)
