import json
import logging
import re
import unicodedata
from pathlib import Path

import pytest

from sketch_perceptual.data.paired import find_pairs
from sketch_perceptual.errors import InputError


def tree(root, *files):
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return root


def both(*photos):
    """The photos, and sketches of the same names beside them."""
    return [file.replace("photo", side) for file in photos for side in ("photo", "sketch")]


def found(root, *asked):
    """Each photo and its sketch, as paths below `root`; they exist and are in the order of their names."""
    pairs = find_pairs(root, *asked)
    assert len(pairs.photos) == len(pairs.sketches) == len(pairs.names) and pairs.names == sorted(set(pairs.names))
    assert all(path.is_file() for path in pairs.photos + pairs.sketches)
    assert all(path.as_posix().endswith("/" + name) for path, name in zip(pairs.photos, pairs.names, strict=True))
    sides = ([path.relative_to(root).as_posix() for path in side] for side in (pairs.photos, pairs.sketches))
    return dict(zip(*sides, strict=True))


# part -> a photo, its sketch, its style, which is not the number of the folder
ANNOTATED = {
    "train": [
        ("photo/photo1/image0110.jpg", "sketch/sketch1/sketch0110.PNG", 3),
        ("photo/photo2/image0001.png", "sketch/sketch2/sketch0001.jpeg", 1),
        ("photo/photo3/image0007.JPG", "sketch/sketch3/sketch0007.jpg", 1),
    ],
    "test": [
        ("photo/photo1/image0002.jpg", "sketch/sketch1/sketch0002.jpg", 1),
        ("photo/photo2/image0009.jpg", "sketch/sketch2/sketch0009.jpg", 3),
    ],
}


def fs2k(root):
    tree(root, "README.pdf", "photo/photo1/image9999.jpg", "sketch/sketch2/._sketch0001.jpg")
    for part, rows in ANNOTATED.items():
        entries = []
        for photo, sketch, style in rows:
            tree(root, photo, sketch)
            entries.append({"image_name": photo[6:].split(".")[0], "style": style - 1, "hair_color": []})
        (root / f"anno_{part}.json").write_text(json.dumps(entries), encoding="utf-8")
    return root


# what is asked -> the summary
FS2K = {
    (): "FS2K: 5 pairs",
    ("train",): "FS2K, train: 3 pairs",
    ("train", 1): "FS2K, train, style 1: 2 pairs",
    ("test", 3): "FS2K, test, style 3: 1 pairs",
    (None, 3): "FS2K, style 3: 2 pairs",
}


@pytest.mark.parametrize("asked", FS2K)
@pytest.mark.parametrize("above", ["", "FS2K"])
def test_the_annotation_of_fs2k_tells_part_and_style(asked, above, tmp_path):
    """As it comes out of the zip, below a folder that has the words in its name, with endings of either kind."""
    root = fs2k(tmp_path / "photo image" / above)
    tree(tmp_path / "photo image", "__MACOSX/._FS2K", ".DS_Store")
    part, style = (*asked, None, None)[:2]
    rows = [row for key in ANNOTATED if part in (None, key) for row in ANNOTATED[key] if style in (None, row[2])]
    pairs = find_pairs(tmp_path / "photo image", *asked)
    assert {*zip(pairs.names, pairs.photos, pairs.sketches, strict=True)} == {
        (photo, root / photo, root / sketch) for photo, sketch, _ in rows
    }
    assert pairs.names == sorted(pairs.names)
    assert (pairs.layout, pairs.summary) == ("FS2K", FS2K[asked])


def test_damage_to_the_other_part_does_not_matter(tmp_path):
    (fs2k(tmp_path) / "anno_test.json").unlink()
    assert len(found(tmp_path, "train")) == 3
    tree(tmp_path / "x", "train/photos/1.jpg", "train/sketches/1.jpg", "test/photos/1.jpg")
    assert len(found(tmp_path / "x", "train")) == 1


