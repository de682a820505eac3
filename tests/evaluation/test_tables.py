import json
import math

import pytest

from sketch_perceptual.errors import InputError
from sketch_perceptual.evaluation.tables import Report, expand_models, split_name, write_json


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
    with pytest.raises(InputError, match=r"`models`: .* best.*NAME=MODEL"):
        expand_models(["a/best", "b/best"])
    with pytest.raises(InputError, match="x=a is given twice"):  # not a second seed
        expand_models(["x=a", "x=a"])


def test_a_table_has_means_and_deviations_and_only_columns_that_are_there():
    runs = [
        {"name": "a", "kind": "pooled", "x": 1.0},
        {"name": "a", "kind": "pooled", "x": 3.0},
        {"name": "bb", "x": 0.5},
    ]
    report = Report(runs, {"kind": "", "x": ".1f", "y": ".3f"})
    assert report.table().splitlines() == ["    kind    x", "a   pooled  2.0 +- 1.4", "bb          0.5"]
    assert report.results["a"]["deviation"]["x"] == pytest.approx(math.sqrt(2))


def test_a_measure_that_one_seed_lacks_has_no_deviation():
    report = Report([{"name": "a", "intra": 1.0}, {"name": "a", "intra": math.nan}], {"intra": ".1f"})
    assert math.isnan(report.results["a"]["deviation"]["intra"])
    assert "nan" in report.table()


def test_a_name_is_one_line_of_the_table_and_exact_in_the_results():
    report = Report([{"name": "a\nb\x1b[2J", "x": 1.0}], {"x": ".1f"})
    assert report.table().splitlines()[1:] == ["a\\nb\\x1b[2J  1.0"]
    assert list(report.results) == ["a\nb\x1b[2J"]


def test_what_is_not_a_number_is_null_in_the_json(tmp_path):
    write_json(tmp_path / "x.json", {"a": [math.nan, {"b": math.inf}], "name": "\udcff"})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [None, {"b": None}], "name": "\udcff"}
