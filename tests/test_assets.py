"""What ships with the package."""

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

import sketch_perceptual
from sketch_perceptual.drawings import CLASSES

TINY_SD = Path(sketch_perceptual.__file__).parent / "assets" / "tiny-sd"


def test_the_tiny_pipeline_loads_plainly_and_draws_in_colour():
    pipeline = StableDiffusionPipeline.from_pretrained(TINY_SD)
    pipeline.set_progress_bar_config(disable=True)
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.float32}
    draw = torch.Generator().manual_seed(0)
    boat, tree = pipeline(["a photo of a boat", "a photo of a tree"], num_inference_steps=10, generator=draw).images
    assert boat.size == (64, 64)
    for image in (boat, tree):
        saturation = image.convert("HSV").getchannel("S").resize((1, 1)).getpixel((0, 0))
        assert saturation > 40
    assert boat.tobytes() != tree.tobytes()
    words = [pipeline.tokenizer(f"a sketch of a {name}").input_ids for name in CLASSES]
    assert {len(ids) for ids in words} == {7}


def test_transformers_4_finds_the_text_encoder():
    with safe_open(TINY_SD / "text_encoder" / "model.safetensors", "pt") as weights:
        assert all(name.startswith("text_model.") for name in weights.keys())  # noqa: SIM118
    assert {"vocab.json", "merges.txt"} <= {path.name for path in (TINY_SD / "tokenizer").iterdir()}


def test_assets_stay_small():
    sizes = [path.stat().st_size for path in TINY_SD.rglob("*") if path.is_file()]
    assert sum(sizes) <= 14e6
