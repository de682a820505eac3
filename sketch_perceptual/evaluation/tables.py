"""Names of models, and results as a table and as JSON, for all evaluations."""

import json
import math
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, shown
from ..files import write_text

SHEET_ROWS, SHEET_COLUMNS = 12, 6


@dataclass
class Report:
    """The result of an evaluation.

    Args:
        runs: a dict for each model and seed; runs with the same "name" are averaged.
        columns: columns of the table and the format of their numbers; those that no run has are left out.
        data: description of the data.
        render: makes the figure, an object with `save` or `savefig`.
    """

    runs: list[dict]
    columns: dict[str, str]
    data: dict = field(default_factory=dict)
    render: Callable[[], Any] | None = None

    @property
    def results(self) -> dict[str, dict]:
        """For each name the mean over its runs, their deviation if there are several, and the runs."""
        results = {}
        for name in dict.fromkeys(run["name"] for run in self.runs):
            runs = [run for run in self.runs if run["name"] == name]
            values = {key: [run[key] for run in runs] for key, value in runs[0].items() if isinstance(value, float)}
            results[name] = {"mean": {key: statistics.fmean(row) for key, row in values.items()}, "runs": runs}
            if len(runs) > 1:
                results[name]["deviation"] = {key: float(np.std(row, ddof=1)) for key, row in values.items()}
        return results

    def cells(self) -> list[list[str]]:
        """Return a header and a line for each model, with mean and deviation if it has several seeds."""
        columns = {key: form for key, form in self.columns.items() if any(key in run for run in self.runs)}
        lines = []
        for name, result in self.results.items():
            lines.append([shown(name), *(_cell(result, *column) for column in columns.items())])
        return [["", *columns], *lines]

    def table(self) -> str:
        lines = self.cells()
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
        return "\n".join("  ".join(line).rstrip() for line in padded)


def _cell(result: dict, column: str, form: str) -> str:
    value = result["mean"].get(column, result["runs"][0].get(column))
    if value is None:
        return ""
    deviation = result.get("deviation", {}).get(column)
    return format(value, form) + ("" if deviation is None else f" +- {deviation:{form}}")


def write_json(path: str | Path, record: dict) -> None:
    """Write a record, with null for numbers that are not finite."""
    write_text(path, json.dumps(without_nan(record), indent=1, allow_nan=False))


def without_nan(value):
    """Replace numbers that are not finite by None, at any depth."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def expand_models(models: list[str], seeds: str = "seed-*/config.json") -> list[tuple[str, str]]:
    """Return name and source of each `[NAME=]MODEL`; a folder with `seeds` becomes one entry per seed.

    A path may contain "=": whatever exists is a path, and a name contains no "/". InputError for two models that
    share a default name.
    """
    named, sources, seen = [], {}, set()
    for model in models:
        given, source = split_name(model)
        if not source:
            raise InputError(f"`models`: {model!r} names no model")
        name = given or _default_name(source)
        if sources.setdefault(name, source) != source and given is None:
            raise InputError(f"`models`: two models are called {name}: write NAME=MODEL")
        if (given, source) in seen:
            raise InputError(f"`models`: {model} is given twice")
        seen.add((given, source))
        folders = sorted({str(path.parent) for path in Path(source).glob(seeds)})
        named += [(name, folder) for folder in folders or [source]]
    return named


def split_name(model: str) -> tuple[str | None, str]:
    """Split `[NAME=]MODEL` into the name, or None, and the source."""
    if _exists(model):
        return None, model
    cuts = [index for index, letter in enumerate(model) if letter == "=" and is_name(model[:index])]
    cut = next((index for index in cuts if _exists(model[index + 1 :])), cuts[0] if cuts else None)
    return (None, model) if cut is None else (model[:cut], model[cut + 1 :])


def is_name(text: str) -> bool:
    return text not in ("", ".", "..") and not {"/", os.sep} & set(text)


def _default_name(source: str) -> str:
    return (Path(source).resolve() if _exists(source) else Path(source)).name


def _exists(path: str) -> bool:
    try:
        return bool(path) and Path(path).exists()
    except (OSError, ValueError):  # too long, or a NUL
        return False
