"""Files as scanners and drawing programs write them: what becomes of their pixels, and what is noted."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin

from sketch_perceptual.data.images import HALVED, INVERTED, PAGES, STRIPPED, load_extras, load_image
from sketch_perceptual.errors import InputError, TooLittleMemory

LEVELS = (0, 16, 128, 255)  # of a row of four pixels


def drawing(paper=255, ink=0, size=(64, 64), mode="L"):
    image = Image.new(mode, size, paper)
    ImageDraw.Draw(image).ellipse((16, 16, 47, 47), outline=ink, width=2)
    return image


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def row():
    return Image.fromarray(np.array([LEVELS], np.uint8))


def chunk(kind, data, crc=None):
    whole = zlib.crc32(kind + data) if crc is None else crc
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", whole)


def png(*chunks, image=None, last=b""):
    """With chunks after the head, and bytes before the end."""
    data = saved(image or row())
    return data[:33] + b"".join(chunks) + data[33:-12] + last + data[-12:]


def text(zipped, **options):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", "<x>" + "y" * 3_000_000, zip=zipped)
    info.add_text("workflow", "x" * 3_000_000, zip=zipped)
    return saved(row(), pnginfo=info, **options)


def tiff(values, bits, photometric, sample_format=1):
    """One row of grey levels, in the bytes `values`."""
    width = len(values) * 8 // bits
    short = {256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1, 279: len(values)}
    short[339] = sample_format
    tags = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in short.items())
    return b"II*\0" + struct.pack("<I", 8 + len(values)) + values + struct.pack("<H", len(short)) + tags + b"\0" * 4


SIXTEEN = np.array(LEVELS, "<u2") * 257
TWELVE = b"\x00\x01\x00\x80\x0f\xff"  # 0, 256, 2048, 4095: three bytes for two levels
CLEAR = Image.merge("LA", (row(), Image.new("L", (4, 1), 0)))

# name -> file, its grey levels, what is noted
FILES = {
    "3 MB of zipped text": (text(True), LEVELS, [STRIPPED]),
    "3 MB of text": (text(False), LEVELS, []),
    "text whose checksum is wrong": (png(chunk(b"tEXt", b"Comment\0hello", crc=1)), LEVELS, [STRIPPED]),
    "short size in print": (png(chunk(b"pHYs", b"\0\0")), LEVELS, [STRIPPED]),
    "short gamma": (png(chunk(b"gAMA", b"\0")), LEVELS, [STRIPPED]),
    "profile of an unknown kind": (png(chunk(b"iCCP", b"x\0\7y")), LEVELS, [STRIPPED]),
    "broken text after the pixels": (png(last=chunk(b"zTXt", b"x\0\7y")), LEVELS, [STRIPPED]),
    "cut short in a text after the pixels": (png(last=chunk(b"tEXt", b"x" * 99))[:-60], LEVELS, [STRIPPED]),
    "no end": (saved(row())[:-12], LEVELS, []),
    "bytes after the end": (saved(row()) + b"\0" * 999, LEVELS, []),
    "broken text, transparent": (png(chunk(b"pHYs", b""), image=CLEAR), (255,) * 4, [STRIPPED]),
    "16 bits": (tiff(SIXTEEN.tobytes(), 16, 1), LEVELS, []),
    "16 bits, 0 is white": (tiff((65535 - SIXTEEN).tobytes(), 16, 0), LEVELS, []),
    "8 bits, 0 is white": (tiff(bytes(255 - level for level in LEVELS), 8, 0), LEVELS, []),
    "1 bit, 0 is white": (tiff(b"\xf0", 1, 0), (0,) * 4 + (255,) * 4, []),
    "floats, 0 is white": (tiff((1 - np.array(LEVELS, "<f4") / 255).tobytes(), 32, 0, 3), LEVELS, []),
    "12 bits": (tiff(TWELVE, 12, 1), LEVELS, []),
    "pages": (saved(row(), "TIFF", save_all=True, append_images=[Image.new("L", (4, 1))]), LEVELS, [PAGES]),
    "frames of a PNG": (saved(row(), save_all=True, append_images=[Image.new("L", (4, 1))]), LEVELS, [PAGES]),
    "frames of a GIF": (saved(row(), "GIF", save_all=True, append_images=[Image.new("L", (4, 1))]), LEVELS, [PAGES]),
}


@pytest.mark.parametrize("name", FILES)
def test_pixels_are_read_whatever_is_around_them(name):
    data, levels, notes = FILES[name]
    image = load_image(data)
    assert [image.getpixel((x, 0)) for x in range(image.width)] == [(level,) * 3 for level in levels]
    assert image.info == {"notes": notes}


def test_orientation_survives_broken_text_but_not_a_wrong_checksum():
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = chunk(b"eXIf", exif.tobytes()[6:])
    broken = chunk(b"pHYs", b"")
    assert load_image(png(whole, broken)).size == (1, 4)
    assert load_image(png(whole[:-1] + b"\0", broken)).size == (4, 1)
    assert load_extras(png(broken, image=CLEAR))[0].getextrema() == (0, 0)


def test_damaged_pixels_and_transparency_are_not_mended():
    data = saved(drawing())
    for damaged in (data[:60], data[:45] + b"\xff\xff" + data[47:], png(chunk(b"tRNS", b"\0\0", crc=1))):
        with pytest.raises(InputError, match="Cannot read the image"):
            load_image(damaged)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    "mode, kind, reads",
    [("1", "TIFF", True), ("L", "PNG", True), ("L", "JPEG", True), ("RGB", "JPEG", True), ("RGB", "PNG", False)],
)
def test_large_scans_are_halved_where_that_is_cheap(mode, kind, reads, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 63)
    ink, paper = (0, 255) if mode != "RGB" else ((0, 0, 0), (255, 255, 255))
    data = saved(drawing(paper, ink, mode=mode), kind)
    if reads:
        image = load_image(data)
        assert (image.size, image.info["notes"]) == ((32, 32), [HALVED])
        half = np.asarray(drawing().reduce(2), int)
        assert np.abs(np.asarray(image.convert("L"), int) - half).mean() < 4  # what JPEG does
    else:
        with pytest.raises(InputError, match=r"more than 4032 pixels"):
            load_image(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 31)
    with pytest.raises(InputError, match="more than 1984 pixels"):
        load_image(data)


# name -> picture, whether its strokes are light on dark paper
PAPERS = {
    "black on white": (drawing(), False),
    "white on black": (drawing(0, 255), True),
    "chalk on a board": (drawing((40, 60, 50), (220, 220, 210), mode="RGB"), True),
    "grey on black": (drawing(0, 90), False),
    "black": (Image.new("L", (64, 64)), False),
    "white": (Image.new("L", (64, 64), 255), False),
    "black on white in a black frame": (ImageOps.expand(drawing(), 1, 0), False),
    "a large silhouette": (ImageOps.expand(Image.new("L", (58, 58)), 3, 255), False),
    "a photo at night": (Image.eval(Image.effect_noise((64, 64), 40), lambda level: level // 2), False),
    "one pixel": (Image.new("L", (1, 1)), False),
}


@pytest.mark.parametrize("name", PAPERS)
def test_light_strokes_on_dark_paper_are_inverted_if_asked(name):
    picture, is_negative = PAPERS[name]
    plain, auto, always = (load_image(picture, invert=invert) for invert in ("never", "auto", "always"))
    assert plain.tobytes() == picture.convert("RGB").tobytes() and plain.info["notes"] == []
    assert always.tobytes() == bytes(255 - level for level in plain.tobytes())
    assert auto.tobytes() == (always if is_negative else plain).tobytes()
    assert auto.info["notes"] == [INVERTED] * is_negative


def test_transparency_is_laid_on_the_paper_before_it_is_inverted():
    strokes = Image.merge("LA", (Image.new("L", (64, 64), 255), drawing(0, 255)))  # white ones on nothing
    assert load_image(strokes, "black", invert="auto").tobytes() == drawing().convert("RGB").tobytes()


def test_a_wrong_invert_is_refused():
    with pytest.raises(InputError, match="`invert` must be one of never, auto, always"):
        load_image(drawing(), invert="yes")


@pytest.mark.parametrize("error", [MemoryError(), OSError("out of memory error when reading image file")])
def test_too_little_memory_is_not_a_damaged_image(error, monkeypatch):
    def fail(self):
        raise error

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load_prepare", fail)
    with pytest.raises(TooLittleMemory, match=r"memory to read scan\.png"):
        load_image(saved(drawing()), name="scan.png")
