import re

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import save_file

from sketch_perceptual.diffusion import Latents
from sketch_perceptual.errors import InputError
from sketch_perceptual.lora.prompts import cycle_prompts
from sketch_perceptual.lora.sampling import draw_prompts, load_adapter
from sketch_perceptual.measures.ink import is_black

SETTINGS = {"seed": 3, "resolution": 32, "num_inference_steps": 2, "guidance_scale": 2.0}


@pytest.fixture
def pipeline(tiny_sd):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


@torch.no_grad()
def test_a_lora_of_any_trainer_is_loaded(pipeline, tmp_path):
    """PEFT's own names, which diffusers does not read, and an alpha from the configuration beside."""
    module = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    weight = pipeline.unet.get_submodule(module).weight.clone()
    key = f"base_model.model.{module}.lora_{{}}.weight"
    down, up = torch.randn(2, weight.shape[1]), torch.randn(len(weight), 2)
    save_file({key.format("A"): down, key.format("B"): up}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 6}')
    load_adapter(pipeline, str(tmp_path))
    pipeline.fuse_lora()
    changed = pipeline.unet.get_submodule(module).base_layer.weight
    torch.testing.assert_close(changed, weight + 3 * up @ down)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"down": torch.ones(2, 24), "up": torch.ones(24, 2)},
            r"to_q is \(16, 16\) in the model, \(24, 24\) in the LoRA",
        ),
        ({"down": torch.full((2, 16), torch.nan), "up": torch.ones(16, 2)}, "down has values that are NaN"),
    ],
)
def test_a_lora_that_does_not_fit_or_is_damaged_is_refused(tensors, message, pipeline, tmp_path):
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora.{}.weight"
    save_file({name.format(part): tensor for part, tensor in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=f"`models` .*a.safetensors does not load .*{message}"):
        load_adapter(pipeline, str(tmp_path / "a.safetensors"))


def test_a_picture_follows_from_its_prompt_and_number_alone(pipeline, tmp_path):
    prompts = cycle_prompts(["a fox", "an owl"], 3)
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    draw_prompts(pipeline, prompts, paths, **SETTINGS)
    draw_prompts(pipeline, prompts[2:], [tmp_path / "alone.png"], **SETTINGS)
    assert abs(pixels(tmp_path / "alone.png") - pixels(paths[2])).max() <= 1
    assert abs(pixels(paths[0]) - pixels(paths[2])).max() > 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.png", "1.png", "2.png", "alone.png"]


def test_what_is_flagged_or_not_finite_is_black(pipeline, tmp_path, monkeypatch):
    pipeline.safety_checker = pipeline.unet  # any network: what it would say is said below
    monkeypatch.setattr(
        pipeline, "run_safety_checker", lambda images, device, dtype: (images, [True] + [False] * (len(images) - 1))
    )

    decode = Latents.decode

    def overflow(self, latents):
        images = decode(self, latents)
        images[1, 0, 0, 0] = torch.inf
        return images

    monkeypatch.setattr(Latents, "decode", overflow)
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    draw_prompts(pipeline, cycle_prompts(["a"], 3), paths, **SETTINGS)
    assert [is_black(Image.open(path)) for path in paths] == [True, True, False]


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\0" * 8])
def test_a_damaged_lora_is_named(pipeline, tmp_path, content):
    path = tmp_path / "lora.safetensors"
    path.write_bytes(content)
    for source in (path, tmp_path):
        with pytest.raises(InputError, match=re.escape(f"`models` {source} does not load")):
            load_adapter(pipeline, str(source))


def test_a_lora_that_is_not_there_is_not_blamed_on_its_name(pipeline):
    with pytest.raises(InputError, match="`models` no/such does not load") as error:
        load_adapter(pipeline, "no/such")
    assert "weight_name" not in str(error.value)
