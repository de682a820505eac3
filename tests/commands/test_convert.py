import json
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file, save_file

from sketch_perceptual.commands.convert import main
from sketch_perceptual.lora import files as lora_files

pytestmark = pytest.mark.usefixtures("signals")

TARGETS = {"unet": ["to_q", "to_out.0", "proj_in", "ff.net.2"], "text_encoder": ["q_proj", "out_proj", "fc1"]}


def load(folder, lora=None, unet=None, **options):
    """A fresh pipeline, with a LoRA if one is given, and what it predicts."""
    models = {} if unet is None else {"unet": UNet2DConditionModel.from_config(unet.config)}
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, **models)
    if unet is not None:
        pipeline.unet.load_state_dict(unet.state_dict())
    if lora is not None:
        pipeline.load_lora_weights(lora.parent, weight_name=lora.name, **options)
    return pipeline, predict(pipeline.unet, pipeline.text_encoder)


@torch.no_grad()
def predict(unet, text_encoder):
    embeds = text_encoder(torch.arange(77)[None])[0]
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return torch.cat([unet(latents, 200, embeds)[0].flatten(), embeds.flatten()])


def assert_close(prediction, expected):
    torch.testing.assert_close(prediction, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module", params=[{}, {"use_rslora": True}])
def adapter(request, tiny_sd, tmp_path_factory):
    """A LoRA as diffusers and PEFT save it, with the whole configuration, and what a pipeline with it predicts."""
    folder = tmp_path_factory.mktemp("adapter")
    pipeline, _ = load(tiny_sd)
    saved = {}
    torch.manual_seed(0)
    for name, targets in TARGETS.items():
        model = getattr(pipeline, name)
        config = LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=targets, **request.param)
        inject_adapter_in_model(config, model)
        weights = get_peft_model_state_dict(model, adapter_name="default")
        saved[f"{name}_lora_layers"] = weights if name == "unet" else convert_state_dict_to_diffusers(weights)
        saved[f"{name}_lora_adapter_metadata"] = config.to_dict()
    StableDiffusionPipeline.save_lora_weights(folder, **saved)
    path = folder / "pytorch_lora_weights.safetensors"
    return path, load(tiny_sd, path)[1]


def test_both_forms_predict_the_same(adapter, tiny_sd, tmp_path, capsys):
    source, expected = adapter
    main([str(source), str(tmp_path / "kohya.safetensors")])
    main([str(tmp_path / "kohya.safetensors"), str(tmp_path / "back.safetensors")])
    modules = len(load_file(source)) // 2
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path / 'kohya.safetensors'}: {modules} modules in the names of kohya",
        f"{tmp_path / 'back.safetensors'}: {modules} modules in the names of diffusers",
    ]
    assert lora_files.read(tmp_path / "back.safetensors").metadata["ss_output_name"] == "kohya"
    assert (load(tiny_sd)[1] - expected).abs().max() > 1e-2
    for name in ("back.safetensors", "kohya.safetensors"):
        assert_close(load(tiny_sd, tmp_path / name)[1], expected)


def both_ways(source, folder):
    """The converted file, and that one converted again."""
    names = [folder / "once.safetensors", folder / "twice.safetensors"]
    main([str(source), str(names[0])])
    main([str(names[0]), str(names[1])])
    return names


def some_layers(pipeline, prefixes=("unet.", "text_encoder."), ranks=(2, 3)):
    """Random layers, of the ranks of self and cross attention, for the attention of a pipeline.

    They have one alpha: of several, diffusers counts only the most common where it reads kohya's names.
    """
    rng, layers = torch.Generator().manual_seed(0), {}
    for model, leaves in (("unet", ("to_q", "to_k", "to_out.0", "proj_in")), ("text_encoder", ("q_proj", "out_proj"))):
        for name, module in getattr(pipeline, model).named_modules():
            if name.endswith(leaves):
                name = name if model == "unet" else f"text_model.{name.removeprefix('text_model.')}"
                out, inputs, *kernel = module.weight.shape
                rank = ranks["attn2" in name]
                down = torch.randn(rank, inputs, *kernel, generator=rng)
                up = torch.randn(out, rank, *[1] * len(kernel), generator=rng) / 8
                layers[f"{model}.{name}"] = lora_files.Layer(down, up, 4.0)
    return {name: layer for name, layer in layers.items() if name.startswith(prefixes)}


def test_lora_te1_is_the_text_encoder(tiny_sd, tmp_path):
    lora_files.write_kohya(tmp_path / "te.safetensors", some_layers(load(tiny_sd)[0]), {})
    tensors = load_file(tmp_path / "te.safetensors")
    source = tmp_path / "te1.safetensors"
    save_file({key.replace("lora_te_", "lora_te1_"): tensor for key, tensor in tensors.items()}, source)
    expected = load(tiny_sd, source)[1]
    assert (load(tiny_sd)[1] - expected).abs().max() > 1e-2
    for path in both_ways(source, tmp_path):
        assert_close(load(tiny_sd, path)[1], expected)


