"""A second scan reads what is new, and nothing else."""

import os

import pytest
from PIL import Image, ImageDraw

from sketch_perceptual.data import scan_cache
from sketch_perceptual.data.datasets import Images
from sketch_perceptual.data.scan import read_once, scan


def draw(path, number):
    image = Image.new("RGB", (40, 40), "black" if number == 3 else "white")
    ImageDraw.Draw(image).line((number, 5, 30, 35 - number), "white" if number == 3 else "black", 2)
    image.save(path)


@pytest.fixture
def paths(tmp_path):
    folder = tmp_path / "drawings"
    folder.mkdir()
    paths = [folder / f"{number}.png" for number in range(5)]
    for number, path in enumerate(paths[:4]):
        draw(path, number)
    paths[4].write_bytes(b"damaged")
    return paths


@pytest.fixture
def read(paths, tmp_path, monkeypatch):
    """Scans, and tells which images were read and what was found."""

    def read(chosen=paths, scan_folder=tmp_path / "scans", thumbnails=False, visit=None, **options):
        data = Images(chosen, list(map(str, chosen)), **options)
        data.scan_folder = scan_folder
        names = []
        image = Images.image
        with monkeypatch.context() as patch:
            patch.setattr(Images, "image", lambda self, index: names.append(index) or image(self, index))
            found = scan(data, visit, thumbnails=thumbnails)
        return sorted(names), found

    return read


ALL = [0, 1, 2, 3, 4]


def test_only_what_cannot_be_read_is_tried_again(read):
    first, found = read()
    again, same = read()
    assert (first, again) == (ALL, [4])
    assert same == found and list(found.infos) == [0, 1, 2, 3] and list(found.bad) == [4]


def test_a_second_start_opens_no_image_and_finds_the_same(read, paths, monkeypatch):
    data = Images(paths[:4], list(map(str, paths[:4])))
    data.scan_folder = paths[0].parent.parent / "scans"
    first = read_once(data, "error", copies=True)
    monkeypatch.setattr(Image, "open", None)
    assert read_once(data, "error", copies=True) == first


EDITS = {
    "pixels": lambda path: draw(path, 7),
    "size": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "time": lambda path: os.utime(path, ns=(1, 1)),
    "another file in its place, of its size and time": lambda path: replace(path),
}


def replace(path):
    status, other = path.stat(), path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(other, path)


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_file_is_read_again(edit, read, paths):
    before = read()[1]
    EDITS[edit](paths[1])
    names, found = read()
    assert names == [1, 4]
    assert (found.infos[1].key != before.infos[1].key) == (edit == "pixels")
    assert read()[0] == [4]


@pytest.mark.parametrize(
    "options", [{"background": "black"}, {"invert": "auto"}, {"invert": "always"}, {"thumbnails": True}]
)
def test_whatever_changes_what_is_seen_is_read_for_itself(options, read):
    plain = read()[1]
    names, found = read(**options)
    assert names == ALL and read(**options) == ([4], found) and read() == ([4], plain)
    inverted = {"auto": [3], "always": [0, 1, 2, 3]}.get(options.get("invert"), [])
    assert [index for index, seen in found.infos.items() if seen.key != plain.infos[index].key] == inverted


def test_other_code_reads_again(read, monkeypatch):
    read()
    monkeypatch.setattr(scan_cache, "_version", lambda: "newer")
    assert read()[0] == ALL and read()[0] == [4]


def test_parts_of_a_folder_add_up(read, paths):
    read([paths[0], paths[2]])
    assert read()[0] == [1, 3, 4]
    assert read([paths[3], paths[0]])[0] == []


def test_a_visit_reads_all(read):
    read()
    assert read(visit=lambda index, image: None)[0] == ALL


@pytest.mark.parametrize("place", [0, 0.3, 0.6, 0.9, "cut", "empty"])
def test_a_damaged_file_is_ignored_and_made_again(place, read, tmp_path, caplog):
    first = read(thumbnails=True)[1]
    (kept,) = (tmp_path / "scans").iterdir()
    data = bytearray(kept.read_bytes())
    if place == "cut":
        del data[len(data) // 2 :]
    elif place == "empty":
        data.clear()
    else:
        data[int(place * len(data))] ^= 1
    kept.write_bytes(data)
    assert read(thumbnails=True) == (ALL, first)
    assert "is damaged, all images are read again" in caplog.text
    assert read(thumbnails=True) == ([4], first)


def test_what_cannot_be_kept_is_said_and_ends_nothing(read, tmp_path, caplog):
    (tmp_path / "file").touch()
    assert read(scan_folder=tmp_path / "file") == read(scan_folder=None)
    assert "cannot be cached: " in caplog.text


def test_an_interrupted_scan_keeps_what_it_has_seen(read):
    def stop(index, image):
        if index == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read(visit=stop)
    assert read()[0] == [2, 3, 4]


def test_rows_of_a_data_set_are_known_by_their_bytes(read, paths):
    rows = [{"bytes": path.read_bytes(), "path": path.name} for path in paths[:2]]
    first, found = read(rows)
    assert (first, read(rows)) == ([0, 1], ([], found))
    rows[1]["bytes"] = paths[2].read_bytes()
    assert read(rows)[0] == [1]
    rows += [{"bytes": None, "path": str(path)} for path in paths[2:4]]
    assert read(rows)[0] == [0, 1, 2, 3]  # another place
    assert read(rows)[0] == []
