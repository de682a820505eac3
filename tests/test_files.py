"""Files that are there whole or not at all, and never in place of one that is read."""

import os

import pytest
from PIL import Image

from sketch_perceptual.errors import InputError
from sketch_perceptual.evaluation.tables import write_json
from sketch_perceptual.figures import write_figure
from sketch_perceptual.files import LOCK, PICTURES, Output, check_folder, check_outputs, check_target, write_whole


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder of inputs, and links that lead into it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "cat").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    for name in ("data/a.png", "data/cat/b.png", "data/config.json", "outside.png"):
        (tmp_path / name).write_bytes(b"input")
    os.link("data/a.png", "hard.png")
    (tmp_path / "soft.png").symlink_to("data/cat/b.png")
    (tmp_path / "twin").symlink_to("data")
    (tmp_path / "data" / "linked.png").symlink_to("../outside.png")
    (tmp_path / "data" / "loop").symlink_to("../data")
    return tmp_path / "data"


@pytest.mark.parametrize(
    "target",
    [
        *("data/a.png", "data/../data/a.png", "hard.png", "soft.png", "twin/cat/b.png", "outside.png"),
        *("data/config.json", "data", "data/cat", "twin"),
    ],
)
def test_an_output_is_no_input(data, target):
    for path in (target, data.parent / target):
        with pytest.raises(InputError, match=f"^`figure` .*{target} would replace .*data"):
            check_outputs([Output("figure", path, (".png",))], [None, "nowhere", str(data)])


def test_an_input_may_be_a_file(data):
    check_outputs([Output("figure", "data/a.png", (".png",))], ["data/cat/b.png"])
    with pytest.raises(InputError, match=r"`figure` soft\.png would replace data/cat/b\.png"):
        check_outputs([Output("figure", "soft.png", (".png",))], ["data/cat/b.png"])


@pytest.mark.parametrize("target", ["new.png", "run", "data/new.png", "data/new", "data/empty", "data/run"])
def test_what_replaces_nothing_is_no_mistake(data, target):
    """Such as a folder in the data that a run writes to, which is not read."""
    (data / "empty").mkdir()
    (data / "run").mkdir()
    for name in (LOCK, "x.png"):
        (data / "run" / name).touch()
    check_outputs([Output("output_dir", target)], [data])


def test_a_result_may_be_written_again(data):
    for _ in range(2):
        check_outputs([Output("output", "data/distance.json", (".json",))], [data])
        write_json("data/distance.json", {"task": "distance", "models": {}})


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        ("x.gif", r"x\.gif must end in \.png"),
        ("x", r"x must end in \.png"),
        ("folder.png", "it is a folder"),
        ("pipe.png", "it is not a regular file"),
        ("gone/x.png", "there is no folder gone"),
        ("data/a.png/x.png", "a.png is not a folder"),
    ],
)
def test_where_results_cannot_be_written_is_said_at_the_start(data, target, sentence):
    os.mkdir("folder.png")
    os.mkfifo("pipe.png")
    with pytest.raises(InputError, match=f"`figure`.*{sentence}"):
        check_outputs([Output("figure", target, PICTURES)], [])


def test_an_ending_may_be_in_capitals(data):
    check_target("figure", "x.PNG", (".png",))


def test_a_folder_that_nobody_may_write_to_is_refused(data, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(InputError, match=f"`output_dir` .* nothing can be written in {data}"):
        check_folder("output_dir", data / "new" / "folder")


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("old")
    errors = (OSError(28, "No space left on device"), InputError), (KeyboardInterrupt(), BaseException)
    for error, raised in errors:

        def write(partial, error=error):
            partial.write_text("half")
            raise error

        with pytest.raises(raised):
            write_whole(path, write)
        assert path.read_text() == "old"
    write_whole(path, lambda partial: partial.write_text("new"))
    write_figure(tmp_path / "x.png", Image.new("RGB", (3, 3)))
    assert {file.name for file in tmp_path.iterdir()} == {"x.json", "x.png"}
    assert path.read_text() == "new"
    assert Image.open(tmp_path / "x.png").size == (3, 3)


def test_a_name_may_be_as_long_as_the_system_allows(tmp_path):
    path = tmp_path / ("\u6905" * 83 + ".json")
    write_whole(path, lambda partial: partial.write_text("new"))
    assert path.read_text() == "new"
