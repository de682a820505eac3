"""Draw a sheet of enlarged strokes: what the LoRAs of one seed draw of the same noise, and true drawings above.

python -m research.term ... --pictures pictures --seeds 201
python -m research.sheet --pictures pictures --seed 201 --figure research/strokes.png
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from research.term import TONE_CURVE, ToneCurve, embedded
from sketch_perceptual import to_pil, to_tensor
from sketch_perceptual.drawings import CLASSES, STYLES
from sketch_perceptual.figures import image_grid
from tools.make_tiny_sd import TINY_SD

CUT = slice(32, 96)  # pixels of a side of 128
ENLARGED = 192
ARMS = ["plain", TONE_CURVE, "plain, min-SNR 1", "min-SNR 1, gram + 1 tone, 1", "min-SNR 1, lpips + tone, 1"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pictures", type=Path, required=True, help="folder that research.term wrote")
    add("--arms", nargs="+", default=ARMS)
    add("--seed", type=int, required=True)
    add("--style", choices=STYLES, default="pen")
    add("--guidance", default="4")
    add("--figure", type=Path, required=True)
    args = parser.parse_args()
    world = embedded(str(TINY_SD), args.style)
    things = len(CLASSES) // 2
    true = world.true[len(world.true) // 2 :][:: len(world.true) // len(CLASSES)]
    rows = {"true": [enlarged(to_pil(image)) for image in true]}
    for arm in args.arms:
        source = "plain" if arm == TONE_CURVE else arm
        path = args.pictures / f"{args.style} {args.seed} {source} @{args.guidance}.npz"
        pictures = np.load(path)["pictures"]
        chosen = pictures[:: len(pictures) // things]
        if arm == TONE_CURVE:
            whole, few = ([to_tensor(Image.fromarray(x)) for x in part] for part in (pictures, chosen))
            curve = ToneCurve(torch.stack(whole), world.learned)
            chosen = [np.asarray(to_pil(image)) for image in curve(torch.stack(few))]
        rows[arm] = [enlarged(Image.fromarray(picture)) for picture in chosen]
    image_grid(rows, size=ENLARGED).save(args.figure)


def enlarged(image: Image.Image) -> Image.Image:
    box = (CUT.start, CUT.start, CUT.stop, CUT.stop)
    return image.crop(box).resize((ENLARGED, ENLARGED), Image.Resampling.NEAREST)


if __name__ == "__main__":
    main()
