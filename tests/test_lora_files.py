import json

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from sketch_perceptual import lora_files
from sketch_perceptual.errors import InputError
from sketch_perceptual.lora_files import Layer

UNET = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
ENCODER = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


def layer(rank=2, alpha=8.0, magnitude=False):
    generator = torch.Generator().manual_seed(0)
    down, up, lengths = (torch.randn(size, generator=generator) for size in ((rank, 6), (4, rank), (4,)))
    return Layer(down, up, alpha, lengths if magnitude else None)


def change(layer):
    return layer.alpha / layer.rank * layer.up @ layer.down


@pytest.mark.parametrize("write", [lora_files.write_diffusers, lora_files.write_kohya])
def test_what_is_written_is_read(write, tmp_path):
    layers = {UNET: layer(), UNET.replace("to_out.0", "to_q"): layer(3, 1.5), ENCODER: layer(1, 0.5, magnitude=True)}
    write(tmp_path / "a.safetensors", layers, {"ss_steps": "4"})
    file = lora_files.read(tmp_path / "a.safetensors")
    found = file.layers
    assert file.metadata["ss_steps"] == "4" and file.is_kohya == (write is lora_files.write_kohya)
    assert found.keys() == layers.keys()
    for name, expected in layers.items():
        assert found[name].alpha == expected.alpha
        assert torch.equal(found[name].down, expected.down) and torch.equal(found[name].up, expected.up)
        assert (found[name].magnitude is None) == (expected.magnitude is None)
    assert torch.equal(found[ENCODER].magnitude, layers[ENCODER].magnitude)


def test_folding_keeps_the_change():
    folded = layer(alpha=5.0).folded()
    assert folded.alpha == folded.rank == 2
    torch.testing.assert_close(change(folded), change(layer(alpha=5.0)))


def test_names_of_both_forms():
    layers = {UNET: layer(), ENCODER: layer(magnitude=True)}
    assert sorted(lora_files.to_tensors(layers)) == [
        f"{ENCODER}.lora_linear_layer.down.weight",
        f"{ENCODER}.lora_linear_layer.up.weight",
        f"{ENCODER}.lora_magnitude_vector.weight",
        f"{UNET}.lora.down.weight",
        f"{UNET}.lora.up.weight",
    ]
    kohya = lora_files.to_kohya(layers)
    assert kohya["lora_te_text_model_encoder_layers_0_self_attn_q_proj.dora_scale"].shape == (4, 1)
    assert kohya["lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0.alpha"] == 8


@pytest.mark.parametrize(("magnitude", "module"), [(False, "networks.lora"), (True, "lycoris.kohya")])
def test_kohyas_file_names_the_network_that_sd_scripts_can_read_it_with(magnitude, module, tmp_path):
    lora_files.write_kohya(tmp_path / "a.safetensors", {UNET: layer(), ENCODER: layer(magnitude=magnitude)}, {})
    assert lora_files.read(tmp_path / "a.safetensors").metadata["ss_network_module"] == module


def test_the_configuration_has_what_every_peft_knows_and_nothing_else(tmp_path):
    lora_files.write_diffusers(tmp_path / "a.safetensors", {UNET: layer(), ENCODER: layer(magnitude=True)})
    config = json.loads(lora_files.read(tmp_path / "a.safetensors").metadata["lora_adapter_metadata"])
    assert config == {
        "unet.r": 2,
        "unet.lora_alpha": 8,
        "unet.rank_pattern": {},
        "unet.alpha_pattern": {},
        "unet.target_modules": [UNET.removeprefix("unet.")],
        "text_encoder.r": 2,
        "text_encoder.lora_alpha": 8,
        "text_encoder.rank_pattern": {},
        "text_encoder.alpha_pattern": {},
        "text_encoder.target_modules": ["encoder.layers.0.self_attn.q_proj"],
        "text_encoder.use_dora": True,
    }


@pytest.mark.parametrize(
    ("config", "alpha"),
    [
        ({}, 4),
        ({"unet.r": 4, "unet.lora_alpha": 8}, 8),
        ({"unet.lora_alpha": 8, "unet.use_rslora": True}, 16),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_out.0": 2}}, 2),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn2.to_out.0": 2}, "text_encoder.lora_alpha": 3}, 8),
    ],
)
def test_alphas_are_those_that_peft_would_take(config, alpha, tmp_path):
    tensors = {f"{UNET}.lora_A.weight": torch.ones(4, 6), f"{UNET}.lora_B.weight": torch.ones(4, 4)}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    assert lora_files.read(tmp_path / "a.safetensors").layers[UNET].alpha == alpha


def test_hashes_are_those_of_sd_scripts(tmp_path):
    """Of the file as the library writes it with the `ss_*` metadata alone."""
    big = Layer(torch.randn(64, 3200), torch.randn(1280, 64), 64.0)
    metadata = {"ss_output_name": "füchse", "modelspec.title": "other"}
    lora_files.write_kohya(tmp_path / "a.safetensors", {UNET: big}, metadata)
    shown = lora_files.read(tmp_path / "a.safetensors").metadata
    data = save(load_file(tmp_path / "a.safetensors"), {k: v for k, v in shown.items() if k.startswith("ss_")})
    plain = lora_files.to_bytes(load_file(tmp_path / "a.safetensors"), shown)
    start = 8 + int.from_bytes(data[:8], "little")
    assert len(data) - start == len(plain) - 8 - int.from_bytes(plain[:8], "little")
    assert shown["sshs_model_hash"] == lora_files.hashlib.sha256(data[start:]).hexdigest()
    assert shown["sshs_legacy_hash"] == lora_files.hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj", "unet.mid_block.attentions.0."),
        ("lora_unet_up_blocks_1_resnets_0_time_emb_proj", "unet.up_blocks.1.resnets.0.time_emb_proj"),
        ("lora_unet_down_blocks_0_downsamplers_0_conv", "unet.down_blocks.0.downsamplers.0.conv"),
        ("lora_te_text_model_encoder_layers_11_mlp_fc1", "text_encoder.text_model.encoder.layers.11.mlp.fc1"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", ""),  # of SDXL
        ("lora_unet_input_blocks_4_1_proj_in", ""),
        ("lora_unet_double_blocks_0_img_attn_proj", ""),
    ],
)
def test_kohyas_names_are_modules(name, module):
    found = lora_files.module_name(name)
    assert found.startswith(module) and bool(found) == bool(module)
    assert not module or lora_files.kohya_name(found) == name


@pytest.mark.parametrize(
    "tensors",
    [
        {"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(1, 1)},
        {"lora_unet_mid_block_attentions_0_proj_in.hada_w1_a": torch.ones(1, 1)},
        {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(1, 1)},
        {f"{UNET}.lora_A.weight": torch.ones(1, 1)},
        {"conv.weight": torch.ones(1)},
        {},
    ],
)
def test_what_is_not_known_is_refused_by_name(tensors, tmp_path):
    save_file(tensors, tmp_path / "a.safetensors")
    name = next((key.removesuffix(".lora_A.weight") if UNET in key else key for key in tensors), "no weights")
    with pytest.raises(InputError, match=f"a.safetensors cannot be used: no LoRA of .* has .*{name.split('.')[-1]}"):
        lora_files.read(tmp_path / "a.safetensors")


def test_a_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "a.safetensors").write_text("no")
    for name in ("a.safetensors", "b.safetensors"):
        with pytest.raises(InputError, match=f"{name} cannot be read: "):
            lora_files.read(tmp_path / name)
