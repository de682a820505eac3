"""Folders as people have them: what the two readers make of each, or say."""

import json
import logging
import os
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from sketch_perceptual.data.captions import captioned_folder
from sketch_perceptual.data.class_folders import class_folders, folder_repeats
from sketch_perceptual.data.labels import labelled_folder
from sketch_perceptual.errors import InputError

NFC, NFD = (unicodedata.normalize(form, "hérisson") for form in ("NFC", "NFD"))
LINE = json.dumps({"file_name": "1.png", "text": "a fox"})
TWO = {"a/1.png": None, "b/1.png": None}
A_OR_B = {"a/1.png": ["a sketch of a a"], "b/1.png": ["a sketch of a b"]}


def build(root, files):
    """Files with their contents; None is a picture, and a Path the target of a link."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            Image.new("RGB", (8, 8), "white").save(path, "PNG")
        elif isinstance(content, os.PathLike):
            path.symlink_to(content)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


# files -> captions by path or what the error says, and what warnings say
CAPTIONED = {
    "splits above classes": (
        {"train/cat/1.png": None, "train/dog/1.png": None, "test/cat/2.png": None},
        "not class names: test, train: pass {root}/train; a caption would be 'a sketch of a test'",
    ),
    "years of splits": (
        {"train2017/cat/1.png": None, "Val_2017/cat/1.png": None},
        "not class names: Val_2017, train2017: pass {root}/train2017; a caption",
    ),
    "a split alone": ({"train/1.png": None}, "not class names: train; a caption would be 'a sketch of a train'"),
    "images alone": ({"images/1.png": None}, "a caption would be 'a sketch of a images'"),
    "of the kind": ({"test-images/1.png": None}, "not class names: test-images"),
    "numbers": ({"0/1.png": None, "01/1.png": None}, "not class names: 0, 01; a caption"),
    "classes one folder deeper": (
        {"zip/cat/1.png": None, "zip/dog/1.png": None},
        "not class names: zip: pass {root}/zip",
    ),
    "leftovers among classes": ({**TWO, "images/1.png": None}, "not class names: images: rename or move"),
    "trains among classes": (
        {"train/1.png": None, "boat/1.png": None},
        {"train/1.png": ["a sketch of a train"], "boat/1.png": ["a sketch of a boat"]},
    ),
    "one class": ({"cat/1.png": None}, {"cat/1.png": ["a sketch of a cat"]}),
    "splits with captions": (
        {"train/1.png": None, "train/1.txt": "a", "test/2.png": None, "test/2.txt": "b"},
        {"train/1.png": ["a"], "test/2.png": ["b"]},
        "All of test, train in {root} are read: pass one of these folders",
    ),
    "kohya's repeats": (
        {"10_cat/1.png": None, "5_old dog/1.png": None},
        {"10_cat/1.png": ["a sketch of a cat"], "5_old dog/1.png": ["a sketch of a old dog"]},
    ),
    "kohya's repeats of no class": ({"10_images/1.png": None}, "a caption would be 'a sketch of a 10 images'"),
    "kohya's captions": (
        {"2_cat/1.png": None, "2_cat/1.caption": "ink, a cat\n"},
        {"2_cat/1.png": ["ink, a cat"]},
    ),
    "two text files": (
        {"1.png": None, "1.txt": "a", "1.caption": "b"},
        {"1.png": ["a"]},
        "Not read in {root}: 1.caption (read: 1.txt).",
    ),
    "two text files of one caption": ({"1.png": None, "1.txt": "a", "1.png.txt": "a\n"}, {"1.png": ["a"]}),
    "text files by the whole name": ({"1.png": None, "1.png.txt": "a cat"}, {"1.png": ["a cat"]}),
    "text files by both names": (
        {"1.png": None, "1.jpg": None, "1.png.txt": "a cat", "1.txt": "a fox"},
        {"1.png": ["a cat"], "1.jpg": ["a fox"]},
    ),
    "text files by both names of one": (
        {"1.png": None, "1.png.txt": "a cat", "1.txt": "a fox"},
        {"1.png": ["a cat"]},
        "Not read in {root}: 1.txt (read: 1.png.txt).",
    ),
    "an empty text file": ({"1.png": None, "1.txt": ""}, "1 of 1 images have no caption: {root}/1.png"),
    "OneTrainer's masks": (
        {"1.png": None, "1.txt": "a", "1-masklabel.png": None, "1-condlabel.png": None, "1_sd.npz": "x"},
        {"1.png": ["a"]},
        "Not among the images of {root}, 2 masks or condition images of others: 1-condlabel.png, 1-masklabel.png",
    ),
    "OneTrainer's masks of unread pictures": (
        {"1.png": None, "1.txt": "a", "2.svg": "x", "2-masklabel.png": None},
        {"1.png": ["a"]},
        "Not read in {root}: 1 pictures",
        "1 masks or condition images of others: 2-masklabel.png",
    ),
    "masks of nothing": (
        {"1-masklabel.png": None, "1-masklabel.txt": "a", "2-condlabel.png": None, "2-condlabel.txt": "b"},
        {"1-masklabel.png": ["a"], "2-condlabel.png": ["b"]},
    ),
    "masks in a folder": (
        {"1.jpg": None, "1.txt": "a", "mask/1.png": None},
        {"1.jpg": ["a"]},
        "1 masks or condition images of others: mask/1.png",
    ),
    "a class of masks": (
        {"mask/1.png": None, "hat/1.png": None},
        {"mask/1.png": ["a sketch of a mask"], "hat/1.png": ["a sketch of a hat"]},
    ),
    "masks in metadata": (
        {"1.png": None, "1-masklabel.png": None, "metadata.csv": "file_name,text\n1.png,a\n1-masklabel.png,b"},
        "line 3 lists 1-masklabel.png, which is not read as an image",
        "1 masks or condition images of others",
    ),
    "Sketchy's folders": (
        {"tx_000000000000/boat/1.png": None, "tx_000100000000/boat/1.png": None},
        "not class names: tx_000000000000, tx_000100000000: pass {root}/tx_000000000000; a caption would be"
        " 'a sketch of a tx 000000000000'",
    ),
    "a class in Sketchy's folder": (
        {"tx_000000000000/boat/1.png": None},
        "not class names: tx_000000000000: pass {root}/tx_000000000000; a caption would be",
    ),
    "dates": ({"scan 20240131/1.png": None}, "not class names: scan 20240131; a caption would be"),
    "ImageNet's ids": ({"n01440764/1.png": None}, {"n01440764/1.png": ["a sketch of a tench"]}),
    "ids that are not ImageNet's": ({"n99999999/1.png": None}, "a caption would be 'a sketch of a n99999999'"),
    "models of planes": ({"a380/1.png": None}, {"a380/1.png": ["a sketch of a a380"]}),
    "names of two lines": ({"1\n\x1b[31m.png": None}, "1 of 1 images have no caption: {root}/1\\n\\x1b[31m.png."),
    "several lines of metadata": (
        {"1.png": None, "metadata.csv": "file_name,text\nx.png,a\n1.png,b\n../y.png,c\n"},
        "line 2 lists x.png, but there is no such image.\n{root}/metadata.csv line 4 lists ../y.png",
    ),
    "NFD side-cars": ({f"{NFC}.png": None, f"{NFD}.txt": "a"}, {f"{NFC}.png": ["a"]}),
    "metadata of another name": (
        {"train/1.png": None, "data.jsonl": LINE},
        "not class names: train",
        "Not read in {root}: data.jsonl. Captions are read from metadata.csv or metadata.jsonl, with the columns",
    ),
    "metadata.json": ({**TWO, "metadata.json": f"[{LINE}]"}, A_OR_B, "Not read in {root}: metadata.json."),
    "tags, one a line": ({"1.png": None, "1.txt": "ink,\nwhite paper,\ncat,\n"}, {"1.png": ["ink, white paper, cat"]}),
    "several lines": ({"1.png": None, "1.txt": "a\nb"}, {"1.png": ["a", "b"]}, "1 text files of {root} have several"),
    "nothing in words": (
        {"1.png": None, "2.png": None, "metadata.csv": "file_name,text\n1.png,NaN\n2.png, None"},
        "2 of 2 images have no caption",
    ),
    "nothing in a side-car": ({"1.png": None, "1.txt": "N/A"}, "1 of 1 images have no caption"),
    "nothing in JSON": ({"1.png": None, "metadata.jsonl": LINE.replace('"a fox"', "NaN")}, "1 of 1 images have no"),
    "semicolons": ({"1.png": None, "metadata.csv": "file_name;text\r\n1.png;a, b\r\n"}, {"1.png": ["a, b"]}),
    "tabs": ({"1.png": None, "metadata.csv": "text\tfile_name\na, b\t1.png\n"}, {"1.png": ["a, b"]}),
    "spaces": ({"1.png": None, "metadata.csv": 'file_name, text\n1.png, "a, b"\n'}, {"1.png": ["a, b"]}),
    "UTF-16": ({"1.png": None, "metadata.csv": "file_name,text\r\n1.png,ä".encode("utf-16")}, {"1.png": ["ä"]}),
    "back-slashes": (
        {"p/1.png": None, "metadata.csv": "file_name,text\n.\\p\\1.png,a\n"},
        {"p/1.png": ["a"]},
    ),
    "NFC in metadata": ({f"{NFD}.png": None, "metadata.csv": f"file_name,text\n{NFC}.png,a"}, {f"{NFD}.png": ["a"]}),
    "NFC and NFD": (
        {f"{NFD}.png": None, f"{NFC}.png": None, "metadata.csv": f"file_name,text\n{NFC}.png,c\n{NFD}.png,d"},
        {f"{NFD}.png": ["d"], f"{NFC}.png": ["c"]},
    ),
    "another case": (
        {"A/1.PNG": None, "metadata.csv": "file_name,text\na/1.png,a"},
        "line 2 lists a/1.png, but there is no such image, there is A/1.PNG",
    ),
    "another place": (
        {"A/1.png": None, "metadata.csv": "file_name,text\nC:\\me\\1.png,a"},
        "no such image, there is A/1.png",
    ),
    "another ending": ({"1.png": None, "metadata.jsonl": LINE.replace("png", "jpg")}, "image, there is 1.png"),
    "unread pictures": (
        {"1.png": None, "1.txt": "a", "2.svg": "<svg/>", "2.txt": "b", "3.HEIC": "x", "4.psd": "x"},
        {"1.png": ["a"]},
        "Not read in {root}: 3 pictures, convert them to PNG: 2.svg, 3.HEIC, 4.psd",
    ),
    "unread pictures alone": ({"1.kra": "x", "2.pdf": "x"}, "no images in {root}. Not read: 2 pictures, convert"),
    "unread pictures in metadata": (
        {"1.png": None, "2.svg": "x", "metadata.csv": "file_name,text\n1.png,a\n2.svg,b"},
        "line 3 lists 2.svg, which is not read as an image: convert it to PNG",
        "1 pictures",
    ),
    "no pictures": ({"1.png": None, "1.txt": "a", "x.h5": "x", "x.mpg": "x", "x.wmf": "x"}, {"1.png": ["a"]}, "x.wmf"),
    "network disks": ({**TWO, "@eaDir/1.png": None, "a/@Recycle/1.png": None, "#snapshot/1.png": None}, A_OR_B),
    "a dangling caption": (
        {"a/1.png": None, "a/1.txt": Path("/nowhere/1.txt")},
        "the caption of a/1.png: {root}/a/1.txt is a link to /nowhere/1.txt, which",
    ),
    "half an emoji": (
        {"1.png": None, "metadata.jsonl": '{"file_name": "1.png", "text": "a fox \\ud83e"}'},
        "metadata.jsonl line 1: 'a fox \\ud83e' is not valid Unicode",
    ),
    "Latin folders": (
        {os.fsdecode(b"caf\xe9/1.png"): None},
        "a folder of {root}: 'caf\\udce9' is not valid Unicode; rename",
    ),
}
# files -> classes and the number of images of each, or what the error says
LABELLED = {
    "splits": ({"train/cat/1.png": None, "test/dog/1.png": None}, "names: test, train: pass {root}/train."),
    "a split of pictures": ({"train/1.png": None}, "found none; not class names: train."),
    "leftovers": ({**TWO, "thumbnails/1.png": None}, "found a, b; not class names: thumbnails: rename or move"),
    "trains": ({"train/1.png": None, "boat/1.png": None}, {"boat": 1, "train": 1}),
    "digits": ({"0/1.png": None, "1/1.png": None}, {"0": 1, "1": 1}),
    "kohya's": ({"10_cat/1.png": None, "5_cat/1.png": None, "5_dog/1.png": None}, {"cat": 2, "dog": 1}),
    "network disks": ({**TWO, "@eaDir/1.png": None}, {"a": 1, "b": 1}),
    "Latin folders": ({os.fsdecode(b"caf\xe9/1.png"): None, "b/1.png": None}, "'caf\\udce9' is not valid Unicode"),
    "ids": ({"w_000001/1.png": None, "w_000002/1.png": None}, {"w_000001": 1, "w_000002": 1}),
    "masks": ({**TWO, "a/1-masklabel.png": None, "b/mask/1.png": None}, {"a": 1, "b": 1}),
    "a name of two lines": ({"a\nb/1.png": None}, "found a\\nb."),
}


def outcome(read, root):
    try:
        return read(root)
    except InputError as error:
        return str(error)


@pytest.mark.parametrize("case", CAPTIONED)
def test_captions_of_a_layout(case, tmp_path, caplog):
    files, expected, *warnings = CAPTIONED[case]
    data = outcome(captioned_folder, build(tmp_path, files))
    if isinstance(expected, str):
        assert expected.format(root=tmp_path) in str(data)
    else:
        assert not isinstance(data, str), data
        captions = {os.path.relpath(name, tmp_path): own for name, own in zip(data.names, data.captions, strict=True)}
        assert captions == expected
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == len(warnings)
    assert all(warning.format(root=tmp_path) in line for warning, line in zip(warnings, said, strict=True))


@pytest.mark.parametrize("case", LABELLED)
def test_classes_of_a_layout(case, tmp_path):
    files, expected = LABELLED[case]
    data = outcome(labelled_folder, build(tmp_path, files))
    if isinstance(expected, str):
        assert expected.format(root=tmp_path) in str(data)
    else:
        assert not isinstance(data, str), data
        assert {name: data.labels.count(number) for number, name in enumerate(data.classes)} == expected


# folders -> repeats
REPEATS = {
    "kohya's": (["10_cat", "5_dog"], {"10_cat": 10, "5_dog": 5}),
    "some of the folders": (["3_cat", "dog"], {"3_cat": 3}),
    "one and two": (["1_cat", "2_dog"], {"1_cat": 1, "2_dog": 2}),
    "a list": (["1_cat", "2_dog", "3_fox"], {"1_cat": 1, "2_dog": 1, "3_fox": 1}),
    "a list from 0": (["0_cat", "2_dog"], {"0_cat": 1, "2_dog": 1}),
    "a list with zeros": (["08_cat", "10_dog"], {"08_cat": 1, "10_dog": 1}),
    "dates": (["20240131_cat"], {}),
    "inside": (["img/4_cat"], {"4_cat": 4}),
}


@pytest.mark.parametrize("case", REPEATS)
def test_repeats_of_folders(case):
    folders, repeats = REPEATS[case]
    assert folder_repeats(f"{folder}/1.png" for folder in folders) == repeats


def test_a_numbered_list_names_classes():
    assert class_folders(["01_cat/1.png", "02_hot_dog/1.png"]) == {"01_cat": "cat", "02_hot_dog": "hot_dog"}


def test_repeats_of_classes_are_said_not_to_count(tmp_path, caplog):
    labelled_folder(build(tmp_path, {"10_cat/1.png": None, "1_dog/1.png": None}))
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: images with classes are shown once an epoch; repeats are ignored: 10_cat"
    ]


def test_the_default_caption_is_told_as_an_origin(tmp_path):
    files = {"1.png": None, "1.txt": "a", "2.png": None}
    data = captioned_folder(build(tmp_path, files), default_caption="b", on_missing_caption="default")
    assert data.origin == "captions from text files: 1; the default caption: 1"


def test_images_carry_the_repeats_of_their_folder(tmp_path):
    files = {"img/3_cat/1.png": None, "img/3_cat/1.txt": "a", "img/extra/1.png": None, "img/extra/1.txt": "b"}
    assert captioned_folder(build(tmp_path, files)).repeats == [3, 1]
