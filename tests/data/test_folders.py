"""Pipes and links among the data: nothing hangs, and no text is read from outside of the folder."""

import logging
import os

import pytest
from PIL import Image

from sketch_perceptual.data.captions import captioned_folder
from sketch_perceptual.data.folders import find_images, read_text
from sketch_perceptual.data.images import load_image
from sketch_perceptual.data.labels import labelled_folder
from sketch_perceptual.data.paired import find_pairs
from sketch_perceptual.errors import InputError
from sketch_perceptual.training.lock import lock_folder, unlock_folder


def sketch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "white").save(path)
    return path


@pytest.fixture
def elsewhere(tmp_path):
    """A folder with an image and a secret, beside the data."""
    folder = tmp_path / "elsewhere"
    sketch(folder / "1.png")
    (folder / "secret.txt").write_text("the secret")
    return folder


@pytest.fixture
def root(tmp_path):
    sketch(tmp_path / "data" / "a" / "good.png")
    return tmp_path / "data"


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_pipes_are_skipped_and_named(root, caplog):
    for name in ("a/pipe.png", "a/good.txt", "metadata.csv"):
        os.mkfifo(root / name)
    data = captioned_folder(root)
    assert (data.names, data.captions) == ([str(root / "a/good.png")], [["a sketch of a a"]])
    assert warnings(caplog) == [f"Skipped in {root}, neither files nor folders: a/good.txt, a/pipe.png, metadata.csv"]
    with pytest.raises(InputError, match=r"pipe\.png: .*regular file"):
        load_image(root / "a/pipe.png")


def test_system_folders_are_no_classes(root):
    for name in ("@eaDir/good.png", "lost+found/1.png", "__MACOSX/1.png", ".cache/1.png", "b/1.png"):
        sketch(root / name)
    assert labelled_folder(root).classes == ["a", "b"]


def test_images_behind_links_are_read_and_named(root, elsewhere, caplog):
    (root / "a" / "linked.png").symlink_to(elsewhere / "1.png")
    (root / "b").symlink_to(elsewhere)
    (root / "a" / "inside.png").symlink_to(root / "a" / "good.png")
    assert find_images(root)[1] == ["a/good.png", "a/inside.png", "a/linked.png", "b/1.png"]
    assert [line for line in warnings(caplog) if " links " in line] == [
        f"2 images of {root} are links to files elsewhere: a/linked.png, b/1.png"
    ]


def test_the_root_may_be_a_link(root, tmp_path, caplog):
    (tmp_path / "link").symlink_to(root)
    (root / "a" / "good.txt").write_text("a good one")
    assert captioned_folder(tmp_path / "link").captions == [["a good one"]]
    assert not warnings(caplog)


@pytest.mark.parametrize("name", ["a/good.txt", "metadata.csv", "a/metadata.jsonl"])
def test_captions_behind_links_are_refused_without_their_words(name, root, elsewhere):
    (root / name).symlink_to(elsewhere / "secret.txt")
    with pytest.raises(InputError, match=f"{name} is a link .*only images are read") as error:
        captioned_folder(root)
    assert "the secret" not in str(error.value)


def test_captions_in_a_linked_folder_are_refused(root, elsewhere):
    (elsewhere / "secret.txt").rename(elsewhere / "1.txt")
    (root / "b").symlink_to(elsewhere)
    with pytest.raises(InputError, match=r"b/1\.txt is a link to a file outside"):
        captioned_folder(root)


@pytest.mark.parametrize("name", ["pairs.csv", "anno_train.json"])
def test_lists_of_pairs_behind_links_are_refused(name, root, elsewhere):
    (root / name).symlink_to(elsewhere / "secret.txt")
    with pytest.raises(InputError, match=f"{name} is a link to a file outside"):
        find_pairs(root)


def test_captions_that_cannot_be_read_are_named(root):
    (root / "a" / "good.txt").symlink_to(root / "nothing")
    with pytest.raises(InputError, match=r"caption of a/good\.png: .*a/good\.txt is a link to .*nothing, which"):
        captioned_folder(root)
    (root / "folder.txt").mkdir()
    with pytest.raises(InputError, match=r"cannot read .*folder\.txt: Is a directory"):
        read_text(root / "folder.txt", root)


def test_a_deep_line_of_json_is_a_sentence(root):
    (root / "metadata.jsonl").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"metadata\.jsonl line 1 is not JSON"):
        captioned_folder(root)


def test_where_a_training_writes_nothing_is_read(tmp_path, caplog):
    """An output folder inside the data is no class, and its sheets are no drawings."""
    for name in ("cat/1.png", "dog/1.png", "out/validation/step-000001.png", "cat/generated/1.png"):
        sketch(tmp_path / name)
    for output in ("out", "cat/generated"):
        lock_folder(tmp_path / output)
        unlock_folder(tmp_path / output)
    assert find_images(tmp_path)[1] == ["cat/1.png", "dog/1.png"]
    assert labelled_folder(tmp_path).classes == ["cat", "dog"]
    assert f"Not read, because a training or a generation writes there: {tmp_path / 'out'}" in caplog.text
    assert find_images(tmp_path / "out")[1] == ["validation/step-000001.png"]  # unless it is what was asked for
