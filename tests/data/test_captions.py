import csv
import io
import json
import logging

import datasets
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from sketch_perceptual.data.captions import captioned_dataset, captioned_folder
from sketch_perceptual.errors import InputError

CLEAR, HALF = (0, 0, 0, 0), (0, 0, 0, 128)


def image_of(mode, *pixels):
    """One row of pixels."""
    image = Image.new(mode, (len(pixels), 1))
    for x, pixel in enumerate(pixels):
        image.putpixel((x, 0), pixel)
    return image


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
    image.paste("black", (0, 0, mark, mark))
    return write(path, saved(image))


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


def test_the_default_is_for_all_images_without_a_caption(tmp_path):
    for name in ("1.png", "2.png"):
        sketch(tmp_path / name)
    assert captions_of(captioned_folder(tmp_path, default_caption="d")) == {"1.png": ["d"], "2.png": ["d"]}
    write(tmp_path / "1.txt", "one")
    write(tmp_path / "2.txt", " \n")
    for more in ({}, {"on_missing_caption": "default"}):
        data = captioned_folder(tmp_path, default_caption="d", **more)
        assert captions_of(data) == {"1.png": ["one"], "2.png": ["d"]}
    assert captions_of(captioned_folder(tmp_path, default_caption="d", on_missing_caption="skip")) == {
        "1.png": ["one"]
    }


# files, options -> where captions come from
ORIGINS = {
    "text files": ({"1.txt": "a", "2.txt": "b"}, {}, "text files (2 images)"),
    "the default": (
        {"1.txt": "a", "2.txt": ""},
        {"default_caption": "ink", "trigger_word": "sks"},
        "text files (1 images), the default 'ink' (1 images)",
    ),
    "skipped": ({"1.txt": "a"}, {"on_missing_caption": "skip"}, "text files (1 images)"),
    "metadata": ({"metadata.csv": "file_name,text\n1.png,a\n2.png,b\n"}, {}, "metadata (2 images)"),
    "classes": (
        {"cat/3.png": None, "1.txt": "a", "2.txt": "b"},
        {"caption_template": "the {class}"},
        "text files (2 images), class folders as 'the {class}' (1 images)",
    ),
}


@pytest.mark.parametrize("case", ORIGINS)
def test_a_data_set_says_where_its_captions_come_from(case, tmp_path):
    files, options, expected = ORIGINS[case]
    for name, content in {"1.png": None, "2.png": None, **files}.items():
        sketch(tmp_path / name) if content is None else write(tmp_path / name, content)
    data = captioned_folder(tmp_path, **options)
    data.repeats = [3] * len(data.sources)
    assert data.caption_origins() == data.repeated()[0].caption_origins() == expected


def test_columns_are_named_as_origins():
    labels = datasets.Features({"image": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])})
    rows = datasets.Dataset.from_dict({"image": [saved(image_of("L", 0))] * 3, "kind": [0, 1, -1]}, features=labels)
    rows = rows.cast_column("image", datasets.Image())
    data = captioned_dataset(rows, name="toy", caption_column="kind", default_caption="d")
    assert (
        data.caption_origins() == "the column 'kind' as 'a sketch of a {class}' (2 images), the default 'd' (1 images)"
    )


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
    with pytest.raises(InputError, match=r"root.cat.again links to a folder"):
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


def line(file_name="1.png", **others):
    return json.dumps({"file_name": file_name, **others})


