"""Bad input -> the sentence it must be answered with."""

import io
import json
import struct

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from sketch_perceptual.data.captions import captioned_dataset, captioned_folder
from sketch_perceptual.data.checks import Scan, drop_bad
from sketch_perceptual.data.image_sets import CaptionedImages
from sketch_perceptual.data.images import fit_image, load_image
from sketch_perceptual.errors import InputError


def noise(kind="PNG", size=(64, 64)):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def tiff(*values, dtype="f4"):
    buffer = io.BytesIO()
    Image.fromarray(np.array([values], dtype)).save(buffer, "TIFF")
    return buffer.getvalue()


def bitmap_header(width, height):
    """A BMP that says how large it is and holds nothing."""
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + head


IMAGES = {
    "empty": (b"", "the file is empty"),
    "not an image": (b"<html></html>", "it is not an image that Pillow knows"),
    "head only": (b"\x89PNG\r\n\x1a\n", "not an image|truncated|Truncated"),
    "truncated PNG": (noise()[:5000], "truncated"),
    "truncated JPEG": (noise("JPEG")[:1500], "truncated"),
    "truncated WebP": (noise("WEBP")[:1500], "decoder"),
    "damaged PNG": (noise()[:100] + b"\xff" * 20 + noise()[120:], r"broken|CRC|decoder error|-3"),
    "bomb that Pillow warns of": (bitmap_header(10000, 10000), "89478485 pixels"),
    "bomb that Pillow refuses": (bitmap_header(20000, 20000), "89478485 pixels"),
    "float with NaN": (tiff(0.5, np.nan), "run from nan to nan"),
    "float below 0": (tiff(-1, 1), r"from -1\.0 to 1\.0, expected 0 to 1 or 0 to 255"),
    "float above 255": (tiff(0, 1000), r"to 1000\.0, expected"),
    "32-bit integers": (tiff(0, 70000, dtype="i4"), "from 0 to 70000, expected 0 to 65535"),
}


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
        (None, "got None"),
        ({"bytes": None, "path": None}, "got None"),
        (7, "expected a path, bytes, a PIL image"),
        (Image.new("RGB", (0, 4)), "it has no pixels"),
    ],
)
def test_other_sources_are_refused(source, sentence):
    with pytest.raises(InputError, match=sentence):
        load_image(source)


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda i: load_image(i, "whiet"), "--background: 'whiet' is not a colour"),
        (lambda i: fit_image(i, 8, "squeeze"), "--fit must be one of crop, pad, got 'squeeze'"),
        (lambda i: fit_image(i, 8, interpolation="cubic"), "--image_interpolation_mode .*bicubic.*got 'cubic'"),
        (lambda i: fit_image(i, 0), "--resolution must be at least 1"),
        (lambda i: CaptionedImages([i], ["i"], ["c"], fit="squeeze"), "--fit"),
        (lambda i: drop_bad(CaptionedImages([i], ["i"], ["c"]), Scan([], [], 0, ""), "drop"), "--on_bad_image"),
        (lambda i: drop_bad(CaptionedImages([], [], []), Scan([], [], 0, ""), "skip"), "No image is left"),
    ],
)
def test_a_wrong_option_is_named(call, sentence):
    with pytest.raises(InputError, match=sentence):
        call(Image.new("RGB", (4, 4)))


def line(file_name="1.png", **others):
    return json.dumps({"file_name": file_name, **others})