def test_attention_processors_of_old_diffusers(tiny_sd, tmp_path):
    """The names before 0.22, which diffusers still reads; they have no alphas.

    They have one rank: diffusers 0.36 gives all layers the alpha of the most common one.
    """
    layers = {
        name: replace(layer, alpha=layer.rank)
        for name, layer in some_layers(load(tiny_sd)[0], ranks=(2, 2)).items()
        if "proj_in" not in name
    }
    tensors = {}
    for name, layer in layers.items():
        old = name.replace(".to_", ".processor.to_").replace("to_out.0", "to_out")
        old = old.replace("q_proj", "to_q").replace("out_proj", "to_out")
        tensors |= {f"{old}_lora.down.weight": layer.down, f"{old}_lora.up.weight": layer.up}
    source = tmp_path / "old.safetensors"
    save_file(tensors, source)
    expected = load(tiny_sd, source)[1]
    assert (load(tiny_sd)[1] - expected).abs().max() > 1e-2
    for path in both_ways(source, tmp_path):
        assert_close(load(tiny_sd, path)[1], expected)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}])
@pytest.mark.parametrize("model", ["unet", "text_encoder"])
def test_pefts_own_folder(model, options, tiny_sd, tmp_path):
    """DoRA in kohya's names is not computed by diffusers, so only the way back is compared."""
    pipeline, without = load(tiny_sd)
    torch.manual_seed(0)
    targets = {"unet": [*TARGETS["unet"], "conv1"], "text_encoder": TARGETS["text_encoder"]}[model]
    patterns = {"alpha_pattern": {"to_q|q_proj": 3, r".*\.fc1": 5}, "rank_pattern": {"to_q": 3}}
    config = LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=targets, **patterns, **options)
    adapted = get_peft_model(getattr(pipeline, model), config)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            weight.mul_(1.2 if "magnitude" in name else 1)
    adapted.save_pretrained(tmp_path / "peft")
    fresh = load(tiny_sd)[0]
    setattr(fresh, model, PeftModel.from_pretrained(getattr(fresh, model), tmp_path / "peft"))
    expected = predict(fresh.unet, fresh.text_encoder)
    assert (without - expected).abs().max() > 1e-2
    once, twice = both_ways(tmp_path / "peft", tmp_path)
    for path in (twice,) if "use_dora" in options else (once, twice):
        assert_close(load(tiny_sd, path)[1], expected)


@pytest.fixture(scope="module")
def unet():
    """A narrow one with the blocks of Stable Diffusion 1."""
    torch.manual_seed(0)
    options = {"block_out_channels": [8, 16, 24, 24], "norm_num_groups": 4, "attention_head_dim": 2}
    return UNet2DConditionModel(**options, cross_attention_dim=16, sample_size=8)


def original_name(module):
    """The original name of an attention module of a U-Net with two layers a block; the middle has one."""
    side, block, *rest = module.split(".")
    if side == "mid_block":
        return ".".join(["middle_block", "1", *rest[1:]])
    index = 3 * int(block) + int(rest[1]) + (side == "down_blocks")
    return ".".join([{"down_blocks": "input_blocks", "up_blocks": "output_blocks"}[side], str(index), "1", *rest[2:]])


@pytest.mark.slow
def test_names_of_the_original_model(tiny_sd, unet, tmp_path):
    """Those of kohya's trainers, which diffusers reads given the U-Net's configuration, and ComfyUI's with dots."""
    layers = some_layers(load(tiny_sd, unet=unet)[0], "unet.")
    kohya, comfy = tmp_path / "kohya_names.safetensors", tmp_path / "comfy.safetensors"
    tensors = {comfy: {}, kohya: {}}
    for name, layer in layers.items():
        dotted = original_name(name.removeprefix("unet."))
        parts = {"lora_down.weight": layer.down, "lora_up.weight": layer.up, "alpha": torch.tensor(layer.alpha)}
        tensors[comfy] |= {f"diffusion_model.{dotted}.{part}": tensor for part, tensor in parts.items()}
        underscored = f"lora_unet_{dotted.replace('.', '_')}"
        tensors[kohya] |= {f"{underscored}.{part}": tensor for part, tensor in parts.items()}
    for path, of_path in tensors.items():
        save_file(of_path, path)
    _, expected = load(tiny_sd, kohya, unet, unet_config=unet.config)
    assert (load(tiny_sd, unet=unet)[1] - expected).abs().max() > 1e-2
    for path in both_ways(kohya, tmp_path):
        assert_close(load(tiny_sd, path, unet)[1], expected)
    for name, layer in lora_files.read(comfy).layers.items():
        assert torch.equal(layer.up, layers[name].up) and torch.equal(layer.down, layers[name].down)
        assert layer.alpha == layers[name].alpha