# files beside 1.png -> options, sentence
FOLDERS = {
    "no caption": ({}, {}, r"1 of 1 images have no caption: .*1\.png.*no metadata.*`caption_column`.*`on_missing"),
    "all skipped": ({}, {"on_missing_caption": "skip"}, "1 of 1 images have no caption"),
    "unknown choice": (
        {},
        {"on_missing_caption": "ignore"},
        "`on_missing_caption` must be one of error, skip, default",
    ),
    "no default": ({}, {"on_missing_caption": "default"}, "`on_missing_caption` default needs a `default_caption`"),
    "template": ({}, {"caption_template": "a sketch"}, r"`caption_template` must contain \{class\}, got 'a sketch'"),
    "empty side-car": ({"1.txt": "\n"}, {}, "1 of 1 images have no caption"),
    "side-car not UTF-8": ({"1.txt": b"caf\xe9"}, {}, r"1\.txt is not UTF-8"),
    "no caption column": (
        {"metadata.csv": "file_name,caption\n1.png,x"},
        {},
        r"metadata\.csv has no column 'text', `caption_column` can be one of: caption, file_name",
    ),
    "null": ({"metadata.jsonl": line(text=None)}, {}, "1 of 1 images have no caption"),
    "empty list": ({"metadata.jsonl": line(text=[None, " "])}, {}, "1 of 1 images have no caption"),
    "number": ({"metadata.jsonl": line(text=5)}, {}, r"metadata\.jsonl line 1: a caption .* got 5"),
    "no file_name": (
        {"metadata.csv": "image,text\n1.png,x"},
        {},
        r"line 2 has no file_name, the path of an image; its columns are image",
    ),
    "missing file": (
        {"metadata.jsonl": line(text="x") + "\n" + line("2.png", text="y")},
        {},
        r"metadata\.jsonl line 2 lists 2\.png, but there is no such image",
    ),
    "out of the folder": (
        {"metadata.csv": "file_name,text\n../1.png,x"},
        {},
        r"line 2 lists \.\./1\.png",
    ),
    "absolute": ({"metadata.csv": "file_name,text\n/1.png,x"}, {}, r"line 2 lists /1\.png"),
    "not JSON": ({"metadata.jsonl": line(text="x") + "\n{text: 1}"}, {}, r"metadata\.jsonl line 2 is not JSON"),
    "no object": ({"metadata.jsonl": "[1]"}, {}, r"metadata\.jsonl line 1 is not a JSON object"),
    "unquoted comma": ({"metadata.csv": "file_name,text\n1.png,a, b"}, {}, r"metadata\.csv line 2 has more cells"),
    "unclosed quote": ({"metadata.csv": 'file_name,text\n1.png,"a'}, {}, r"metadata\.csv line 2 is not CSV"),
    "metadata not UTF-8": ({"metadata.csv": b"file_name,text\n1.png,caf\xe9"}, {}, r"metadata\.csv is not UTF-8"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_bad_folder_is_answered_with_a_sentence(case, tmp_path):
    files, options, sentence = FOLDERS[case]
    for name, content in {"1.png": saved(Image.new("RGB", (8, 8))), **files}.items():
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError, match=sentence):
        captioned_folder(tmp_path, **options)


def test_folders_without_images_are_named(tmp_path):
    with pytest.raises(InputError, match="^there are no images in .*" + tmp_path.name):
        captioned_folder(tmp_path)
    with pytest.raises(InputError, match=r"cannot read the folder .*nowhere: No such file"):
        captioned_folder(tmp_path / "nowhere")


LABEL = datasets.ClassLabel(names=["cat"])


DATA_SETS = {
    "no image column": (
        {"picture": ["x"], "text": ["y"]},
        "toy has no column 'image', `image_column` can be one of: picture, text",
    ),
    "no images in it": (
        {"image": [1], "text": ["y"]},
        "'image' of toy holds no images: choose another `image_column`",
    ),
    "no caption column": (
        {"image": ["x"], "a": ["y"]},
        "toy has no column 'text', `caption_column` can be one of: image, a",
    ),
    "two labels": ({"image": ["x"], "a": [0], "b": [0]}, "toy has no column 'text', `caption_column` can be"),
    "numbers": ({"image": ["x"], "text": [3]}, "row 0 of toy: a caption .* got 3"),
    "null": ({"image": ["x", "y"], "text": ["c", None]}, "1 of 2 images have no caption: row 1 of toy.*image, text"),
    "images alone": ({"image": ["x"]}, "1 of 1 images have no caption: row 0 of toy"),
}


@pytest.mark.parametrize("case", DATA_SETS)
def test_a_bad_data_set_is_answered_with_a_sentence(case):
    columns, sentence = DATA_SETS[case]
    rows = datasets.Dataset.from_dict(columns)
    if columns.get("image", [0])[0] == "x":
        rows = rows.cast_column("image", datasets.Image())
    for column in {"a", "b"} & set(columns) if case == "two labels" else ():
        rows = rows.cast_column(column, LABEL)
    with pytest.raises(InputError, match=sentence):
        captioned_dataset(rows, name="toy")


def test_a_null_image_is_a_named_row():
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"image": [None], "text": ["c"]}, features)
    with pytest.raises(InputError, match=r"row 0 of toy: expected a path.* got None"):
        captioned_dataset(rows, name="toy")[0, 0]
