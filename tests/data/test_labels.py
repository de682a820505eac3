import io
import logging
import re

import datasets
import numpy as np
import pytest
from PIL import Image

from sketch_perceptual.data.class_names import class_names
from sketch_perceptual.data.labels import labelled_dataset, labelled_folder
from sketch_perceptual.errors import InputError

CRANES = ["n02012849", "n03126707"]


def saved(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


SKETCH = saved(Image.new("L", (8, 8), 99), "JPEG")


def tree(root, *files):
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(SKETCH)
    return root


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_class_folders_as_in_the_zip_of_imagenet_sketch(tmp_path, caplog):
    files = ["n03126707/sketch_1.JPEG", "n01440764/sketch_9.JPEG", "n02012849/a/b.jpg", "n01440764/sketch_10.JPEG"]
    data = labelled_folder(tree(tmp_path, *files))
    assert data.classes == ["n01440764", *CRANES]
    assert class_names(data.classes) == ["tench", "crane (n02012849)", "crane (n03126707)"]
    assert (data.labels, data.groups) == ([0, 0, 1, 2], None)
    assert data.names == [str(tmp_path / files[index]) for index in (3, 1, 2, 0)]
    item = data[0, 3]
    assert (item["label"], item["name"], item["pixel_values"].shape) == (2, data.names[3], (3, 224, 224))
    assert not warnings(caplog)


def test_leftovers_make_no_class_and_are_named(tmp_path, caplog):
    tree(tmp_path, "cat/1.png", "dog/1.png", "dog/._1.png", ".ipynb_checkpoints/1.png", "__MACOSX/cat/1.png", "x.png")
    (tmp_path / "empty bird").mkdir()
    (tree(tmp_path, "fish/1.png") / "fish/1.png").rename(tmp_path / "fish/notes.txt")
    data = labelled_folder(tmp_path)
    assert (data.classes, data.labels) == (["cat", "dog"], [0, 1])
    empty, fish, stray = warnings(caplog)
    assert "empty bird holds no images" in empty and "fish holds no images" in fish
    assert stray.startswith("1 images lie beside the class folders") and stray.endswith(": x.png")


# files -> the sentence for the folder that holds them
FOLDERS = {
    "splits": (["train/a/1.png", "val/a/1.png"], "not class names: train, val: pass {root}/train[.]"),
    "test first": (["test/cat/1.png", "train/cat/1.png"], "not class names: test, train: pass {root}/train[.]"),
    "one split": (["Train/cat/1.png", "Train/dog/1.png"], "not class names: Train: pass {root}/Train[.]"),
    "nested": (["zip/cat/1.png", "zip/dog/1.png"], "found none; not class names: zip: pass {root}/zip[.]"),
    "flat": (["images/1.png", "images/2.png"], "{root} must hold .*, found none; not class names: images[.]$"),
    "a folder of leftovers": (["cat/1.png", "dog/1.png", "images/1.png"], "found cat, dog; not .* images: rename"),
    "kohya's repeats": (["10_cat/1.png", "5_cat/1.png"], "{root} must hold .*, found cat[.]$"),
    "one class": (["cat/1.png", "cat/2.png"], "{root} must hold .*, found cat[.]$"),
    "one nested class": (["animal/cat/1.png", "x.png"], "{root} must hold .*, found animal[.]$"),
    "no folders": (["1.png", "2.png"], "{root} must hold .*, found none[.]$"),
    "hidden class": (["cat/1.png", ".dog/1.png"], "found cat[.]$"),
    "no images": ([], "there are no images in {root}[.]"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_without_two_classes_is_answered_with_what_to_pass(case, tmp_path):
    files, sentence = FOLDERS[case]
    with pytest.raises(InputError, match=sentence.format(root=re.escape(str(tmp_path)))):
        labelled_folder(tree(tmp_path, *files))


@pytest.mark.parametrize("name, reason", [("nowhere", "No such file"), ("1.png", "Not a directory")])
def test_a_root_that_is_no_folder_is_named(name, reason, tmp_path):
    with pytest.raises(InputError, match=rf"^cannot read the folder .*{name}: {reason}"):
        labelled_folder(tree(tmp_path, "1.png") / name)


def rows_of(classes=None, **columns):
    """`classes` are the names of the column "label"."""
    count = len(next(iter(columns.values())))
    rows = datasets.Dataset.from_dict({"image": [{"bytes": SKETCH, "path": None}] * count, **columns})
    features = rows.features | {"image": datasets.Image()}
    features |= {"label": datasets.ClassLabel(names=classes)} if classes else {}
    return rows.cast(datasets.Features(features))


# classes of a ClassLabel or None, values -> classes, rows that have one, their labels
LABELS = {
    "ClassLabel": (["zebra", "ant", "cow"], [1, 0, 1], ["zebra", "ant", "cow"], [0, 1, 2], [1, 0, 1]),
    "words": (None, ["zebra", "ant", "zebra"], ["ant", "zebra"], [0, 1, 2], [1, 0, 1]),
    "ClassLabel with gaps": (["a", "b"], [None, 1, -1, 0], ["a", "b"], [1, 3], [1, 0]),
    "numbers with gaps": (None, [10, None, -1, 9], ["9", "10"], [0, 3], [1, 0]),
    "words with gaps": (None, ["b", None, "", "a"], ["a", "b"], [0, 3], [1, 0]),
}


@pytest.mark.parametrize("case", LABELS)
@pytest.mark.parametrize("form", [None, "numpy", "torch"])
def test_data_sets_have_the_classes_of_a_column(case, form, caplog):
    names, values, classes, rows, labels = LABELS[case]
    data = labelled_dataset(rows_of(names, label=values).with_format(form), name="toy", resolution=8)
    assert (data.classes, data.labels) == (classes, labels)
    items = [data[0, index] for index in range(len(data))]
    assert [item["name"] for item in items] == [f"row {row} of toy" for row in rows]
    assert [item["label"] for item in items] == labels
    gaps = len(values) - len(rows)
    assert warnings(caplog) == [f"{gaps} of {len(values)} rows of toy have no class and are not used."] * bool(gaps)


def test_a_class_label_of_another_name_is_taken_if_alone(caplog):
    rows = rows_of(["a", "b"], label=[0, 1], text=["x", "y"]).rename_column("label", "kind")
    assert labelled_dataset(rows, name="toy").classes == ["a", "b"]
    assert warnings(caplog) == ["toy has no column 'label': the class is taken from 'kind'."]
    assert labelled_dataset(rows, name="toy", label_column="text").classes == ["x", "y"]
    rows = rows.cast_column("text", datasets.ClassLabel(names=["x", "y"]))
    with pytest.raises(InputError, match="toy has no column 'label', `label_column` can be one of: image, kind, text"):
        labelled_dataset(rows, name="toy")


# "" is what `split` refuses as missing; number 0 is a hand like any other
@pytest.mark.parametrize("hands, groups", [(["x", "z", None], ["x", ""]), ([0, 7, 10], ["0", "10"])])
def test_groups_are_names_and_follow_the_rows(hands, groups):
    rows = rows_of(label=["a", None, "b"], hand=hands)
    data = labelled_dataset(rows, name="toy", group_column="hand")
    assert (data.groups, data.select([1]).groups) == (groups, groups[1:])
    assert labelled_dataset(rows, name="toy").groups is None


AB, TWO = {"label": ["a", "b"]}, "toy must have two or more classes in the column 'label'"


DATA_SETS = {
    "no image": (AB, {"image_column": "x"}, "no column 'x', `image_column` can be one of: image, label[.]"),
    "no images in it": (
        {**AB, "n": [1, 2]},
        {"image_column": "n"},
        "'n' of toy holds no images: choose another `image_column`",
    ),
    "no label": ({"kind": ["a", "b"]}, {}, "no column 'label', `label_column` can be one of: image, kind[.]"),
    "no group": (AB, {"group_column": "x"}, "no column 'x', `group_column` can be one of: image, label[.]"),
    "numbers": (
        {"label": [3.5, 4]},
        {},
        r"'label' of toy holds Value\('float64'\), not classes: choose another `label_column`",
    ),
    "lists": ({"label": [["a"], ["b"]]}, {}, "'label' of toy holds .*, not classes: choose another `label_column`"),
    "one class": ({"label": ["a", "a", None]}, {}, TWO),
    "no class": ({"label": [None, None]}, {}, TWO),
}


@pytest.mark.parametrize("case", DATA_SETS)
def test_a_data_set_without_classes_is_answered_with_the_option(case):
    columns, options, sentence = DATA_SETS[case]
    with pytest.raises(InputError, match=sentence):
        labelled_dataset(rows_of(**columns), name="toy", **options)


def places(width, height):
    """Column x is red x, row y is green y: a pixel tells where it came from."""
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([columns, rows, 0 * rows], -1).astype(np.uint8))


def test_a_truncated_file_is_named_when_it_is_read(tmp_path):
    path = tree(tmp_path, "a/1.JPEG", "b/2.png") / "b/2.png"
    path.write_bytes(saved(places(60, 40))[:-40])
    data = labelled_folder(tmp_path)
    assert data[0, 0]["name"].endswith("1.JPEG")
    with pytest.raises(InputError, match=r"Cannot read the image .*b.2\.png: .*truncated"):
        data[0, 1]
