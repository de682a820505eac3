import json
import math

import pytest
from PIL import Image

from sketch_perceptual.errors import InputError
from sketch_perceptual.evaluation.report import (
    Report,
    check_target,
    expand_models,
    split_name,
    write_figure,
    write_json,
    write_whole,
)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("base=none", ("base", "none")),
        ("none", (None, "none")),
        ("org/model", (None, "org/model")),
        ("mine=org/model", ("mine", "org/model")),
        ("runs/lr=1e-4/best", (None, "runs/lr=1e-4/best")),
        ("elsewhere/lr=1e-4,rank=4", (None, "elsewhere/lr=1e-4,rank=4")),
        ("lora=runs/lr=1e-4/best", ("lora", "runs/lr=1e-4/best")),
        ("lr=1e-4", (None, "lr=1e-4")),  # a folder
        ("lr=1e-4=lr=1e-4", ("lr=1e-4", "lr=1e-4")),
        ("a=b=c", ("a", "b=c")),
        ("..=none", (None, "..=none")),
        ("=none", (None, "=none")),
    ],
)
def test_a_path_may_hold_an_equals_sign(tmp_path, monkeypatch, model, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "lr=1e-4" / "best").mkdir(parents=True)
    (tmp_path / "lr=1e-4").mkdir()
    assert split_name(model) == expected


def test_models_have_names_and_seeds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in (3, 4):
        (tmp_path / "heads" / f"seed-{seed}").mkdir(parents=True)
        (tmp_path / "heads" / f"seed-{seed}" / "config.json").touch()
    assert expand_models(["x=heads", "org/model"]) == [
        ("x", "heads/seed-3"),
        ("x", "heads/seed-4"),
        ("model", "org/model"),
    ]
    assert expand_models(["."])[0][0] == tmp_path.name
    assert expand_models(["x=a", "x=b"]) == [("x", "a"), ("x", "b")]  # seeds that lie apart
    with pytest.raises(InputError, match="`models`: two are called best; write NAME=MODEL"):
        expand_models(["a/best", "b/best"])


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("old")
    for error, raised in ((OSError(28, "No space left on device"), InputError), (KeyboardInterrupt(), BaseException)):

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


def test_where_results_cannot_be_written_is_said_at_the_start(tmp_path):
    check_target("output", tmp_path / "x.json", ".json")
    with pytest.raises(InputError, match=r"`figure` .*x\.jpg must end in \.png"):
        check_target("figure", tmp_path / "x.jpg", ".png")
    (tmp_path / "folder.json").mkdir()
    for path in (tmp_path / "folder.json", tmp_path / "nowhere" / "x.json"):
        with pytest.raises(InputError, match=r"`output` .* cannot be written"):
            check_target("output", path, ".json")


def test_a_table_has_means_and_deviations_and_only_columns_that_are_there():
    runs = [
        {"name": "a", "kind": "pooled", "x": 1.0},
        {"name": "a", "kind": "pooled", "x": 3.0},
        {"name": "bb", "x": 0.5},
    ]
    report = Report(runs, {"kind": "", "x": ".1f", "y": ".3f"})
    assert report.table().splitlines() == ["    kind    x", "a   pooled  2.0 +- 1.4", "bb          0.5"]
    assert report.results["a"]["deviation"]["x"] == pytest.approx(math.sqrt(2))


def test_what_is_not_a_number_is_null_in_the_json(tmp_path):
    write_json(tmp_path / "x.json", {"a": [math.nan, {"b": math.inf}], "name": "\udcff"})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [None, {"b": None}], "name": "\udcff"}
