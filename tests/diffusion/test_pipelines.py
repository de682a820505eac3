"""What a base pipeline may hold, and what is said of anything else."""

import json
import re
import shutil

import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionConfig

from sketch_perceptual.diffusion.pipelines import (
    latent_pixels,
    load_decoder,
    load_generator,
    load_noise_scheduler,
    load_pipeline,
)
from sketch_perceptual.errors import InputError

TOKENS = "embeddings.token_embedding.weight"  # after text_model. where transformers 4 wrote it
UNET, VAE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def folder(tiny_sd, tmp_path):
    shutil.copytree(tiny_sd, tmp_path / "sd")
    return tmp_path / "sd"


def read(path):
    """Its tensors in memory of their own, since the file is written again."""
    return {name: weight.clone() for name, weight in load_file(path).items()}


def edit(path, change):
    weights = read(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


def refused(accelerator, folder, *words):
    with pytest.raises(InputError) as error:
        load_pipeline(accelerator, str(folder), 32)
    assert "`pretrained_model_name_or_path`" in str(error.value)
    assert len(str(error.value)) < 1200
    for word in words:
        assert word in str(error.value)


def first(weights):
    return sorted(weights)[0]


def drop_tokens(weights):
    weights.pop(next(name for name in weights if name.endswith(TOKENS)))


CHANGES = {
    "a tensor is missing": (lambda weights: weights.pop(first(weights)), ["1 of the tensors are missing"]),
    "all are missing": (lambda weights: [weights.pop(name) for name in list(weights)], []),
    "NaN": (lambda weights: weights[first(weights)].view(-1)[0].fill_(torch.nan), ["not finite"]),
    "int8": (lambda weights: weights.update({first(weights): weights[first(weights)].to(torch.int8)}), ["is I8"]),
    "float8": (
        lambda weights: weights.update({first(weights): weights[first(weights)].to(torch.float8_e4m3fn)}),
        ["is F8_E4M3"],
    ),
    "another shape": (lambda weights: weights.update({first(weights): torch.zeros(3, 5)}), []),
}


@pytest.mark.parametrize("file", [UNET, VAE, TEXT])
@pytest.mark.parametrize("kind", CHANGES)
def test_weights_that_are_not_those_of_a_part_are_refused(accelerator, folder, file, kind):
    change, words = CHANGES[kind]
    edit(folder / file, change)
    refused(accelerator, folder, str(folder / file.split("/")[0]), *words)


def test_missing_tensors_are_named(accelerator, folder):
    edit(folder / TEXT, drop_tokens)
    refused(accelerator, folder, "text_encoder", "embeddings.token_embedding.weight")


def test_layers_that_the_config_does_not_mention_are_refused(accelerator, folder):
    def add(weights):
        layers = {name: weight for name, weight in weights.items() if "layers.0." in name}
        weights.update({name.replace(".0.", ".1."): weight.clone() for name, weight in layers.items()})

    edit(folder / TEXT, add)
    refused(accelerator, folder, "text_encoder", "unexpected", "layers.1.")


def test_what_real_files_hold_besides_is_taken(accelerator, folder):
    """Of SD-1.5: position ids in the text encoder; in other pipelines all of CLIP."""
    extra = {"text_model.embeddings.position_ids": torch.arange(77)[None], "logit_scale": torch.ones(())}

    def as_published(weights):
        named = {f"text_model.{name.removeprefix('text_model.')}": weight for name, weight in weights.items()}
        weights.clear()
        weights.update(named | extra | {"visual_projection.weight": torch.ones(2, 2)})

    edit(folder / TEXT, as_published)
    expected = read(folder / TEXT)[f"text_model.{TOKENS}"]
    pipeline = load_pipeline(accelerator, str(folder), 32)
    assert torch.equal(pipeline.text_encoder.get_input_embeddings().weight, expected)


def test_names_of_older_diffusers_are_taken(accelerator, folder):
    def rename(weights):
        for old, new in (("group_norm", "group_norm"), ("query", "to_q"), ("key", "to_k"), ("value", "to_v")):
            for name in [name for name in weights if f"mid_block.attentions.0.{new}." in name]:
                weights[name.replace(new, old)] = weights.pop(name)
        for name in [name for name in weights if "mid_block.attentions.0.to_out.0." in name]:
            weights[name.replace("to_out.0", "proj_attn")] = weights.pop(name)

    expected = read(folder / VAE)
    edit(folder / VAE, rename)
    assert "decoder.mid_block.attentions.0.query.weight" in load_file(folder / VAE)
    state = load_pipeline(accelerator, str(folder), 32).vae.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_precision_is_taken(accelerator, folder, dtype):
    for file in (UNET, VAE, TEXT):
        edit(folder / file, lambda weights: weights.update({k: v.to(dtype) for k, v in weights.items()}))
    pipeline = load_pipeline(accelerator, str(folder), 32)
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.float32}


