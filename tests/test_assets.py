"""What ships with the package."""

import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from sketch_perceptual.data.images import to_tensor
from sketch_perceptual.drawings import CLASSES, draw
from sketch_perceptual.losses import PerceptualLoss, build_loss, check_loss
from sketch_perceptual.networks.backbone import BUNDLED, load_backbone

TINY_SD = BUNDLED.parent / "tiny-sd"


def test_the_tiny_pipeline_loads_plainly_and_draws_in_colour():
    pipeline = StableDiffusionPipeline.from_pretrained(TINY_SD)
    pipeline.set_progress_bar_config(disable=True)
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.float32}
    draw = torch.Generator().manual_seed(0)
    boat, tree = pipeline(["a photo of a boat", "a photo of a tree"], num_inference_steps=10, generator=draw).images
    assert boat.size == (128, 128)
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


def test_the_bundled_backbone_is_sketch_tuned_attention_to_relu4_3():
    backbone = load_backbone()
    assert (backbone.attention, backbone.last_layer) == ("cbam", "relu4_3")
    assert {weight.dtype for weight in backbone.parameters()} == {torch.float32}


def test_the_bundled_loss_keeps_the_contract_and_prefers_the_same_subject():
    loss = build_loss("attention_vgg")
    check_loss(loss)
    assert {type(loss), type(PerceptualLoss())} == {PerceptualLoss}
    drawings = [to_tensor(draw(name, index, 0, "pen", 96)) for name in CLASSES for index in (0, 1)]
    first, second = torch.stack(drawings[::2]), torch.stack(drawings[1::2])
    same, other = loss(first, second), loss(first, second.roll(1, 0))
    assert (same < other).float().mean() > 0.6
    assert loss(first, first).max() == 0


def test_assets_stay_small():
    for folder, limit in ((TINY_SD, 14e6), (BUNDLED, 16e6)):
        assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= limit
