"""Make a paired set of OpenMoji: its coloured pictures as photos, its line drawings as sketches.

    python -m tools.openmoji_pairs --dataset_name openmoji --output_dir openmoji-pairs

Reads a data set with the columns `colour`, `line` and `label`, and writes photos/, sketches/ and pairs.csv. A tenth of
each class, whose lines have no copy among the others, is the part "test".
"""

import argparse
import csv
from pathlib import Path

import numpy as np

from sketch_perceptual.data.hf_dataset import load_rows
from sketch_perceptual.data.images import load_image
from sketch_perceptual.data.near_duplicates import content_key, near_duplicates, thumbnail
from sketch_perceptual.data.splits import split


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", required=True)
    parser.add_argument("--output_dir", required=True)
    args = parser.parse_args()
    root, rows = Path(args.output_dir), load_rows(args.dataset_name)
    for folder in ("photos", "sketches"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    keys, thumbnails = [], []
    for number, row in enumerate(rows):
        for folder, column in (("photos", "colour"), ("sketches", "line")):
            image = load_image(row[column])
            image.save(root / folder / f"{number:04d}.png")
        keys.append(content_key(image))
        thumbnails.append(thumbnail(image))
    test = set(split(rows["label"][:], keys, near_duplicates(keys, np.stack(thumbnails)).tolist()).validation)
    with (root / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["photo", "sketch", "part"])
        for number in range(len(rows)):
            name = f"{number:04d}.png"
            table.writerow([f"photos/{name}", f"sketches/{name}", "test" if number in test else "train"])
    print(f"{len(rows)} pairs, {len(test)} of them for test: {root}")


if __name__ == "__main__":
    main()