# file, what is put into it -> what is named
CONFIGS = [
    ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, ["StableDiffusionXLPipeline"]),
    ("model_index.json", {"unet": None}, ["model_index.json", "unet"]),
    ("model_index.json", {"vae": ["diffusers", "DDIMScheduler"]}, ["model_index.json", "vae"]),
    ("model_index.json", {"scheduler": ["os", "PathScheduler"]}, ["model_index.json", "scheduler"]),
    ("text_encoder/config.json", {"num_hidden_layers": -1}, ["text_encoder", "layers.0."]),
    ("unet/config.json", {"mid_block_type": None}, ["unet", "mid_block"]),
    ("unet/config.json", {"_diffusers_version": None}, ["unet"]),
    ("unet/config.json", {"norm_num_groups": 0}, ["unet", "ZeroDivisionError"]),
    ("unet/config.json", {"layers_per_block": 10**9}, ["unet/config.json", "layers_per_block"]),
    ("unet/config.json", {"block_out_channels": "x"}, ["unet"]),
    ("unet/config.json", {"attention_head_dim": float("nan")}, ["unet/config.json", "attention_head_dim"]),
    ("vae/config.json", {"scaling_factor": None}, ["vae"]),
    ("vae/config.json", {"block_out_channels": []}, ["vae"]),
    ("text_encoder/config.json", {"layer_norm_eps": "x"}, ["text_encoder"]),
    ("text_encoder/config.json", {"hidden_act": 5}, ["text_encoder"]),
    ("text_encoder/config.json", {"max_position_embeddings": 12}, ["text_encoder"]),
    ("tokenizer/tokenizer_config.json", {"model_max_length": 10**30}, ["tokenizer", "model_max_length"]),
    ("scheduler/scheduler_config.json", {"beta_schedule": "x"}, ["scheduler"]),
    ("scheduler/scheduler_config.json", {"beta_end": 5.0}, ["scheduler", "betas"]),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}, ["scheduler", "num_train_timesteps"]),
]


@pytest.mark.parametrize(("file", "change", "words"), CONFIGS)
def test_a_config_that_no_pipeline_can_have_is_named(accelerator, folder, file, change, words):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(accelerator, folder, *words)


@pytest.mark.parametrize("text", ["", "null", "[1]", "{}", "[" * 100_000])
@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_a_config_that_is_no_object_is_named(accelerator, folder, file, text):
    if (file, text) == ("scheduler/scheduler_config.json", "{}"):
        return  # all has a default
    (folder / file).write_text(text)
    refused(accelerator, folder, file.split("/")[0])


@pytest.mark.parametrize("name", ["unet", "tokenizer", "scheduler", UNET, TEXT, "vae/config.json"])
def test_what_is_missing_is_named(accelerator, folder, name):
    path = folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    refused(accelerator, folder, name.split("/")[0])


def test_a_pickle_is_not_read(accelerator, folder):
    (folder / UNET).rename((folder / UNET).with_suffix(".bin"))
    refused(accelerator, folder, "unet", "diffusion_pytorch_model.bin", "not loaded")


