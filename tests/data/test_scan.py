import io

import pytest
import torch
from PIL import Image

from sketch_perceptual.data.captions import captioned_folder
from sketch_perceptual.data.datasets import CaptionedImages
from sketch_perceptual.data.scan import readable, scan
from sketch_perceptual.data.scan_cache import BLANK
from sketch_perceptual.errors import InputError

WHITE, BLACK, RED = (255, 255, 255), (0, 0, 0), (255, 0, 0)


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write(path, content=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def sketch(path, size=(16, 8), mark=4):
    image = Image.new("RGB", size, "white")
    image.paste(BLACK, (0, 0, mark, mark))
    return write(path, saved(image))


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


def drop_bad(data, on_bad_image):
    return data.select(readable(data, scan(data).bad, on_bad_image))


def test_scan_finds_the_unreadable_and_the_blank(mixed):
    found = scan(mixed, workers=3)
    assert list(found.bad) == [4, 5, 6] and list(found.infos) == [0, 1, 2, 3, 7]
    assert found.noted(BLANK) == [2, 3]
    assert "f cut short.png" in found.bad[5]


def test_thin_lines_are_not_blank(tmp_path):
    image = Image.new("RGB", (512, 512), "white")
    image.paste(BLACK, (100, 100, 130, 101))
    path = write(tmp_path / "line.png", saved(image))
    found = scan(CaptionedImages([path], ["line"], ["x"]))
    assert (found.bad, found.infos[0].notes) == ({}, ())


def test_bad_images_are_skipped_and_named_and_the_rest_keeps_its_draws(mixed, caplog):
    kept = drop_bad(mixed, "skip")
    assert [kept.name(i)[-6:] for i in range(len(kept))] == ["od.png", "de.png", "nk.png", "ck.png", "od.png"]
    assert "3 of 8 images" in caplog.text and "f cut short.png" in caplog.text
    assert torch.equal(kept[1, 4]["pixel_values"], mixed[1, 7]["pixel_values"])


def test_the_error_lists_ten_and_counts_the_others(tmp_path):
    paths = [write(tmp_path / f"{i:02}.png") for i in range(12)] + [sketch(tmp_path / "good.png")]
    data = CaptionedImages(paths, list(map(str, paths)), ["x"] * 13)
    with pytest.raises(InputError) as error:
        drop_bad(data, "error")
    message = str(error.value)
    assert "12 of 13" in message and "09.png" in message and "10.png" not in message and "and 2 more" in message
    assert "`on_bad_image` skip" in message


def test_no_image_left_is_an_error(tmp_path):
    path = write(tmp_path / "1.png")
    data = CaptionedImages([path], ["the only one"], ["x"])
    with pytest.raises(InputError, match=r"(?s)No image is left.*the only one"):
        drop_bad(data, "skip")