# files beside 1.png -> options, sentence
FOLDERS = {
    "no caption": ({}, {}, r"1 of 1 images have no caption: .*1\.png.*nowhere: 1.*--caption_column.*--on_missing"),
    "all skipped": ({}, {"on_missing_caption": "skip"}, "1 of 1 images have no caption"),
    "unknown choice": (
        {},
        {"on_missing_caption": "ignore"},
        "--on_missing_caption must be one of error, skip, default",
    ),
    "no default": ({}, {"on_missing_caption": "default"}, "--on_missing_caption default needs a --default_caption"),
    "template": ({}, {"caption_template": "a sketch"}, r"--caption_template must contain \{class\}, got 'a sketch'"),
    "empty side-car": ({"1.txt": "\n"}, {}, "1 of 1 images have no caption"),
    "side-car not UTF-8": ({"1.txt": b"caf\xe9"}, {}, r"1\.txt is not UTF-8"),
    "no caption column": (
        {"metadata.csv": "file_name,caption\n1.png,x"},
        {},
        r"metadata\.csv has no column 'text', set --caption_column to one of: caption, file_name",
    ),
    "null": ({"metadata.jsonl": line(text=None)}, {}, "1 of 1 images have no caption"),
    "empty list": ({"metadata.jsonl": line(text=[None, " "])}, {}, "1 of 1 images have no caption"),
    "number": ({"metadata.jsonl": line(text=5)}, {}, r"metadata\.jsonl line 1: a caption must be a string .* got 5"),
    "no file_name": ({"metadata.csv": "image,text\n1.png,x"}, {}, r"line 2 has no file_name; its columns are image"),
    "missing file": (
        {"metadata.jsonl": line(text="x") + "\n" + line("2.png", text="y")},
        {},
        r"metadata\.jsonl line 2 lists 2\.png, but there is no such image",
    ),
    "out of the folder": (
        {"metadata.csv": "file_name,text\n../1.png,x"},
        {},
        r"line 2 leaves the folder: \.\./1\.png",
    ),
    "absolute": ({"metadata.csv": "file_name,text\n/1.png,x"}, {}, r"leaves the folder: /1\.png"),
    "not JSON": ({"metadata.jsonl": line(text="x") + "\n{text: 1}"}, {}, r"metadata\.jsonl line 2 is not JSON"),
    "no object": ({"metadata.jsonl": "[1]"}, {}, r"metadata\.jsonl line 1 is not a JSON object"),
    "unquoted comma": ({"metadata.csv": "file_name,text\n1.png,a, b"}, {}, r"metadata\.csv line 2 has more cells"),
    "unclosed quote": ({"metadata.csv": 'file_name,text\n1.png,"a'}, {}, r"metadata\.csv line 2 is not CSV"),
    "metadata not UTF-8": ({"metadata.csv": b"file_name,text\n1.png,caf\xe9"}, {}, r"metadata\.csv is not UTF-8"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_bad_folder_is_answered_with_a_sentence(case, tmp_path):
    files, options, sentence = FOLDERS[case]
    for name, content in {"1.png": noise(), **files}.items():
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError, match=sentence):
        captioned_folder(tmp_path, **options)


def test_folders_without_images_are_named(tmp_path):
    with pytest.raises(InputError, match=r"--train_data_dir: there are no images in .*" + tmp_path.name):
        captioned_folder(tmp_path)
    with pytest.raises(InputError, match=r"cannot read the folder .*nowhere: No such file"):
        captioned_folder(tmp_path / "nowhere")


LABEL = datasets.ClassLabel(names=["cat"])
DATA_SETS = {
    "no image column": (
        {"picture": ["x"], "text": ["y"]},
        "toy has no column 'image', set --image_column .*picture, text",
    ),
    "no images in it": ({"image": [1], "text": ["y"]}, "'image' of toy holds no images, set --image_column"),
    "no caption column": ({"image": ["x"], "a": ["y"]}, "toy has no column 'text', set --caption_column .*image, a"),
    "two labels": ({"image": ["x"], "a": [0], "b": [0]}, "toy has no column 'text', set --caption_column"),
    "numbers": ({"image": ["x"], "text": [3]}, "row 0 of toy: a caption must be a string or a list of strings, got 3"),
    "null": ({"image": ["x", "y"], "text": ["c", None]}, "1 of 2 images have no caption: row 1 of toy.*image, text"),
    "images alone": ({"image": ["x"]}, "1 of 1 images have no caption: row 0 of toy"),
}


@pytest.mark.parametrize("case", DATA_SETS)
def test_a_bad_data_set_is_answered_with_a_sentence(case):
    columns, sentence = DATA_SETS[case]
    rows = datasets.Dataset.from_dict(columns)
    for column in {"a", "b"} & set(columns) if case == "two labels" else ():
        rows = rows.cast_column(column, LABEL)
    with pytest.raises(InputError, match=sentence):
        captioned_dataset(rows, name="toy")


def test_a_null_image_is_a_named_row():
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"image": [None], "text": ["c"]}, features)
    with pytest.raises(InputError, match=r"row 0 of toy: expected a path.* got None"):
        captioned_dataset(rows, name="toy")[0, 0]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_lost_during_training_is_named(workers, tmp_path):
    data = CaptionedImages([tmp_path / "1.png"], ["sketches/1.png"], ["x"])
    with pytest.raises(InputError, match=r"sketches/1\.png: there is no such file"):
        list(DataLoader(data, sampler=[(0, torch.tensor(0).item())], num_workers=workers))
