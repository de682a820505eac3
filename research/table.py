"""Print paired differences between arms of research.term, by seed and style of the drawings.

    python -m research.table research/strokes/*.jsonl --reference "plain, min-SNR 1" --columns recognised =ends ink

The row of --reference shows its means, the others their mean difference to it with the 95 % interval over pairs, *
where it excludes zero. A column has a value for each setting, such as guidance 1 and 4. "=" stands for equal ink.
"""

import argparse
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from scipy.stats import t as student


def interval(values: Sequence[float]) -> str:
    """Mean and 95 % interval of paired differences, by Student's t."""
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return f"{mean:+.3g}"
    half = student.ppf(0.975, n - 1) * statistics.stdev(values) / math.sqrt(n)
    return f"{mean:+.2g} ± {half:.2g}{' *' if abs(mean) > half else ''}"


def table(cells: Sequence[dict], reference: str, columns: Iterable[str] = ()) -> str:
    """A Markdown table of these measures; of all without `columns`."""
    names = [name.split(" @") for name in cells[0] if " @" in name]
    settings = list(dict.fromkeys(setting for _, setting in names))
    columns = list(columns) or list(dict.fromkeys(measure for measure, _ in names))
    by_arm: dict[str, dict[tuple, dict]] = {}
    for cell in cells:
        by_arm.setdefault(cell["arm"], {})[cell["style"], cell["seed"]] = cell
    if reference not in by_arm:
        return f"no cell of {reference} to compare with"
    references = by_arm.pop(reference)

    def row(arm: str, count: int, values: dict[str, list[str]]) -> str:
        return f"| {arm} | {count} | " + " | ".join(", ".join(values[measure]) for measure in columns) + " |"

    def means(measure: str) -> list[str]:
        return [
            f"{statistics.fmean(cell[f'{measure} @{setting}'] for cell in references.values()):.3g}"
            for setting in settings
        ]

    lines = [f"| | pairs | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    lines.append(row(reference, len(references), {measure: means(measure) for measure in columns}))
    for arm, of_arm in by_arm.items():
        pairs = [(cell, references[key]) for key, cell in of_arm.items() if key in references]
        if not pairs:
            continue
        differences = {
            measure: [
                interval([cell[name] - other[name] for cell, other in pairs])
                for name in (f"{measure} @{setting}" for setting in settings)
            ]
            for measure in columns
        }
        lines.append(row(arm, len(pairs), differences))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--reference", default="plain")
    parser.add_argument("--columns", nargs="+", default=[], help="measures; default: all")
    args = parser.parse_args()
    cells = [json.loads(line) for path in args.results for line in path.read_text().splitlines()]
    if not cells:
        parser.error(f"no cells in {' '.join(map(str, args.results))}")
    print(table(cells, args.reference, args.columns))


if __name__ == "__main__":
    main()
