"""train_johnson.py and its network beside pytorch/examples' fast_neural_style, in turns in one run.

    git clone https://github.com/pytorch/examples
    python -m benchmarks.johnson --examples examples/fast_neural_style/neural_style --resolution 128

Both train on the same made pictures, in batches of the same size, on VGG-16 to relu4_3 with random weights, which cost
what trained ones cost; images a second are counted from one optimizer step to the next. Options that are not listed
here go to train_johnson.py.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from sketch_perceptual.networks.backbone import AttentionVGG16
from sketch_perceptual.networks.style_net import UPSAMPLING, JohnsonNet

ROOT = Path(__file__).parent.parent
BATCH, WARM_UP = 4, 3
# Runs a script whose torch.optim steps leave their times behind; torchvision's vgg16 comes without its download.
TIMED = """
import json, runpy, sys, time
import torch, torchvision
times, vgg16 = [], torchvision.models.vgg16
torchvision.models.vgg16 = lambda **options: vgg16()
for kind in (torch.optim.Adam, torch.optim.AdamW):
    def step(self, *args, step=kind.step, **options):
        times.append(time.perf_counter())
        return step(self, *args, **options)
    kind.step = step
out, sys.argv = sys.argv[1], sys.argv[2:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    json.dump(times, open(out, "w"))
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--examples", required=True, help="the folder of neural_style.py")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each")
    parser.add_argument("--steps", type=int, default=20, help="measured steps of a turn")
    args, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        draw = torch.Generator().manual_seed(0)
        (root / "photos" / "all").mkdir(parents=True)
        for number in range(BATCH * (WARM_UP + args.steps)):
            pixels = torch.randint(256, (args.resolution, args.resolution, 3), generator=draw, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(root / "photos" / "all" / f"{number:04d}.png")
        style = root / "photos" / "all" / "0000.png"
        AttentionVGG16("none", num_classes=0, last_layer="relu4_3").save_pretrained(root / "vgg")
        theirs = f"""{args.examples}/neural_style.py train --dataset {root}/photos --style-image {style} --epochs 1
            --save-model-dir {root}/theirs --image-size {args.resolution} --batch-size {BATCH}""".split()
        ours = f"""{ROOT}/train_johnson.py --train_data_dir {root}/photos --style {style} --backbone {root}/vgg
            --resolution {args.resolution} --train_batch_size {BATCH} --seed 0 --report_to none
            --output_dir {root}/ours""".split()
        ratios = []
        for turn in range(args.rounds):
            speeds = [images_per_second(root, command) for command in (theirs, [*ours, *options])]
            ratios.append(speeds[1] / speeds[0])
            theirs_ours = "fast_neural_style {:.2f}, train_johnson.py {:.2f} images a second".format(*speeds)
            print(f"turn {turn + 1}: {theirs_ours}", flush=True)
        print(f"training: {statistics.median(ratios):.2f} x, {min(ratios):.2f} to {max(ratios):.2f}")
    sys.path.insert(0, args.examples)
    from transformer_net import TransformerNet

    networks = {"fast_neural_style": TransformerNet()} | {name: JohnsonNet(upsampling=name) for name in UPSAMPLING}
    seconds = {name: [] for name in networks}
    images = torch.rand(1, 3, 512, 512)
    with torch.inference_mode():
        for _ in range(args.rounds + 1):
            for name, network in networks.items():
                start = time.perf_counter()
                network.eval()(images)
                seconds[name].append(time.perf_counter() - start)
    for name, times in seconds.items():
        print(f"a picture of 512 px through {name}: {statistics.median(times[1:]):.2f} s")


def images_per_second(root: Path, command: list[str]) -> float:
    """Of a training, after its first steps."""
    file = root / "times.json"
    done = subprocess.run(
        [sys.executable, "-c", TIMED, str(file), *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)
    times = json.loads(file.read_text())[WARM_UP:]
    return BATCH * (len(times) - 1) / (times[-1] - times[0])


if __name__ == "__main__":
    main()
