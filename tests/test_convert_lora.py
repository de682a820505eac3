import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file

from sketch_perceptual import lora_files
from sketch_perceptual.convert_lora import main

pytestmark = pytest.mark.usefixtures("signals")

TARGETS = {"unet": ["to_q", "to_out.0", "proj_in", "ff.net.2"], "text_encoder": ["q_proj", "out_proj", "fc1"]}


@torch.no_grad()
def load(folder, lora=None):
    """A fresh pipeline, with a LoRA if one is told, and what it predicts."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    if lora is not None:
        pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    embeds = pipeline.text_encoder(torch.arange(77)[None])[0]
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return pipeline, torch.cat([pipeline.unet(latents, 200, embeds)[0].flatten(), embeds.flatten()])


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
        _, found = load(tiny_sd, tmp_path / name)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["none.safetensors", "b.safetensors"], "none.safetensors cannot be read"),
        (["a.safetensors", "a.safetensors"], "a.safetensors, which is read: choose another name"),
        (["a.safetensors", "nowhere/b.safetensors"], "b.safetensors cannot be written: there is no folder"),
    ],
)
def test_mistakes_are_told_in_a_sentence(names, message, tmp_path, capsys):
    layer = lora_files.Layer(torch.ones(1, 2), torch.ones(2, 1), 1.0)
    lora_files.write_diffusers(tmp_path / "a.safetensors", {"unet.mid_block.attentions.0.proj_in": layer})
    with pytest.raises(SystemExit) as exit:
        main([str(tmp_path / name) for name in names])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