STUDENTS = [
    *("photos/f-005-01.jpg", "sketches/F2-005-01-sz1.jpg"),
    *("photos/f1-001-01.jpg", "sketches/f1-001-01_sz1.png"),
    *("photos/m-008-01.jpg", "sketches/M2-008-01-sz1.jpg"),
]
WILD = both("AR/train_photos/1.jpg", "CUHK_student/train_photos/1.jpg", "XM2VTS/train_photos/1.jpg")
# files, what is asked -> layout, photos and their sketches; None is all of them
FOLDERS = {
    "the wild's": ([*WILD, *both("CUFS/test_photos/1.jpg")], (), "CUFS", None),
    "the wild's test": ([*WILD, *both("CUFS/test_photos/1.jpg")], ("test",), "CUFS", both("CUFS/test_photos/1.jpg")),
    "collections": (both("ar/photo/1.jpg", "CUHK/photo/1.jpg", "Xm2vts/photo/1.jpg"), (), "CUFS", None),
    "their parts": (
        both("CUHK_student/train/photos/1.jpg", "CUHK student/Testing/photos/1.jpg"),
        ("test",),
        "CUFS",
        both("CUHK student/Testing/photos/1.jpg"),
    ),
    "one collection": (both("student/photos/a.jpg"), (), "CUFS", None),
    "students": (STUDENTS, (), "folders", None),
    "a folder above": ([f"zip/{file}" for file in STUDENTS], (), "folders", None),
    "students' parts": (
        ["training_photos/f-1.jpg", "training_sketches/F2-1-sz1.jpg", *both("testing_photos/m-2.jpg")],
        ("train",),
        "folders",
        ["training_photos/f-1.jpg", "training_sketches/F2-1-sz1.jpg"],
    ),
    "two endings": (["photo/a.b.jpg", "sketch/A.B.PNG"], (), "folders", None),
    "plural on one side": (["photos/1.jpg", "sketch/1.jpg"], (), "folders", None),
    "the same stem in two places": (both("photos/a/1.jpg", "photos/b/1.jpg"), (), "folders", None),
    "parts": (both("train/photo/1.jpg", "test/photo/1.jpg"), ("train",), "folders", both("train/photo/1.jpg")),
    "all parts": (both("train/photo/1.jpg", "test/photo/1.jpg"), (), "folders", None),
    "numbers that are no f2-": (both("photos/f2.jpg", "photos/f20.jpg", "photos/f0.jpg"), (), "folders", None),
    "other letters": (["photos/Zoë ä/李 1.jpg", "sketches/Zoë ä/李 1.png"], (), "folders", None),
    "no parts, for a training": (both("photos/1.jpg", "photos/2.jpg"), ("train",), "folders", None),
    "no parts, for a training on students": (both("CUHK_student/photos/1.jpg"), ("train",), "CUFS", None),
    "hidden": (
        [*both("photos/1.jpg"), "photos/._1.jpg", "__MACOSX/photos/2.jpg", "photos/Thumbs.db"],
        (),
        "folders",
        None,
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_twins_have_the_same_place_and_stem(case, tmp_path):
    files, asked, layout, expected = FOLDERS[case]
    root = tree(tmp_path / "photos of sketches", *files)
    files = [file for file in expected or files if "._" not in file and "MACOSX" not in file and ".db" not in file]
    assert found(root, *asked) == dict(zip(files[::2], files[1::2], strict=True))
    pairs = find_pairs(root, *asked)
    assert (pairs.layout, pairs.summary) == (layout, f"{', '.join([layout, *asked])}: {len(files) // 2} pairs")


def test_folders_are_read_as_the_page_shows_them(tmp_path):
    page = Path(__file__).parents[2] / "docs/photos-to-sketches.md"
    (photos, sketches) = (line.split() for line in page.read_text().splitlines() if line.startswith("    pairs/"))
    flat, train, test = zip(photos, sketches, strict=True)
    assert found(tree(tmp_path / "flat", *flat), "train") == dict([flat])
    parts = tree(tmp_path / "parts", *train, *test)
    assert (found(parts, "train"), found(parts, "test")) == (dict([train]), dict([test]))


def test_images_outside_the_folders_are_named(tmp_path, caplog):
    tree(tmp_path, *both("AR/photos/1.jpg"), "CUFSF/photos/1.jpg", "AR/cropped/2.jpg")
    assert len(found(tmp_path)) == 1
    assert "Not used, outside the photo and sketch folders" in caplog.text
    assert "2 images: AR/cropped/2.jpg, CUFSF/photos/1.jpg" in caplog.text


def listed(root, text, encoding="utf-8"):
    tree(root, "a/1.jpg", "b/1 ä.png", "2.jpg", "3.jpg")
    (root / "pairs.csv").write_bytes(text.encode(encoding))
    return root


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("above", ["", "unpacked"])
def test_a_list_pairs_anything(encoding, end, above, tmp_path, caplog):
    text = end.join(["photo,sketch,part,by", "./2.jpg,3.jpg,test,x", '"a/1.jpg",b/1 ä.png,train,y', ""])
    root = listed(tmp_path / above, text, encoding)
    all_pairs = {"2.jpg": "3.jpg", "a/1.jpg": "b/1 ä.png"}
    assert found(root) == all_pairs and found(root, "test") == {"2.jpg": "3.jpg"}
    pairs = find_pairs(tmp_path, "train")
    assert (pairs.photos, pairs.sketches) == ([root / "a/1.jpg"], [root / "b/1 ä.png"])
    assert (pairs.names, pairs.layout, pairs.summary) == (["a/1.jpg"], "CSV", "CSV, train: 1 pairs")
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]


def test_data_without_parts_is_all_for_training_and_that_is_said(tmp_path, caplog):
    assert found(listed(tmp_path, "photo,sketch\n2.jpg,3.jpg\n"), "train") == {"2.jpg": "3.jpg"}
    assert f"{tmp_path}/pairs.csv is not divided into train and test: all of its pairs" in caplog.text


def test_a_list_goes_before_the_folders(tmp_path):
    tree(tmp_path, *both("photos/1.jpg"), "pairs.csv").joinpath("pairs.csv").write_text("photo,sketch\n2.jpg,3.jpg\n")
    assert found(tree(tmp_path, "2.jpg", "3.jpg")) == {"2.jpg": "3.jpg"}


def test_a_list_may_spell_names_as_another_system_does(tmp_path):
    composed, apart = (unicodedata.normalize(form, "p/é.jpg") for form in ("NFC", "NFD"))
    tree(tmp_path, apart, "s/1.jpg")
    (tmp_path / "pairs.csv").write_text(f"photo;sketch\n{composed};s\\1.jpg\n", encoding="utf-8")
    assert found(tmp_path) == {apart: "s/1.jpg"}
    (tmp_path / "pairs.csv").write_text(f"photo,sketch\n{composed},S/1.JPG\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"lists 'S/1\.JPG', but there is no such file in .*, there is s/1\.jpg"):
        find_pairs(tmp_path)


def rewritten(text, part="train", encoding="utf-8"):
    return lambda root: (fs2k(root) / f"anno_{part}.json").write_bytes(text.encode(encoding))


def without(file):
    return lambda root: (fs2k(root) / file).unlink()


def lists(text, encoding="utf-8"):
    return lambda root: listed(root, text, encoding)


def files(*names):
    return lambda root: tree(root, *names)


ENTRY = "must have an image_name .* and a style of 0, 1 or 2, got"
TELL = "Add a pairs.csv with a column part, or train/ and test/ folders"
HEAD = "photo,sketch\n"
# damage, what is asked -> the sentence
BAD = {
    "no folder": (lambda root: None, (), "cannot read the folder {root}: No such file .*[.] Expected one of"),
    "empty": (lambda root: root.mkdir(), (), "no images in {root}[.] Expected one of: FS2K .* photo,sketch[.]"),
    "a file": (lambda root: root.touch(), (), "cannot read the folder {root}: Not a directory[.] Expected"),
    "classes": (
        files("cat/1.jpg", "dog/1.jpg"),
        (),
        "{root} has no known layout, found 2 folders with images: cat, dog[.] Expected one of: FS2K",
    ),
    "one side": (files("photos/1.jpg", "photos/2.jpg"), (), "no known layout, found 1 folders .*: photos[.]"),
    "two roots": (files(*both("a/photo/1.jpg", "b/photo/1.jpg")), (), "found 4 folders with images: a/photo, "),
    "no annotation": (without("anno_test.json"), (), "cannot read {root}/anno_test[.]json: No such file"),
    "no JSON": (rewritten("[1,\n2"), (), "{root}/anno_train[.]json is not JSON: .*line 2"),
    "no UTF-8": (rewritten('["ä"]', "test", "latin-1"), (), "{root}/anno_test[.]json is not UTF-8 text"),
    "no list": (rewritten('{"image_name": "x"}'), (), "{root}/anno_train[.]json must hold a list"),
    "no object": (rewritten("[7]"), (), f"anno_train[.]json entry 1 {ENTRY} 7[.]"),
    "no style": (rewritten('[{"image_name": "photo1/image0110"}]'), (), f"entry 1 {ENTRY} .*photo1/image0110"),
    "no name": (rewritten('[{"style": 0}]'), (), f"entry 1 {ENTRY} .*style.: 0"),
    "style 3": (rewritten('[{"image_name": "photo1/image0110", "style": 3}]'), (), f"entry 1 {ENTRY} .*3"),
    "style not asked": (rewritten("[]"), ("train", 2), "no such pairs in {root}: FS2K, train, style 2[.]"),
    "no photo": (
        without("photo/photo3/image0007.JPG"),
        (),
        "1 listed images: photo/photo3/image0007 are not in {root}: unpack the whole zip[.]",
    ),
    "no sketch": (without("sketch/sketch1/sketch0110.PNG"), (), "1 listed images: sketch/sketch1/sketch0110 are"),
    "outside": (rewritten('[{"image_name": "../x", "style": 0}]'), (), "2 listed images: photo/../x, sketch/../x"),
    "no sketches": (lambda root: (fs2k(root) / "sketch").rename(root / "s"), (), "folder {root}/sketch: No such file"),
    "two endings": (
        lambda root: tree(fs2k(root), "photo/photo1/image0110.png"),
        (),
        "photo/photo1/image0110[.]jpg and photo/photo1/image0110[.]png have the same name",
    ),
    "two students": (
        files("photos/f-1.jpg", "sketches/F2-1-sz1.jpg", "sketches/f-1_sz2.jpg"),
        (),
        "sketches/F2-1-sz1[.]jpg and sketches/f-1_sz2[.]jpg have the same name",
    ),
    "missing twins": (
        files(*both("photos/0.jpg"), *(f"photos/{n}.jpg" for n in range(10, 22)), "sketches/x.jpg"),
        (),
        "{root} has 12 photos without a sketch: photos/10[.]jpg, .*photos/19[.]jpg, and 2 more; 1 sketches without a"
        " photo: sketches/x[.]jpg[.] .*pairs.csv",
    ),
    "other place": (
        files("photos/a/1.jpg", "sketches/b/1.jpg"),
        (),
        "1 photos without .*photos/a/1[.]jpg; 1 sketches",
    ),
    "style of folders": (files(*both("photos/1.jpg")), (None, 1), r"{root} is not FS2K \(folders\) and has no styles"),
    "no parts": (
        files(*both("photos/1.jpg")),
        ("test",),
        f"photos/1.jpg in {{root}} is neither in train nor in test[.] {TELL}",
    ),
    "some parts": (files(*both("AR/photos/1.jpg", "CUHK/train/photos/1.jpg")), ("train",), "AR/photos/1.jpg in .*"),
    "not that part": (files(*both("train/photo/1.jpg")), ("test",), "no such pairs in {root}: folders, test[.]"),
    "no columns": (lists("photo|sketch\n1|2"), (), r"must have the columns photo,sketch, found photo\|sketch[.]"),
    "empty list": (lists(""), (), "pairs.csv must have the columns photo,sketch, found none[.]"),
    "only a header": (lists(HEAD), (), "no such pairs in {root}: CSV[.]"),
    "Latin": (lists(HEAD + "ä,b", "latin-1"), (), "{root}/pairs.csv is not UTF-8 text"),
    "no CSV": (lists(HEAD + '2.jpg,"3.jpg'), (), "{root}/pairs.csv line 2 is not CSV: "),
    "few cells": (lists(HEAD + "2.jpg\n"), (), "pairs.csv line 2 must have 2 cells"),
    "many cells": (lists(HEAD + "2.jpg,3.jpg,\n"), (), "pairs.csv line 2 must have 2 cells"),
    "empty cell": (lists(HEAD + "2.jpg,\n"), (), "pairs.csv line 2 lists '', but there is no such file in {root}[.]"),
    "missing file": (lists(HEAD + "2.jpg,3.jpg\n\na/1.jpg,x.jpg\n"), (), "line 4 lists 'x.jpg', but there is no such"),
    "leaves": (lists(HEAD + "a/../../2.jpg,3.jpg\n"), (), "line 2 must have paths below {root}, got 'a/../../2.jpg'"),
    "absolute": (lists(HEAD + "2.jpg,/3.jpg\n"), (), "line 2 must have paths below {root}, got '/3.jpg'"),
    "twice": (lists(HEAD + "2.jpg,3.jpg\n./2.jpg,3.jpg\n"), (), "line 3 lists 2.jpg again"),
    "in both parts": (lists("photo,sketch,part\n2.jpg,3.jpg,train\n2.jpg,3.jpg,test"), ("test",), "line 3 lists 2"),
    "list without part": (lists(HEAD + "2.jpg,3.jpg\n"), ("test",), f"csv does not say which .* test[.] {TELL}"),
    "wrong part": (lists("photo,sketch,part\n2.jpg,3.jpg,Test"), (), "line 2: the part must be train or test, got 'T"),
    "list with style": (lists(HEAD + "2.jpg,3.jpg\n"), (None, 2), r"{root} is not FS2K \(CSV\) and has no styles"),
}


@pytest.mark.parametrize("case", BAD)
def test_damage_is_answered_with_what_to_do(case, tmp_path):
    damage, asked, sentence = BAD[case]
    root = tmp_path / "the root"
    damage(root)
    with pytest.raises(InputError, match=sentence.replace("{root}", re.escape(str(root)))):
        find_pairs(root, *asked)
