"""Data sets that `datasets` reads: what is wrong with them is a sentence, and no file outside of them is read."""

import json
import os
import re

import datasets
import pytest
from PIL import Image

from sketch_perceptual.data.captions import captioned_dataset
from sketch_perceptual.data.hf_dataset import load_rows
from sketch_perceptual.errors import InputError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "set").mkdir()
    for path in ("set/0.png", "set/1.png", "secret.png"):
        Image.new("RGB", (8, 8), "white").save(tmp_path / path)
    return tmp_path / "set"


def load(folder):
    return load_rows(str(folder), cache_dir=str(folder.parent / "cache"))


def describe(folder, *names):
    lines = [json.dumps({"file_name": name, "text": "a drawing"}) for name in names]
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def test_a_folder_is_read(folder):
    describe(folder, "0.png", "1.png")
    data = captioned_dataset(load(folder), name=str(folder), resolution=8)
    assert [data[0, index]["caption"] for index in range(len(data))] == ["a drawing"] * 2


@pytest.mark.parametrize("name", ["http://127.0.0.1:9/0.png", "../secret.png", "{secret}"])
def test_addresses_and_paths_out_of_the_folder_are_a_sentence(name, folder):
    describe(folder, name.format(secret=folder.parent / "secret.png"), "1.png")
    with pytest.raises(InputError, match=str(folder)) as error:  # from `datasets`, or ours where that is old
        captioned_dataset(load(folder), name=str(folder), resolution=8)[0, 0]
    assert re.search("cannot be loaded: |there is no such file|outside of the data set", str(error.value))
    assert "DatasetGeneration" not in str(error.value)


STRUCT = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}


@pytest.mark.parametrize("kind", [datasets.Image(decode=False), STRUCT, datasets.Value("string")], ids=str)
@pytest.mark.parametrize("path", ["{secret}", "../secret.png"])
def test_a_path_in_a_parquet_stays_in_the_folder(kind, path, folder, monkeypatch):
    monkeypatch.chdir(folder)
    path = path.format(secret=folder.parent / "secret.png")
    image = path if kind == datasets.Value("string") else {"bytes": None, "path": path}
    features = datasets.Features({"image": kind, "text": datasets.Value("string")})
    datasets.Dataset.from_dict({"image": [image], "text": ["x"]}, features).to_parquet("train.parquet")
    for name in ("0.png", "1.png"):
        (folder / name).unlink()
    with pytest.raises(InputError, match=r"row 0 of .*secret\.png lies outside of the data set"):
        captioned_dataset(load(folder), name=str(folder))


def test_a_column_of_texts_is_paths_below_a_folder_and_nothing_elsewhere(folder):
    rows = datasets.Dataset.from_dict({"image": ["0.png"], "text": ["x"]})
    assert captioned_dataset(rows, name=str(folder), resolution=8)[0, 0]["pixel_values"].shape == (3, 8, 8)
    with pytest.raises(InputError, match="'image' of someone/drawings holds strings: choose another `image_column`"):
        captioned_dataset(rows, name="someone/drawings")


def test_bytes_in_a_row_may_have_any_name(folder):
    image = {"bytes": (folder / "0.png").read_bytes(), "path": "/home/someone/0.png"}
    features = datasets.Features({"image": datasets.Image(decode=False), "text": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"image": [image], "text": ["x"]}, features)
    rows.save_to_disk(folder.parent / "saved")
    assert captioned_dataset(load(folder.parent / "saved"), name="saved", resolution=8).captions == [["x"]]


def test_a_pipe_is_named(folder):
    os.mkfifo(folder / "metadata.csv")
    with pytest.raises(InputError, match=r"neither files nor folders: metadata\.csv"):
        load(folder)


def test_what_is_not_there_is_named(folder):
    with pytest.raises(InputError, match="`dataset_name` nowhere/drawings cannot be loaded"):
        load_rows("nowhere/drawings")
