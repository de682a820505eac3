import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from sketch_perceptual.errors import InputError
from sketch_perceptual.lora import files as lora_files
from sketch_perceptual.lora.files import Layer

UNET = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
ENCODER = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


def layer(rank=2, alpha=8.0, magnitude=False):
    generator = torch.Generator().manual_seed(0)
    down, up, lengths = (torch.randn(size, generator=generator) for size in ((rank, 4), (4, rank), (4,)))
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
        ({"lora_alpha": 8, "alpha_pattern": {"^down_blocks.*to_out.0": 3, "to_out.0": 2}}, 3),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_out.0": 2}}, 2),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn2.to_out.0": 2}, "text_encoder.lora_alpha": 3}, 8),
    ],
)
def test_alphas_are_those_that_peft_would_take(config, alpha, tmp_path):
    tensors = {f"{UNET}.lora_A.weight": torch.ones(4, 4), f"{UNET}.lora_B.weight": torch.ones(4, 4)}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    assert lora_files.read(tmp_path / "a.safetensors").layers[UNET].alpha == alpha


def test_hashes_are_those_of_sd_scripts(tmp_path):
    """Of the file as the library writes it with the `ss_*` metadata alone."""
    big = Layer(torch.randn(64, 1280), torch.randn(1280, 64), 64.0)
    metadata = {"ss_output_name": "füchse", "modelspec.title": "other"}
    lora_files.write_kohya(tmp_path / "a.safetensors", {UNET: big}, metadata)
    shown = lora_files.read(tmp_path / "a.safetensors").metadata
    data = save(load_file(tmp_path / "a.safetensors"), {k: v for k, v in shown.items() if k.startswith("ss_")})
    plain = lora_files.to_bytes(load_file(tmp_path / "a.safetensors"), shown)
    start = 8 + int.from_bytes(data[:8], "little")
    assert len(data) - start == len(plain) - 8 - int.from_bytes(plain[:8], "little")
    assert shown["sshs_model_hash"] == lora_files.hashlib.sha256(data[start:]).hexdigest()
    assert shown["sshs_legacy_hash"] == lora_files.hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]


def two(module, down=(2, 4), up=(4, 2)):
    """The tensors of a LoRA of rank 2, of ones."""
    return {f"{module}.lora_down.weight": torch.ones(down), f"{module}.lora_up.weight": torch.ones(up)}


KOHYA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
GOOD = two(KOHYA)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_down.weight": torch.full((2, 4), torch.nan)}, "down has values that are NaN"),
        ({"lora_up.weight": torch.full((4, 2), torch.inf).half()}, "up has values that are NaN or infinite"),
        ({"lora_up.weight": torch.ones(4, 3)}, r"down of \(2, 4\) and up of \(4, 3\)"),
        ({"lora_up.weight": torch.ones(4, 2, 1, 1)}, r"up of \(4, 2, 1, 1\)"),
        ({"lora_up.weight": torch.ones(4)}, r"up of \(4,\)"),
        ({"lora_down.weight": torch.ones(0, 4), "lora_up.weight": torch.ones(4, 0)}, "empty"),
        ({"lora_down.weight": torch.ones(2, 4, 3, 3), "lora_up.weight": torch.ones(4, 2, 1, 1)}, "no kernel"),
        ({"lora_down.weight": torch.ones(2, 4, dtype=torch.int8)}, "down is int8"),
        ({"lora_down.weight": torch.ones(2, 4, dtype=torch.complex64)}, "down is complex64"),
        ({"lora_down.weight": torch.ones(2, 4, dtype=torch.bool)}, "down is bool"),
        ({"alpha": torch.tensor(torch.nan)}, "alpha is nan"),
        ({"alpha": torch.tensor(1e9).half()}, "alpha is inf"),
        ({"alpha": torch.tensor(0)}, "alpha is 0"),
        ({"alpha": torch.ones(2)}, r"alpha is not a number but float32 of \(2,\)"),
        ({"alpha": torch.tensor(True)}, "alpha is not a number but bool"),
        ({"dora_scale": torch.ones(3, 1)}, r"magnitudes of \(3,\)"),
        ({"dora_scale": torch.ones(1, 4)}, "DoRA of columns"),
        ({"lora_down.weight": torch.ones(2, 5)}, "to_q has a width of 4, but .*to_q fits 5"),
    ],
)
def test_a_layer_that_is_not_sound_is_refused(change, message):
    tensors = GOOD | {f"{KOHYA}.{name}": tensor for name, tensor in change.items()}
    with pytest.raises(InputError, match=rf"unet\.down_blocks\.0\..*{message}"):
        lora_files.to_layers(tensors)