def test_the_variant_is_that_of_the_parts_that_have_it(accelerator, folder):
    for variant in ("fp16", "*", "**/x", "["):
        with pytest.raises(InputError, match=f"`variant` {re.escape(variant)}: .* has no such files"):
            load_pipeline(accelerator, str(folder), 32, variant=variant)
    shutil.copy(folder / UNET, folder / "unet/diffusion_pytorch_model.non_ema.safetensors")
    edit(folder / "unet/diffusion_pytorch_model.non_ema.safetensors", lambda weights: weights["conv_in.bias"].fill_(7))
    assert (load_pipeline(accelerator, str(folder), 32, variant="non_ema").unet.conv_in.bias == 7).all()


def test_shards_are_checked_as_one_file_is(accelerator, folder):
    AutoencoderKL.from_pretrained(folder / "vae").save_pretrained(folder / "vae", max_shard_size="20KB")
    (folder / VAE).unlink()
    load_pipeline(accelerator, str(folder), 32)
    shards = sorted((folder / "vae").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    edit(shards[1], lambda weights: weights[first(weights)].view(-1)[0].fill_(torch.inf))
    refused(accelerator, folder, "vae", "not finite")
    shards[1].write_bytes(shards[1].read_bytes()[:-7])
    refused(accelerator, folder, str(shards[1]))
    shards[1].unlink()
    refused(accelerator, folder, "vae")


def test_the_safety_checker_is_checked_too(accelerator, folder):
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**shape, image_size=16, patch_size=8).to_dict()
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=8))
    checker.save_pretrained(folder / "safety_checker")
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(folder / "feature_extractor")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPFeatureExtractor"]
    (folder / "model_index.json").write_text(json.dumps(index | {"requires_safety_checker": True}))
    path = folder / "safety_checker/model.safetensors"
    ids = {"vision_model.vision_model.embeddings.position_ids": torch.arange(5)[None]}
    edit(path, lambda weights: weights.update(ids))  # as SD-1.5's file
    assert load_generator(accelerator, str(folder), 32, safety_checker=True).safety_checker is not None
    assert load_generator(accelerator, str(folder), 32, safety_checker=False).safety_checker is None
    edit(path, lambda weights: weights.pop("concept_embeds"))
    with pytest.raises(InputError, match=r"safety_checker.* missing: concept_embeds"):
        load_generator(accelerator, str(folder), 32, safety_checker=True)


def test_the_scheduler_of_the_training_is_checked(folder):
    assert load_noise_scheduler(str(folder)).config.num_train_timesteps == 1000
    (folder / "scheduler/scheduler_config.json").write_text('{"beta_end": 5, "num_train_timesteps": 1000}')
    with pytest.raises(InputError, match=r"`pretrained_model_name_or_path` .*scheduler.*betas"):
        load_noise_scheduler(str(folder))


def test_a_decoder_is_checked_too(tmp_path):
    AutoencoderTiny(encoder_block_out_channels=[8] * 2, decoder_block_out_channels=[8] * 2,
                    num_encoder_blocks=[1, 1], num_decoder_blocks=[1, 1]).save_pretrained(tmp_path)  # fmt: skip
    load_decoder(str(tmp_path))
    edit(tmp_path / "diffusion_pytorch_model.safetensors", lambda weights: weights.pop(first(weights)))
    with pytest.raises(InputError, match=r"`perceptual_decoder` .* 1 of the tensors are missing: decoder"):
        load_decoder(str(tmp_path))
    with pytest.raises(InputError, match="`perceptual_decoder` some/where cannot be loaded"):
        load_decoder("some/where")


def test_the_pixels_of_a_latent_are_read_from_its_config(folder):
    assert latent_pixels(str(folder)) == 4
    assert latent_pixels("some/where") is None
    (folder / "vae/config.json").write_text('{"block_out_channels": 5}')
    with pytest.raises(InputError, match=r"vae/config\.json: block_out_channels"):
        latent_pixels(str(folder))


def test_a_clip_without_a_tensor_is_refused(tmp_path):
    from tiny_clip import save_clip

    from sketch_perceptual.measures.image_quality import ClipFeatures

    save_clip(tmp_path)
    CLIPModel.from_pretrained(tmp_path)
    edit(tmp_path / "model.safetensors", drop_tokens)
    with pytest.raises(InputError, match=r"`clip_model` .* 1 of the tensors are missing: .*token_embedding"):
        ClipFeatures(tmp_path)
