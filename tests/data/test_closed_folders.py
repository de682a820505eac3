"""Folders that may not be entered, and paths through a file: always a sentence with the path."""

import os

import pytest
from PIL import Image

from sketch_perceptual.data.captions import captioned_folder
from sketch_perceptual.data.hf_dataset import load_rows
from sketch_perceptual.data.labels import labelled_folder
from sketch_perceptual.data.paired import find_pairs
from sketch_perceptual.data.scan import scan
from sketch_perceptual.errors import InputError

READERS = {"captions": captioned_folder, "classes": labelled_folder, "pairs": find_pairs, "rows": load_rows}


@pytest.fixture
def closed(tmp_path, monkeypatch):
    """A folder whose insides only its owner may see; tests may run as root, who sees all."""
    folder = tmp_path / "closed"
    (folder / "data").mkdir(parents=True)

    def guarded(function):
        def guard(path=".", *more, **options):
            if not isinstance(path, int) and os.path.realpath(path).startswith(f"{folder}/"):
                raise PermissionError(13, "Permission denied", os.fspath(path))
            return function(path, *more, **options)

        return guard

    for name in ("stat", "scandir", "listdir", "open", "mkdir"):
        monkeypatch.setattr(os, name, guarded(getattr(os, name)))
    return folder


@pytest.mark.parametrize("reader", READERS)
def test_a_folder_that_may_not_be_entered_is_named(reader, closed):
    with pytest.raises(InputError, match=f"{closed}/data"):
        READERS[reader](str(closed / "data"))


@pytest.mark.parametrize("reader", READERS)
def test_a_path_through_a_file_is_named(reader, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=f"{tmp_path}/file/data"):
        READERS[reader](str(tmp_path / "file/data"))


def test_links_into_a_closed_folder_are_images_that_cannot_be_read(closed, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    Image.new("RGB", (8, 8)).save(root / "1.png")
    (root / "2.png").symlink_to(closed / "data/2.png")
    data = captioned_folder(root, default_caption="x")
    assert [os.path.basename(name) for name in data.names] == ["1.png", "2.png"]
    assert list(scan(data).bad) == [1]
    (root / "2.txt").symlink_to(closed / "data/2.txt")
    with pytest.raises(InputError, match=f"2.txt is a link to {closed}/data/2.txt, which"):
        captioned_folder(root)


def test_scans_are_kept_where_that_is_allowed(closed, tmp_path, caplog):
    (tmp_path / "root").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "root/1.png")
    data = captioned_folder(tmp_path / "root", default_caption="x")
    data.scan_folder = closed / "scans"
    assert list(scan(data).infos) == [0]
    assert f"{closed}/scans" in caplog.text and "Permission denied" in caplog.text