@pytest.mark.parametrize("alpha", [torch.tensor([3.0]), torch.tensor(3), torch.tensor(3.0).half()])
def test_alphas_of_any_number_are_read(alpha):
    assert next(iter(lora_files.to_layers(GOOD | {f"{KOHYA}.alpha": alpha}).values())).alpha == 3


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bits_are_widened(dtype):
    (layer,) = lora_files.to_layers({key: (tensor / 8).to(dtype) for key, tensor in GOOD.items()}).values()
    assert layer.up.dtype == torch.float32 and torch.equal(layer.up, torch.full((4, 2), 0.125))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (KOHYA, UNET.replace("to_out.0", "to_q")),
        (KOHYA, "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", "lora_te1_text_model_encoder_layers_0_mlp_fc1"),
    ],
)
def test_a_module_under_two_names_is_refused(first, second):
    with pytest.raises(InputError, match=f"twice.*{first}.*{second}"):
        lora_files.to_layers(two(first) | two(second))


SD1, SD2 = (320, 768, 3072), (320, 1024, 4096)
ATTENTION = "lora_unet_{}_attentions_0_transformer_blocks_0_{}"
TEXT_MLP = "lora_te_text_model_encoder_layers_22_mlp_fc1"


def model(block, text, mlp):
    names = ATTENTION.format("down_blocks_0", "{}")
    widths = {"attn1_to_q": (block, block), "attn2_to_k": (text, block), "ff_net_0_proj": (block, 8 * block)}
    tensors = {}
    for name, (before, after) in widths.items():
        tensors |= two(names.format(name), (2, before), (after, 2))
    return tensors | two(TEXT_MLP, (2, text), (mlp, 2))


@pytest.mark.parametrize("widths", [SD1, SD2, (8, 12, 20), (32, 768, 3072)])
def test_widths_of_stable_diffusion_and_of_small_models_are_read(widths):
    assert len(lora_files.to_layers(model(*widths))) == 4


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (model(*SD1) | two(TEXT_MLP, (2, 1024), (4096, 2)), "attn2.to_k has a width of 768, but text_.* fits 1024"),
        (model(320, 2048, 3072), " 2048, .* 1024 "),
        (model(2560, 768, 3072), " 2560, .* 1280 "),
        (two(KOHYA, (320, 4), (4, 320)), "to_q has a rank of 320: .* transposed"),
        (GOOD | two(KOHYA.replace("to_q", "to_v"), (2, 6), (6, 2)), "to_v has a width of 6, but .*to_q fits 4"),
        (two(ATTENTION.format("mid_block", "ff_net_0_proj"), (2, 4), (31, 2)), "a width of 31, but .* fits 32"),
    ],
)
def test_widths_of_no_model_are_refused(tensors, message):
    with pytest.raises(InputError, match=message):
        lora_files.to_layers(tensors)


@pytest.mark.parametrize("alpha", [1.0, 1e9, -4.0, 3.0])
def test_folding_loses_nothing_in_half_precision(alpha):
    """What `alpha / rank * up` is in float32; of 128 ranks, half of these `up` would be 0 in float16."""
    up = torch.randn(4, 128, generator=torch.Generator().manual_seed(0)) * 1e-5
    small = Layer(torch.ones(128, 4).half(), up.half(), alpha)
    assert torch.equal(small.folded().up.float(), small.up.float() * (alpha / 128))
    assert alpha != 1 or ((small.up * (alpha / 128)) == 0)[small.up != 0].float().mean() > 0.3


def test_what_half_precision_holds_stays_in_it():
    assert layer_in_half(alpha=8.0).folded().up.dtype == torch.float16
    assert layer_in_half(alpha=3.0).folded().up.dtype == torch.float32


def layer_in_half(**options):
    full = layer(**options)
    return replace(full, down=full.down.half(), up=full.up.half())


def test_layers_get_the_common_alpha_of_their_model():
    names = [UNET, UNET.replace("to_out.0", "to_q"), UNET.replace("to_out.0", "to_k")]
    layers = {names[0]: layer(3, 6.0), names[1]: layer(2, 4.0), names[2]: layer(2, 4.0), ENCODER: layer(2, 1.0)}
    common = lora_files.with_common_alphas(layers)
    assert [common[name].alpha for name in (*names, ENCODER)] == [4, 4, 4, 1]
    for name, expected in layers.items():
        torch.testing.assert_close(change(common[name]), change(expected))
    assert torch.equal(common[names[1]].up, layers[names[1]].up)


def test_folding_that_overflows_is_refused():
    with pytest.raises(InputError, match="up has values that are NaN or infinite"):
        Layer(torch.ones(1, 4), torch.full((4, 1), 1e30), 1e30).folded()