@torch.no_grad()
def test_dora_of_lycoris_is_what_diffusers_computes(tiny_sd, tmp_path):
    """LyCORIS' `dora_scale` of (out, 1, ...) is the length of each row of the changed weight."""
    pipeline, without = load(tiny_sd)
    layers = {}
    for name, layer in some_layers(pipeline, "unet.").items():
        if "resnets" not in name and "attn2" not in name:
            module = pipeline.unet.get_submodule(name.removeprefix("unet."))
            weight = module.weight + 2 * (layer.up.flatten(1) @ layer.down.flatten(1)).view(module.weight.shape)
            lengths = weight.flatten(1).norm(dim=1)
            wanted = lengths * torch.linspace(0.5, 1.5, len(lengths))
            layers[name] = replace(layer, magnitude=wanted)
            scale = (wanted / lengths).view(-1, *[1] * (weight.ndim - 1))
            module.weight.copy_(weight * scale)
    expected = predict(pipeline.unet, pipeline.text_encoder)
    assert (without - expected).abs().max() > 1e-2
    assert {layer.up.ndim for layer in layers.values()} == {2, 4}
    lora_files.write_kohya(tmp_path / "lycoris.safetensors", layers, {})
    main([str(tmp_path / "lycoris.safetensors"), str(tmp_path / "diffusers.safetensors")])
    assert_close(load(tiny_sd, tmp_path / "diffusers.safetensors")[1], expected)


def test_half_precision_changes_as_much_afterwards(tiny_sd, tmp_path):
    """Of 128 ranks with alpha 1, what is small would be 0 if it were folded in float16."""
    layers = {
        name: lora_files.Layer(
            layer.down.repeat(64, *[1] * (layer.down.ndim - 1)).half(),
            (layer.up.repeat(1, 64, *[1] * (layer.up.ndim - 2)) * 1e-5).half(),
            1.0,
        )
        for name, layer in some_layers(load(tiny_sd)[0]).items()
    }
    lora_files.write_kohya(tmp_path / "half.safetensors", layers, {})
    main([str(tmp_path / "half.safetensors"), str(tmp_path / "folded.safetensors")])
    folded = lora_files.read(tmp_path / "folded.safetensors").layers
    for name, layer in layers.items():
        assert torch.equal(folded[name].up.float(), layer.up.float() * (1 / layer.rank))


LAYER = lora_files.Layer(torch.ones(1, 2), torch.ones(2, 1), 1.0)


@pytest.fixture
def folder(tmp_path):
    lora_files.write_diffusers(tmp_path / "a.safetensors", {"unet.mid_block.attentions.0.proj_in": LAYER})
    (tmp_path / "there.safetensors").write_text("before")
    return tmp_path


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["none.safetensors", "b.safetensors"], "none.safetensors cannot be read"),
        (["a.safetensors", "a.safetensors", "--overwrite"], "a.safetensors, which is read: choose another name"),
        (["a.safetensors", "nowhere/b.safetensors"], "b.safetensors cannot be written: there is no folder"),
        (["a.safetensors", "there.safetensors"], "there.safetensors exists: .*--overwrite"),
        (["a.safetensors", "b.bin"], "b.bin must end in .safetensors"),
    ],
)
def test_mistakes_are_explained_in_a_sentence(names, message, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    before = sorted(folder.iterdir())
    with pytest.raises(SystemExit) as exit:
        main(names)
    assert exit.value.code == 2
    assert pytest.approx(1) == len([line for line in capsys.readouterr().err.splitlines() if "error: " in line])
    assert sorted(folder.iterdir()) == before and (folder / "there.safetensors").read_text() == "before"


def test_an_output_is_replaced_when_asked_to(folder):
    main([str(folder / "a.safetensors"), str(folder / "there.safetensors"), "--overwrite"])
    assert len(lora_files.read(folder / "there.safetensors").layers) == 1


def test_nothing_is_written_that_cannot_be_read_again(folder, monkeypatch):
    """A damage on the way is found before the old file is replaced."""
    monkeypatch.setattr(lora_files, "to_kohya", lambda layers: {"lora_unet_conv_in.alpha": torch.ones(1)})
    before = sorted(folder.iterdir())
    with pytest.raises(SystemExit):
        main([str(folder / "a.safetensors"), str(folder / "there.safetensors"), "--overwrite"])
    assert sorted(folder.iterdir()) == before and (folder / "there.safetensors").read_text() == "before"


def test_what_is_left_out_or_assumed_is_printed(folder, capsys):
    tensors = load_file(folder / "a.safetensors") | {"bundle_emb.fox.clip_l": torch.ones(1, 2)}
    save_file(tensors, folder / "bundled.safetensors")
    main([str(folder / "bundled.safetensors"), str(folder / "b.safetensors")])
    assert "embedding fox" in capsys.readouterr().out
    key = "base_model.model.mid_block.attentions.0.proj_in.lora_{}.weight"
    save_file({key.format("A"): LAYER.down, key.format("B"): LAYER.up}, folder / "peft.safetensors")
    main([str(folder / "peft.safetensors"), str(folder / "c.safetensors")])
    assert "adapter_config.json" in capsys.readouterr().out
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 3}))
    main([str(folder / "peft.safetensors"), str(folder / "d.safetensors")])
    assert "adapter_config.json" not in capsys.readouterr().out
    (layer,) = lora_files.read(folder / "d.safetensors").layers.values()
    assert layer.alpha == 3
