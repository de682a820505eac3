"""What the evaluations share: the models they are given, results as a table, as JSON and as a sheet of pictures."""

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
from ..files import write_whole

SHEET_ROWS, SHEET_COLUMNS = 12, 6


@dataclass
class Report:
    """The result of an evaluation.

    Args:
        runs: a dict a model and seed; runs of one "name" are averaged.
        columns: what the table shows of each, and the format of its numbers; what no run has is left out.
        data: what the results rest on.
        draw: makes the figure, something with `save` or `savefig`, when it is asked for.
    """

    runs: list[dict]
    columns: dict[str, str]
    data: dict = field(default_factory=dict)
    draw: Callable[[], Any] | None = None

    @property
    def results(self) -> dict[str, dict]:
        """Name -> mean over its runs, their deviation if there are several, and the runs."""
        results = {}
        for name in dict.fromkeys(run["name"] for run in self.runs):
            own = [run for run in self.runs if run["name"] == name]
            values = {key: [run[key] for run in own] for key, value in own[0].items() if isinstance(value, float)}
            results[name] = {"mean": {key: statistics.fmean(of) for key, of in values.items()}, "runs": own}
            if len(own) > 1:
                results[name]["deviation"] = {key: float(np.std(of, ddof=1)) for key, of in values.items()}
        return results

    def cells(self) -> list[list[str]]:
        """A head and one line a model; with several seeds mean and deviation."""
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
    """Everything, with null for what is not a finite number."""
    write_text(path, json.dumps(without_nan(record), indent=1, allow_nan=False))


def write_text(path: str | Path, text: str) -> None:
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def without_nan(value):
    """The same with None for numbers that are not finite, in any depth."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def expand_models(models: list[str], seeds: str = "seed-*/config.json") -> list[tuple[str, str]]:
    """Name and source of each `[NAME=]MODEL`; a folder with a folder for each of several `seeds` is one of each.

    A path may hold "=": what exists is a path as a whole, and a name holds no "/". InputError for two models that
    would share a name without being given it.
    """
    named, sources, seen = [], {}, set()
    for model in models:
        given, source = split_name(model)
        if not source:
            raise InputError(f"`models`: {model!r} names no model")
        name = given or _own_name(source)
        if sources.setdefault(name, source) != source and given is None:
            raise InputError(f"`models`: two are called {name}; write NAME=MODEL")
        if (given, source) in seen:
            raise InputError(f"`models`: {model} is given twice")
        seen.add((given, source))
        folders = sorted({str(path.parent) for path in Path(source).glob(seeds)})
        named += [(name, folder) for folder in folders or [source]]
    return named


def split_name(model: str) -> tuple[str | None, str]:
    """The name, None if there is none, and the source in `[NAME=]MODEL`."""
    if _exists(model):
        return None, model
    cuts = [index for index, letter in enumerate(model) if letter == "=" and is_name(model[:index])]
    cut = next((index for index in cuts if _exists(model[index + 1 :])), cuts[0] if cuts else None)
    return (None, model) if cut is None else (model[:cut], model[cut + 1 :])


def is_name(text: str) -> bool:
    return text not in ("", ".", "..") and not {"/", os.sep} & set(text)


def _own_name(source: str) -> str:
    return (Path(source).resolve() if _exists(source) else Path(source)).name


def _exists(path: str) -> bool:
    try:
        return bool(path) and Path(path).exists()
    except (OSError, ValueError):  # too long, or a NUL
        return False
