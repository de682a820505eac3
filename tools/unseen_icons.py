"""Make a labelled set for agreement.py whose things and hands the bundled backbone never saw.

    pip install cairosvg && npm pack @iconify/json && tar xzf iconify-json-*.tgz
    python -m tools.unseen_icons --iconify package/json --dataset_name concepts --output_dir unseen

The hands are those that `train_backbone.py --dataset_name concepts --group_column set` keeps apart; the things are
names that three of them or more have drawn and that share no word with a class of the data set. Brands are left out,
since all hands copy one logo, and so is what a flip would change. Black on white, 160 px, as the data set's.
"""

import argparse
import io
import json
import re
from collections import defaultdict
from pathlib import Path

import cairosvg
import datasets
from PIL import Image

from tools.triplets import load_labelled

SIDE = 160
VARIANT = re.compile(r"-(outline|line|solid|filled|fill|regular|linear|bold|round|alt|\d+)$")
DIRECTED = {"arrow", "chevron", "caret", "angle", "align", "indent", "outdent", "left", "right", "up", "down"}
FEWEST_HANDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iconify", type=Path, required=True, help="the folder json of the npm package @iconify/json")
    parser.add_argument("--dataset_name", required=True, help="the data set that the backbone was tuned on")
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    tuned_on = load_labelled(args.dataset_name)
    words = {stem(word) for name in set(tuned_on.things) for word in name.split("-")}
    brands = {VARIANT.sub("", name) for logos in ("simple-icons", "logos") for name in read_set(args.iconify, logos)}
    icons: dict[str, dict[str, str]] = defaultdict(dict)  # thing -> hand -> SVG
    for hand in sorted(set(tuned_on.select(tuned_on.sides()[1]).hands)):
        for name, svg in sorted(read_set(args.iconify, hand).items()):
            thing = VARIANT.sub("", name)
            if thing not in brands and not {stem(word) for word in thing.split("-")} & (words | DIRECTED):
                icons[thing].setdefault(hand, svg)
    rows = [
        {"image": render(svg), "label": thing, "set": hand}
        for thing, drawn in sorted(icons.items())
        if len(drawn) >= FEWEST_HANDS
        for hand, svg in drawn.items()
    ]
    things = sorted({str(row["label"]) for row in rows})
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=things), "set": datasets.Value("string")}
    )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows, features=features).to_parquet(args.output_dir / "unseen.parquet")
    print(f"{len(rows)} drawings of {len(things)} things by {len({row['set'] for row in rows})} hands")


def stem(word: str) -> str:
    return word if len(word) < 4 else word.removesuffix("s").removesuffix("ed")


def read_set(folder: Path, name: str) -> dict[str, str]:
    """Name -> SVG of each icon of a set."""
    icons = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    drawings = {}
    for icon, drawn in icons["icons"].items():
        left, top = (drawn.get(key, icons.get(key, 0)) for key in ("left", "top"))
        width, height = (drawn.get(key, icons.get(key, 16)) for key in ("width", "height"))
        box = f'viewBox="{left} {top} {width} {height}"'
        drawings[icon] = f'<svg xmlns="http://www.w3.org/2000/svg" {box} color="black">{drawn["body"]}</svg>'
    return drawings


def render(svg: str) -> Image.Image:
    png = cairosvg.svg2png(svg.encode(), output_width=SIDE, output_height=SIDE, background_color="white")
    return Image.open(io.BytesIO(png)).convert("L")


if __name__ == "__main__":
    main()
