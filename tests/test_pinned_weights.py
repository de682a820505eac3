"""Five small runs give the weights that they always gave: no change of the house changes a result.

As a program, `python tests/test_pinned_weights.py`, it prints what EXPECTED has to be, and a hash of all weights. The
hash shows the last bit, but depends on the machine and on versions.
"""

import sys
import tempfile
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from conftest import ROOT, reset_accelerate
from safetensors.torch import load_file

import train_lora_sketch as script
from sketch_perceptual.drawings import draw

# Of the matrices "up", which begin at 0.
EXPECTED = {
    "the demo": [-2.673, 0.069, 1.845, 0.699],
    "no term": [0.791, 0.857, 0.495, 0.514],
    "all at once": [-0.594, -1.153, 1.133, 0.999],
    "v_prediction": [0.944, 0.286, 0.969, -1.814],
    "every second step": [-0.625, -0.818, 0.629, -1.404],
}
RUNS = {
    "the demo": "--noise_offset 0.3 --rank 32 --learning_rate 2e-3",
    "no term": "--perceptual_weight 0 --snr_gamma 5 --random_flip --caption_dropout 0.3 --shuffle_tags",
    "all at once": "--use_dora --train_text_encoder --validation_share 0.25 --alpha_mask --fit bucket",
    "v_prediction": "--prediction_type v_prediction --perceptual_min_snr 0.5 --perceptual_target reconstruction"
    " --perceptual_crop 32 --gradient_accumulation_steps 2 --gradient_checkpointing --center_crop",
    "every second step": "--use_rslora --perceptual_loss attention_vgg=1 pixel=0.5 --perceptual_start_step 1"
    " --perceptual_every 2 --lr_scheduler cosine --fit pad --cache_latents",
}


def make_drawings(folder):
    """Eight drawings on transparent paper, of three shapes, with captions of several tags."""
    for number, name in enumerate(("house", "cat", "boat", "flower") * 2):
        image = draw(name, number, 0, "pen", 96).convert("RGBA")
        image.putalpha(image.convert("L").point(lambda value: 255 if value < 250 else 0))
        image.crop(((0, 0, 96, 96), (0, 0, 96, 64), (8, 0, 88, 96))[number % 3]).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a sketch of a {name}, ink, {number} lines")


def train(folder, options):
    """The weights after five steps of two drawings."""
    reset_accelerate()
    fixed = f"""--pretrained_model_name_or_path {ROOT / "sketch_perceptual/assets/tiny-sd"} --resolution 64 --seed 42
        --train_data_dir {folder / "drawings"} --train_batch_size 2 --max_train_steps 5 --lr_warmup_steps 0
        --learning_rate 1e-3 --report_to none --feature_dir {folder / "features"} --output_dir {folder / "out"}"""
    script.main(script.parse_args([*fixed.split(), *options.split()]))
    return load_file(folder / "out" / "pytorch_lora_weights.safetensors")


def projections(weights):
    """Four numbers about N(0, 1), which another noise, caption or order of the images makes others."""
    trained = torch.cat([weights[name].flatten() for name in sorted(weights) if ".lora.up." in name])
    directions = torch.randn(4, len(trained), generator=torch.Generator().manual_seed(0))
    return (directions @ trained / trained.norm()).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_weights_are_what_they_were(run, tmp_path, signals):
    (tmp_path / "drawings").mkdir()
    make_drawings(tmp_path / "drawings")
    assert projections(train(tmp_path, RUNS[run])) == pytest.approx(EXPECTED[run], abs=0.05)


def main(folder):
    (folder / "drawings").mkdir()
    make_drawings(folder / "drawings")
    for run, options in RUNS.items():
        weights = train(folder, options)
        digest = sha256(b"".join(weights[name].numpy().tobytes() for name in sorted(weights))).hexdigest()[:16]
        print(f'    "{run}": {[round(number, 3) for number in projections(weights)]},  # {digest}', file=sys.stderr)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
