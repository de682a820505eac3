import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

from sketch_perceptual.lora.names import kohya_name, locate, module_name

ATTENTION = [
    *("norm", "proj_in", "proj_out", "transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.ff.net.2"),
    *(f"transformer_blocks.0.attn{i}.to_{x}" for i in (1, 2) for x in ("q", "k", "v", "out.0")),
]
RESNET = ["in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection"]


@pytest.fixture(scope="module")
def unet():
    """The modules of Stable Diffusion 1, narrower."""
    options = {"block_out_channels": [8, 16, 24, 24], "norm_num_groups": 4, "attention_head_dim": 2}
    return UNet2DConditionModel(**options, cross_attention_dim=16, sample_size=8)


def modules(unet):
    return {f"unet.{n}" for n, m in unet.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}


def test_every_module_has_a_name_of_kohyas(unet):
    assert len(modules(unet)) == 282
    for module in modules(unet):
        assert module_name(module) == module_name(kohya_name(module)) == module


def original_names():
    yield from ("input_blocks.0.0", "out.0", "out.2", "time_embed.0", "time_embed.2")
    yield from (f"input_blocks.{i}.0.op" for i in (3, 6, 9))
    yield from ("output_blocks.2.1.conv", "output_blocks.5.2.conv", "output_blocks.8.2.conv")
    resnets = [f"input_blocks.{i}.0" for i in (1, 2, 4, 5, 7, 8, 10, 11)] + ["middle_block.0", "middle_block.2"]
    yield from (f"{name}.{x}" for name in [*resnets, *(f"output_blocks.{i}.0" for i in range(12))] for x in RESNET)
    attentions = [f"input_blocks.{i}.1" for i in (1, 2, 4, 5, 7, 8)] + ["middle_block.1"]
    yield from (
        f"{name}.{x}" for name in [*attentions, *(f"output_blocks.{i}.1" for i in range(3, 12))] for x in ATTENTION
    )


def test_names_of_the_original_model_are_those_that_diffusers_gives_them(unet):
    names = list(original_names())
    checkpoint = {
        f"model.diffusion_model.{n}.{x}": torch.tensor(i) for i, n in enumerate(names) for x in ("weight", "bias")
    }
    converted = convert_ldm_unet_checkpoint(checkpoint, unet.config)
    expected = {
        f"unet.{key.removesuffix('.weight')}": names[int(i)] for key, i in converted.items() if "weight" in key
    }
    assert modules(unet) < expected.keys()
    for module in modules(unet):
        name = expected[module]
        assert module_name(f"diffusion_model.{name}") == module
        assert module_name(f"model.diffusion_model.{name}") == module
        assert module_name(f"lora_unet_{name.replace('.', '_')}") == module


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("lora_te_text_model_encoder_layers_11_mlp_fc1", "text_encoder.text_model.encoder.layers.11.mlp.fc1"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "text_encoder.text_model.encoder.layers.0.mlp.fc1"),
        ("text_encoder.encoder.layers.0.mlp.fc1", "text_encoder.text_model.encoder.layers.0.mlp.fc1"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1", ""),
        ("lora_unet_text_model_encoder_layers_0_mlp_fc1", ""),
        ("lora_unet_double_blocks_0_img_attn_proj", ""),
        ("lora_unet_input_blocks_0_0_in_layers_2", ""),
        ("lora_unet_input_blocks_1_2_in_layers_2", ""),
        ("lora_unet_middle_block_3_in_layers_2", ""),
        ("unet.mid_block.attentions.00.proj_in", ""),
        ("unet.mid_block.attentions.1000.proj_in", ""),
        ("lora_unet_" + "9" * 10_000, ""),
        ("", ""),
    ],
)
def test_names_are_modules(name, module):
    assert module_name(name) == module


@pytest.mark.parametrize(
    "key",
    [
        "unet.{unet}.lora.down.weight",
        "unet.{unet}.lora_A.weight",
        "{unet}.lora_A.weight",
        "base_model.model.{unet}.lora_A.weight",
        "base_model.model.{unet}.lora_A.default.weight",
        "unet.{processor}_lora.down.weight",
        "{processor}_lora.down.weight",
        "text_encoder.text_model.{text}.lora_linear_layer.down.weight",
        "text_encoder.text_model.{old_text}_lora.down.weight",
        "text_encoder.{text}.lora_A.weight",
        "base_model.model.text_model.{text}.lora_A.weight",
        "base_model.model.{text}.lora_A.weight",
        "text_encoders.clip_l.transformer.text_model.{text}.lora_down.weight",
    ],
)
def test_keys_of_every_trainer_are_located(key):
    block = "mid_block.attentions.0.transformer_blocks.0.attn1"
    names = {
        "unet": f"{block}.to_out.0",
        "processor": f"{block}.processor.to_out",
        "text": "encoder.layers.0.self_attn.out_proj",
        "old_text": "encoder.layers.0.self_attn.to_out",
    }
    module = f"text_encoder.text_model.{names['text']}" if "text" in key else f"unet.{names['unet']}"
    assert locate(key.format(**names)) == (module, "down")