def test_magnitudes_of_convolutions_have_the_shapes_of_their_readers():
    conv = Layer(torch.ones(2, 4, 3, 3), torch.ones(4, 2, 1, 1), 2.0, torch.arange(4.0))
    module = "unet.mid_block.resnets.0.conv2"
    tensors = lora_files.to_tensors({module: conv})
    assert tensors[f"{module}.lora_magnitude_vector"].shape == (1, 4, 1, 1)
    kohya = lora_files.to_kohya({module: conv})
    assert kohya["lora_unet_mid_block_resnets_0_conv2.dora_scale"].shape == (4, 1, 1, 1)
    for written in (tensors, kohya):
        assert torch.equal(lora_files.to_layers(written)[module].magnitude, torch.arange(4.0))


def test_dora_of_some_modules_is_refused_where_diffusers_cannot_mix(tmp_path):
    layers = {UNET: layer(), UNET.replace("to_out.0", "to_q"): layer(magnitude=True)}
    with pytest.raises(InputError, match="is not DoRA"):
        lora_files.write_diffusers(tmp_path / "a.safetensors", layers)
    lora_files.write_kohya(tmp_path / "a.safetensors", layers, {})


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("lora_unet_mid_block_attentions_0_proj_in.hada_w1_a", "LoHa"),
        ("lora_unet_mid_block_attentions_0_proj_in.lokr_w1", "LoKr"),
        ("lora_unet_mid_block_attentions_0_proj_in.a1.weight", "GLoRA"),
        ("lora_unet_mid_block_attentions_0_proj_in.oft_blocks", "OFT"),
        ("lora_unet_mid_block_attentions_0_proj_in.on_input", "IA3"),
        ("lora_unet_mid_block_resnets_0_conv1.lora_mid.weight", "Tucker"),
        ("lora_unet_mid_block_resnets_0_norm1.w_norm", "norms"),
        ("lora_unet_mid_block_resnets_0_conv1.diff", "full differences"),
        ("lora_unet_mid_block_resnets_0_conv1.diff_b", "biases"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "SDXL"),
        ("unet.mid_block.attentions.0.transformer_blocks.1.attn1.to_q.lora.down.weight", "SDXL"),
        ("lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q.lora_down.weight", "SDXL"),
        ("lora_unet_joint_blocks_0_x_block_mlp_fc1.lora_down.weight", "SD-3"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "diffusion transformer"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "FLUX"),
        ("lora_unet_double_blocks_0_img_attn_proj.lora_down.weight", "FLUX"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "language model"),
        ("emb_params", "textual inversion"),
        ("string_to_param.*", "textual inversion"),
        ("model.diffusion_model.input_blocks.0.0.weight", "whole model"),
        ("down_blocks.0.resnets.0.conv1.weight", "whole model"),
    ],
)
def test_other_kinds_are_named(key, kind):
    for tensors in ({key: torch.ones(1, 1)}, GOOD | {key: torch.ones(1, 1)}):
        with pytest.raises(InputError, match=f"{kind}.*{re.escape(key)}$"):
            lora_files.to_layers(tensors)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"conv.weight": torch.ones(1)}, ": conv.weight$"),
        ({}, ": no weights$"),
        ({f"{UNET}.lora_A.weight": torch.ones(1, 1)}, f"{UNET}: up of the LoRA is missing"),
        ({f"{UNET}.alpha": torch.ones(1)}, "down and up of the LoRA is missing"),
        ({"\x1b[2Ja\nb": torch.ones(1)}, r": \\x1b\[2Ja\\nb$"),
        ({"": torch.ones(1)}, ": ''$"),
        (two(KOHYA, (), ()), r"down of \(\)"),
        (GOOD | {"x" * 5000: torch.ones(1)}, r": x{1000}\.\.\.$"),
        (GOOD | {f"n{index}": torch.ones(1) for index in range(99)}, "and 89 more$"),
    ],
)
def test_what_is_not_known_is_refused_by_name(tensors, message, tmp_path):
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=f"a.safetensors cannot be used: .*{message}"):
        lora_files.read(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", r"is \[1\], not a configuration"),
        ('{"unet.alpha_pattern": ["to_q"]}', r"alpha_pattern is \['to_q'\]"),
        ('{"unet.alpha_pattern": {"(": 1}}', "'\\(' is not a regular expression"),
        ('{"unet.alpha_pattern": {"(.*a)*b": 1}}', "repeats too much"),
        ('{"unet.alpha_pattern": {".*.*.*.*.*x": 1}}', "repeats too much"),
        ('{"unet.alpha_pattern": {"to_q": "2"}}', "alpha of '2'"),
        ('{"unet.lora_alpha": true}', "alpha of True"),
        ('{"unet.lora_alpha": NaN}', "alpha is nan"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused(config, message, tmp_path):
    save_file(GOOD, tmp_path / "a.safetensors", {"lora_adapter_metadata": config})
    with pytest.raises(InputError, match=f"a.safetensors cannot be used: .*{message}"):
        lora_files.read(tmp_path / "a.safetensors")


def test_ranks_follow_from_the_weights_whatever_the_configuration_says(tmp_path):
    save_file(GOOD, tmp_path / "a.safetensors", {"lora_adapter_metadata": '{"unet.rank_pattern": {"(": 7}}'})
    assert [layer.rank for layer in lora_files.read(tmp_path / "a.safetensors").layers.values()] == [2]


def test_bundled_embeddings_are_left_out_and_named(tmp_path):
    bundled = {"bundle_emb.<fox>.string_to_param.*": torch.ones(1, 4), "bundle_emb.v1.5.clip_l": torch.ones(1, 4)}
    save_file(GOOD | bundled, tmp_path / "a.safetensors")
    file = lora_files.read(tmp_path / "a.safetensors")
    assert len(file.layers) == 1 and file.is_kohya
    assert file.notes == ("the embedding <fox> is left out", "the embedding v1.5 is left out")
    save_file(bundled, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="a textual inversion"):
        lora_files.read(tmp_path / "a.safetensors")


@pytest.mark.parametrize("config", [None, {"lora_alpha": 8, "use_rslora": False, "alpha_pattern": {"to_k": 3}}])
def test_pefts_adapters_take_their_alpha_from_the_file_beside(config, tmp_path):
    name = f"base_model.model.{UNET.removeprefix('unet.')}"
    tensors = {f"{name}.lora_A.default.weight": torch.ones(2, 4), f"{name}.lora_B.default.weight": torch.ones(4, 2)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    if config:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    file = lora_files.read(tmp_path)
    assert file.layers[UNET].alpha == (8 if config else 2)
    assert bool(file.notes) == (config is None) and all("alpha" in note for note in file.notes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no", "header"),
        ("", "header"),
        ("PK\3\4", "a pickle, .*save_file"),
        ("version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("<!DOCTYPE html>", "a web page"),
        (None, "No such file"),
    ],
)
def test_a_file_that_is_none_is_refused(content, message, tmp_path):
    if content is not None:
        (tmp_path / "a.safetensors").write_text(content)
    with pytest.raises(InputError, match=f"a.safetensors cannot be read: .*{message}"):
        lora_files.read(tmp_path / "a.safetensors")


def test_a_folder_is_read_if_it_leaves_no_choice(tmp_path):
    with pytest.raises(InputError, match="a folder without a LoRA"):
        lora_files.read(tmp_path)
    save_file(GOOD, tmp_path / "fox.safetensors")
    assert len(lora_files.read(tmp_path).layers) == 1
    save_file(GOOD, tmp_path / "cat.safetensors")
    with pytest.raises(InputError, match=r"cat\.safetensors, fox\.safetensors"):
        lora_files.read(tmp_path)
    save_file(model(*SD1), tmp_path / "pytorch_lora_weights.safetensors")
    assert len(lora_files.read(tmp_path).layers) == 4
    save_file(GOOD, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"pytorch_lora_weights.*adapter_model"):
        lora_files.read(tmp_path)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "a.safetensors").write_text("before")
    monkeypatch.setattr("os.replace", lambda *paths: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lora_files.write_kohya(tmp_path / "a.safetensors", {UNET: layer()}, {})
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


def test_layers_are_compared_with_a_model():
    encoder = torch.nn.ModuleDict({"text_model": torch.nn.Module()})
    encoder.text_model.encoder = torch.nn.ModuleDict({"q": torch.nn.Linear(4, 4)})
    fitting, wide = layer(), Layer(torch.ones(2, 5), torch.ones(4, 2), 2.0)
    name = "text_encoder.text_model.encoder.q"
    lora_files.check_model({name: fitting}, {"text_encoder": encoder})
    lora_files.check_model({name: fitting}, {"text_encoder": encoder.text_model})  # transformers 5.6
    with pytest.raises(InputError, match=r"encoder.q is \(4, 4\) in the model, \(4, 5\) in the LoRA"):
        lora_files.check_model({name: wide}, {"text_encoder": encoder})
    for module in (f"{name}.0", UNET):
        with pytest.raises(InputError, match=f"the model has no {module}"):
            lora_files.check_model({module: fitting}, {"text_encoder": encoder})
