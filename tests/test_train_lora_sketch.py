import json
import os
import re
import signal
import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import reset_accelerate
from diffusers import AutoencoderTiny, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import lora_base
from hub_server import Repo
from huggingface_hub import ModelCard
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from PIL import Image, ImageDraw
from processes import two_processes
from safetensors import safe_open
from safetensors.torch import load_file

import train_lora_sketch as script
from sketch_perceptual.data.datasets import CaptionedImages
from sketch_perceptual.data.images import to_pil
from sketch_perceptual.diffusion import Latents, process_of
from sketch_perceptual.errors import InputError, TrainingError
from sketch_perceptual.files import files_in
from sketch_perceptual.lora import encoding, report, validation
from sketch_perceptual.lora import files as lora_files
from sketch_perceptual.lora.adapter import Adapter
from sketch_perceptual.lora.caches import PromptCache
from sketch_perceptual.lora.samples import Losses, Sample
from sketch_perceptual.losses import PixelLoss
from sketch_perceptual.networks.backbone import load_backbone
from sketch_perceptual.networks.hub_model import fingerprint
from sketch_perceptual.training import checkpoints, startup, trackers

# UNet2DConditionModel of stable-diffusion-v1-5, from its published config.json.
SD15_UNET = {
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "in_channels": 4,
    "layers_per_block": 2,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}


class Run:
    """One training in this process: its folder, what it logged, and its options."""

    def __init__(self, folder, options, logs):
        self.folder, self.options, self.logs = folder, options, logs

    @property
    def adapter(self):
        return load_file(self.folder / script.WEIGHTS)

    def __eq__(self, other):
        a, b = self.adapter, other.adapter
        return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def train(tiny_sd, drawings, tmp_path, monkeypatch, signals):
    """Train in this process with the pixel loss, unless the options say otherwise; 4 steps of 2 images."""

    def train(*options, output="out", data=("--train_data_dir", str(drawings)), steps=4, seed=0):
        reset_accelerate()
        logs = []
        monkeypatch.setattr(Accelerator, "log", lambda self, values, step: logs.append({"step": step} | values))
        fixed = f"""--pretrained_model_name_or_path {tiny_sd} --output_dir {tmp_path / output} --resolution 32
            --perceptual_loss pixel --train_batch_size 2 --lr_warmup_steps 0 --learning_rate 1e-2 --report_to none
            --feature_dir {tmp_path / "features"}"""
        fixed += f" --max_train_steps {steps}" if steps is not None else ""
        fixed += f" --seed {seed}" if seed is not None else ""
        script.main(script.parse_args([*fixed.split(), *data, *map(str, options)]))
        return Run(tmp_path / output, options, logs)

    return train


def draw(folder, adapter=None, weight_name=script.WEIGHTS):
    """What a user's fresh pipeline draws with an adapter."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    if adapter is not None:
        pipeline.load_lora_weights(adapter, weight_name=weight_name)
    generator = torch.Generator().manual_seed(0)
    return torch.tensor(pipeline("a house", num_inference_steps=2, generator=generator, output_type="np").images)


def test_the_adapter_loads_anywhere_and_keeps_its_alpha(train, tiny_sd, monkeypatch):
    run = train("--rank", 2, "--lora_alpha", 8, "--perceptual_weight", 1)
    keys = list(run.adapter)
    assert len(keys) == 2 * 4 * 2 * 4  # down and up of 4 projections in 2 attentions of 4 transformer blocks
    assert all(key.startswith("unet.") and key.endswith((".lora.down.weight", ".lora.up.weight")) for key in keys)
    assert {weight.dtype for weight in run.adapter.values()} == {torch.float32}

    base, tuned = draw(tiny_sd), draw(tiny_sd, run.folder)
    assert (base - tuned).abs().max() > 1e-3
    kohya = load_file(run.folder / "out.safetensors")
    assert {float(value) for key, value in kohya.items() if key.endswith(".alpha")} == {8.0}
    torch.testing.assert_close(draw(tiny_sd, run.folder, "out.safetensors"), tuned)
    monkeypatch.setattr(lora_base, "_load_sft_state_dict_metadata", lambda file: None)  # as diffusers before 0.35
    torch.testing.assert_close(draw(tiny_sd, run.folder), tuned)
    monkeypatch.setattr(lora_base, "HF_HUB_OFFLINE", False)
    torch.testing.assert_close(draw(tiny_sd, run.folder, None), tuned)  # diffusers finds its own of the two files


OTHER = """--train_text_encoder --text_encoder_lr 3e-3 --use_dora --use_rslora --rank 2 --lora_alpha 6
    --validation_share 0.3 --fit pad --no-cache_latents --checkpointing_steps 2""".split()


@pytest.mark.slow
def test_dora_and_the_text_encoder_load_as_they_were_trained_and_go_on_bit_for_bit(
    train, tiny_sd, monkeypatch, caplog
):
    run = train(*OTHER)
    assert "no check of the adapter" not in caplog.text
    encoder = [key for key in run.adapter if key.startswith("text_encoder.text_model.encoder.layers.0.self_attn.")]
    assert len(encoder) == 4 * 3 and len(run.adapter) == 36 * 3
    assert [(log["lr"], log["text_encoder_lr"]) for log in run.logs if "lr" in log] == [(1e-2, 3e-3)] * 4
    tuned = draw(tiny_sd, run.folder)
    assert (tuned - draw(tiny_sd)).abs().max() > 1e-3
    kohya = load_file(run.folder / "out.safetensors")
    assert len([key for key in kohya if key.startswith("lora_te_text_model_") and key.endswith(".dora_scale")]) == 4
    assert not torch.allclose(draw(tiny_sd, run.folder, "out.safetensors"), tuned)  # diffusers drops its dora_scale
    assert "`out.safetensors` for LyCORIS" in (run.folder / "README.md").read_text()
    monkeypatch.setattr(lora_base, "_load_sft_state_dict_metadata", lambda file: None)  # as diffusers before 0.35
    torch.testing.assert_close(draw(tiny_sd, run.folder), tuned)

    train(*OTHER, output="halves", steps=2)
    resumed = train(*OTHER, "--resume_from_checkpoint", "latest", output="halves")
    assert resumed == run
    assert [log for log in resumed.logs if "lr" in log] == [log for log in run.logs if log["step"] > 2 and "lr" in log]


def test_the_text_encoder_has_its_own_rate(train, monkeypatch, caplog):
    """And is exported where transformers and PEFT cannot load it again."""
    monkeypatch.setattr(StableDiffusionPipeline, "load_lora_weights", lambda *_, **options: import_module("peft.no"))
    run = train("--train_text_encoder", "--text_encoder_lr", 1e-30)
    up = {key: float(weight.abs().max()) for key, weight in run.adapter.items() if key.endswith("up.weight")}
    assert {key.split(".")[0] for key, largest in up.items() if largest < 1e-20} == {"text_encoder"}
    assert {key.split(".")[0] for key, largest in up.items() if largest > 1e-4} == {"unet"}
    assert "no check of the adapter and pictures: No module named 'peft.no'" in caplog.text


def test_a_seed_makes_the_same_files_and_others_may_read_them(train):
    first, again = train(), train(output="again/out")
    for name in (script.WEIGHTS, "out.safetensors"):
        assert (first.folder / name).read_bytes() == (again.folder / name).read_bytes()
        (first.folder / "plain").touch()
        assert (first.folder / name).stat().st_mode == (first.folder / "plain").stat().st_mode


def test_other_programs_are_told_of_the_run(train, tiny_sd):
    run = train("--rank", 2, "--trigger_word", "ink", "--snr_gamma", 5, "--perceptual_weight", 0.2)
    with safe_open(run.folder / "out.safetensors", "pt") as file:
        shown = file.metadata()
    expected = {
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.title": "out",
        "modelspec.resolution": "32x32",
        "modelspec.license": "creativeml-openrail-m",
        "modelspec.trigger_phrase": "ink",
        "ss_output_name": "out",
        "ss_sd_model_name": tiny_sd.name,
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_network_dim": "2",
        "ss_network_alpha": "2",
        "ss_learning_rate": "0.01",
        "ss_resolution": "(32, 32)",
        "ss_seed": "0",
        "ss_steps": "4",
        "ss_num_epochs": "1",
        "ss_min_snr_gamma": "5.0",
        "ss_perceptual_loss": "pixel",
        "ss_perceptual_weight": "0.2",
    }
    assert {name: shown.get(name) for name in expected} == expected
    assert not [text for text in shown.values() if str(run.folder.parent) in text or str(tiny_sd.parent) in text]


def test_sd15_gets_128_modules_and_797184_parameters():
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD15_UNET)
        adapter = Adapter(SimpleNamespace(unet=unet), {"unet": script.TARGETS["unet"]}, 0, r=4, lora_alpha=4)
    assert sum(isinstance(module, LoraLayer) for module in unet.modules()) == 128
    assert sum(parameter.numel() for parameter in adapter.parameters()) == 797_184


def test_weight_zero_is_the_plain_script_bit_for_bit_and_loads_nothing(train):
    plain = train("--perceptual_weight", 0, "--perceptual_loss", "attention_vgg", "--backbone", "nowhere")
    shut = train("--perceptual_weight", 1, "--perceptual_start_step", 99, output="shut")
    scored = train("--perceptual_weight", 1, "--perceptual_min_snr", 0, output="scored")
    assert plain == shut
    assert plain != scored
    assert "perceptual_loss" not in plain.logs[0]
    assert [log["gated_rows"] for log in shut.logs] == [0] * 4
    assert [log["gated_rows"] for log in scored.logs] == [1] * 4


WHOLE = ("--fit", "pad", "--random_flip", "--train_batch_size", 1, "--perceptual_min_snr", 0)


@pytest.fixture
def encoded(monkeypatch):
    """The shapes of what the VAE encodes."""
    encode, shapes = Latents.encode, []
    monkeypatch.setattr(Latents, "encode", lambda self, images: shapes.append(images.shape) or encode(self, images))
    return shapes


def test_caches_change_nothing(train, tmp_path, caplog, encoded):
    plain = train("--no-cache_latents", "--no-cache_prompts", *WHOLE, steps=16)
    assert [path.name for path in (tmp_path / "features").iterdir()] == ["scans"]  # of files, no latents
    assert train(*WHOLE, steps=16, output="cached") == plain
    assert "embedded; the text encoder" in caplog.text
    assert "0 of 14 images have latents in " in caplog.text
    caplog.clear()
    encoded.clear()
    assert train(*WHOLE, steps=16, output="again") == plain
    assert len(encoded) == 1  # where the pipeline is tried
    assert "have latents in" not in caplog.text


def test_a_tiny_autoencoder_may_be_the_vae(train, tiny_sd, tmp_path):
    folder = tmp_path / "tiny-vae"
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    blocks = {"encoder_block_out_channels": [8, 8, 8], "decoder_block_out_channels": [8, 8, 8]}
    pipeline.vae = AutoencoderTiny(**blocks, num_encoder_blocks=[1, 1, 1], num_decoder_blocks=[1, 1, 1])
    pipeline.save_pretrained(folder)
    config = json.loads((folder / "vae/config.json").read_text())
    del config["block_out_channels"]  # as on the Hub
    (folder / "vae/config.json").write_text(json.dumps(config))
    options = ("--pretrained_model_name_or_path", folder, "--perceptual_target", "reconstruction", *WHOLE)
    plain = train("--no-cache_latents", *options, output="plain")
    assert plain == train("--cache_latents", *options)
    assert plain.logs[0]["perceptual_loss"] > 0
    assert (draw(folder) - draw(folder, plain.folder)).abs().max() > 1e-3


@pytest.fixture
def pages(tmp_path):
    """Seven drawings in five proportions."""
    folder = tmp_path / "pages" / "house"
    folder.mkdir(parents=True)
    for number, size in enumerate([(60, 30), (62, 30), (60, 31), (30, 60), (50, 50), (45, 30), (90, 30)]):
        image = Image.new("RGB", size, "white")
        ImageDraw.Draw(image).line((0, 4 * number, *size), "black", 3)
        image.save(folder / f"{number}.png")
    return folder.parent


BUCKET = ("--fit", "bucket", "--random_flip", "--perceptual_min_snr", 0, "--perceptual_crop", 16)


def test_drawings_keep_their_shapes(train, pages, caplog, encoded):
    caplog.set_level("INFO")
    data, epoch = ("--train_data_dir", str(pages)), ("--num_train_epochs", 2)
    plain = train("--no-cache_latents", "--no-cache_prompts", *BUCKET, *epoch, data=data, steps=None)
    assert "images by shape: 3 of 40 x 20, 1 of 20 x 40, 1 of 32 x 32, 1 of 36 x 24, 1 of 48 x 16" in caplog.text
    assert len(plain.logs) == 12  # two epochs of one batch of two and five of one
    cached = train(*BUCKET, *epoch, data=data, steps=None, output="cached")
    for name, weight in cached.adapter.items():  # which were encoded one by one
        torch.testing.assert_close(weight, plain.adapter[name], rtol=0, atol=1e-3)
    assert "0 of 14 images have latents in" in caplog.text
    encoded.clear()
    assert train(*BUCKET, *epoch, data=data, steps=None, output="again") == cached
    assert len(encoded) == 1  # where the pipeline is tried


@pytest.mark.parametrize(("crop", "expected"), [(16, 16), (32, None), (100, None)])
def test_a_crop_of_the_resolution_or_more_is_the_whole_picture_of_any_shape(tiny_sd, crop, expected):
    options = f"--pretrained_model_name_or_path {tiny_sd} --train_data_dir x --resolution 32 --fit bucket"
    args = script.parse_args([*options.split(), "--perceptual_loss", "pixel", "--perceptual_crop", str(crop)])
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    term = script.make_term(args, Latents(pipeline.vae), process_of(pipeline.scheduler))
    assert term.crop == expected


def test_a_run_with_shapes_is_resumed_bit_for_bit(train, pages):
    options = (*BUCKET, "--gradient_accumulation_steps", 2, "--checkpointing_steps", 2, "--dataloader_num_workers", 1)
    data = ("--train_data_dir", str(pages))
    straight = train(*options, data=data, steps=5)
    stopped = train(*options, data=data, steps=5, output="resumed")
    (stopped.folder / "checkpoint-4" / checkpoints.STATE_FILE).unlink()
    resumed = train(*options, "--resume_from_checkpoint", "latest", data=data, steps=5, output="resumed")
    assert resumed.logs == straight.logs[2:]
    assert resumed == straight


def test_only_what_is_opaque_counts_in_the_denoising_loss():
    target, process = torch.zeros(2, 4, 4, 4), process_of(DDPMScheduler())
    wrong = target.clone()
    wrong[..., 2:] = 1
    masks = torch.ones(2, 1, 16, 16)
    masks[0, ..., 8:] = 0
    sample = Sample(target, target, torch.tensor([5, 5]), torch.zeros(2, 1, 1), None, masks)
    losses = script.score(lambda *_, **options: [wrong], process, None, None, 0, sample, torch.Generator())
    assert losses.denoising.tolist() == [0, 0.5]


def test_a_run_with_masks(train, tmp_path, caplog):
    caplog.set_level("INFO")
    folder = tmp_path / "masked" / "house"
    (folder / "mask").mkdir(parents=True)
    for number in range(4):
        ImageDraw.Draw(image := Image.new("RGBA", (40, 40))).line((0, 9 * number, 40, 20), "black", 3)
        image.save(folder / f"{number}.png")
    Image.new("L", (40, 40), 255).save(folder / "mask" / "3.png")
    data = ("--train_data_dir", str(folder.parent))
    options = ("--perceptual_min_snr", 0, "--validation_share", 0.25)
    masked = train("--alpha_mask", *options, data=data)
    assert "`alpha_mask`: 3 of 4 images" in caplog.text
    (folder / "mask" / "3.png").unlink()
    assert train("--alpha_mask", *options, data=data, output="other") != masked
    for number in range(4):
        Image.open(folder / f"{number}.png").convert("RGB").save(folder / f"{number}.png")
    with pytest.raises(InputError, match="`alpha_mask`: no image has transparent parts, a mask in a folder `mask`"):
        train("--alpha_mask", data=data, output="third")
    Image.new("L", (40, 40), 0).save(folder / "mask" / "3.png")
    with pytest.raises(InputError, match=r"`alpha_mask`: empty masks: .*3\.png"):
        train("--alpha_mask", data=data, output="fourth")


def test_validation_images_have_the_size_that_was_asked_for(train, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        validation, "image_grid", lambda rows, *rest: drawn.extend(rows["x"]) or Image.new("L", (1, 1))
    )
    prompt = ("--validation_prompt", "x", "--num_validation_images", 1)
    train(*prompt, "--validation_size", "48x24", steps=1)
    assert {image.size for image in drawn} == {(48, 24)}
    with pytest.raises(InputError, match="`validation_size` must be two multiples of 8"):
        train(*prompt, "--validation_size", "44x24", steps=1)


def test_without_a_term_cached_images_are_not_read(train, monkeypatch):
    plain = train("--no-cache_latents", "--perceptual_weight", 0, *WHOLE, steps=16)
    cached = ("--perceptual_weight", 0, *WHOLE)
    assert train(*cached, steps=16, output="cached") == plain
    monkeypatch.setattr("sketch_perceptual.lora.pictures.some_drawings", lambda data: [Image.new("RGB", (8, 8))])
    monkeypatch.setattr(CaptionedImages, "pixels", None)
    assert train(*cached, steps=16, output="again") == plain


def test_an_edited_image_gets_new_latents(train, tmp_path, caplog):
    path = tmp_path / "mine"
    path.mkdir()
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (32, 32), colour).save(path / f"{name}.png")
        (path / f"{name}.txt").write_text("a house")
    data = ("--train_data_dir", str(path))
    first = train(data=data)
    Image.new("RGB", (32, 32), "green").save(path / "b.png")
    caplog.clear()
    assert train(data=data, output="edited") != first
    assert "1 of 2 images have latents in " in caplog.text


@pytest.mark.parametrize("options", [("--center_crop",), ("--fit", "pad"), ("--center_crop", "--max_train_steps", 3)])
def test_latents_are_cached_where_crops_stay_and_it_pays(train, caplog, options):
    train(*options)
    assert ("have latents in" in caplog.text) == ("--max_train_steps" not in options)


def test_random_crops_are_not_cached_and_said(train, caplog):
    train()
    assert "--no-cache_latents, because images that are not square are cropped at random" in caplog.text
    with pytest.raises(InputError, match=r"`cache_latents` cannot be used: images .* add --fit pad"):
        train("--cache_latents", output="cached")


def test_gradient_checkpointing_changes_nothing_but_memory(train):
    plain, checkpointed = train(), train("--gradient_checkpointing", output="checkpointed")
    for key, weight in plain.adapter.items():
        torch.testing.assert_close(checkpointed.adapter[key], weight)


def test_attention_vgg_scores_a_run(train, backbone):
    run = train("--perceptual_loss", "attention_vgg", "--backbone", backbone, "--perceptual_min_snr", 0)
    assert all(log["perceptual_loss"] > 0 for log in run.logs)
    for log in run.logs:
        tenths = {name: value for name, value in log.items() if name.startswith("denoising_loss/")}
        assert len(tenths) in (1, 2)
        assert min(tenths.values()) <= log["denoising_loss"] <= max(tenths.values())
        assert log["denoising_loss"] < log["train_loss"] <= log["denoising_loss"] + log["perceptual_loss"]
        assert 0 < log["gradient_ratio"] <= 0.3001
        assert -1 <= log["gradient_cosine"] <= 1
    card = (run.folder / "README.md").read_text()
    scorer = load_backbone(backbone).truncate("relu4_3")
    assert f"| backbone_weights | {fingerprint(scorer)} |" in card
    assert "| backbone_pool_after_attention | True |" in card


def test_held_out_images_are_not_trained_on_and_their_losses_are_logged(train, caplog, monkeypatch):
    caplog.set_level("INFO")
    seen = []
    monkeypatch.setattr(
        script,
        "collate",
        lambda examples, collate=script.collate: seen.extend(e["name"] for e in examples) or collate(examples),
    )
    run = train("--validation_share", 0.3, "--perceptual_weight", 1, "--fit", "pad", steps=6)
    held_out = [log for log in run.logs if "held_out_denoising_loss" in log]
    assert [log["step"] for log in held_out] == [0, *sorted({log["step"] for log in held_out} - {0})]
    assert held_out[-1]["step"] == 6
    assert all(log["held_out_denoising_loss"] > 0 and log["held_out_perceptual_loss"] > 0 for log in held_out)
    assert held_out[0]["held_out_denoising_loss"] != held_out[-1]["held_out_denoising_loss"]
    trained, apart = map(int, re.search(r"(\d+) images for training, (\d+) held out", caplog.text).groups())
    assert len(set(seen)) == trained
    assert apart > 0
    card = (run.folder / "README.md").read_text()
    assert f"On held-out images: denoising loss {held_out[0]['held_out_denoising_loss']:.4g} at the start" in card
    assert all("held_out_denoising_loss" not in log for log in train(output="all").logs)


def test_the_loss_is_logged_by_tenths_of_the_schedule():
    denoising, perceptual, gated = torch.tensor([[1.0, 2, 3, 4], [5, 0, 6, 0], [1, 0, 1, 0]])
    losses = Losses(denoising, denoising, torch.tensor([0, 99, 100, 999]), perceptual, gated)
    tenths = report.by_decile(losses, 1000)
    sums = {
        name: (float(loss.sum()), float(tenths[f"{name} rows"].sum()))
        for name, loss in tenths.items()
        if name[-1] == "%"
    }
    assert {name: value for name, value in sums.items() if value[1]} == {
        "denoising_loss/t0-10%": (3, 2),
        "denoising_loss/t10-20%": (3, 1),
        "denoising_loss/t90-100%": (4, 1),
        "perceptual_loss/t0-10%": (5, 1),
        "perceptual_loss/t10-20%": (6, 1),
    }


def test_held_out_losses_are_the_same_after_a_resume(train):
    options = ("--validation_share", 0.3, "--fit", "pad")
    straight = train(*options, "--checkpointing_steps", 3, steps=6)
    train(*options, "--checkpointing_steps", 3, output="halves", steps=3)
    resumed = train(*options, "--resume_from_checkpoint", "latest", output="halves", steps=6)
    assert resumed == straight
    last = [[log for log in run.logs if "held_out_denoising_loss" in log][-1] for run in (straight, resumed)]
    assert last[0] == last[1]


def test_clipping_clips_and_the_norm_before_it_is_logged(train, monkeypatch):
    norms, step = [], torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    run = train("--max_grad_norm", 1e-3)
    assert len(norms) == 4
    assert max(norms) <= 1e-3 * 1.001
    assert min(log["grad_norm"] for log in run.logs) > 1e-3


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("told_by", ["script", "launcher"])
def test_adapters_are_float32_under_any_precision_from_any_source(train, monkeypatch, told_by, precision):
    dtypes, moments, step = set(), set(), torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        result = step(self, *args, **kwargs)
        dtypes.update(p.dtype for group in self.param_groups for p in group["params"])
        moments.update(state["exp_avg"].dtype for state in self.state.values())
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    base = []
    monkeypatch.setattr(script, "finish", lambda args, run, adapter, *rest: base.append(adapter.pipeline.unet.conv_in))
    if told_by == "launcher":
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    train(*(["--mixed_precision", precision] if told_by == "script" else []))
    assert dtypes == moments == {torch.float32}
    assert base[0].weight.dtype == {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def test_small_updates_survive_bfloat16(train):
    run = train("--mixed_precision", "bf16", "--learning_rate", 1e-6)
    up = [weight for key, weight in run.adapter.items() if key.endswith("up.weight")]
    assert all(0 < float(weight.abs().max()) < 1e-5 for weight in up)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize(("steps", "length"), [(6, ()), (None, ("--num_train_epochs", 2))])
def test_the_schedule_warms_up_and_ends_on_the_last_step(train, schedule, accumulation, steps, length):
    options = ("--lr_scheduler", schedule, "--lr_warmup_steps", 1, "--gradient_accumulation_steps", accumulation)
    run = train(*options, *length, steps=steps)
    rates = [log["lr"] for log in run.logs]
    assert len(rates) == (steps or 2 * -(-4 // accumulation))  # four batches an epoch
    assert rates[0] == max(rates) == pytest.approx(1e-2)
    assert rates[-1] == pytest.approx(0, abs=1e-9)


def test_a_warm_up_longer_than_the_run_is_said(train, caplog):
    train("--lr_scheduler", "cosine", "--lr_warmup_steps", 500)
    assert "`lr_warmup_steps` 500 is longer than the run of 4 steps: its rate ends at 1%" in caplog.text


def test_validation_leaves_no_trace(train):
    options = ("--mixed_precision", "bf16", "--num_train_epochs", 1)
    prompts = ("--validation_prompt", "a house", "a snow man", "--num_validation_images", 2)
    silent, drawn = train(*options), train(*options, *prompts, output="drawn")
    assert silent == drawn
    assert silent.logs == drawn.logs
    assert [path.name for path in (drawn.folder / "validation").iterdir()] == ["step-000004.png"]
    width, height = Image.open(drawn.folder / "before_after.png").size
    assert width > 4 * 160
    assert height > 2 * 160


def test_validation_puts_modes_and_random_state_back(tiny_sd):
    reset_accelerate()
    args = script.parse_args(
        f"--pretrained_model_name_or_path {tiny_sd} --train_data_dir x --resolution 32 --seed 0"
        " --num_validation_images 1 --validation_prompt house".split()
    )
    run = SimpleNamespace(accelerator=Accelerator(cpu=True), seed=0)
    pipeline, _ = script.load_models(args, run)
    prompts = PromptCache(partial(script.encode_prompts, pipeline.tokenizer, pipeline.text_encoder), "cpu")
    Adapter(pipeline, {"unet": script.TARGETS["unet"]}, 0)
    pictures = validation.Validation(args, run, pipeline, prompts)
    pipeline.unet.train()

    def state():
        return [(n, p.dtype, p.requires_grad, p.device) for n, p in pipeline.unet.named_parameters()]

    before, random_state = state(), torch.get_rng_state()
    first = pictures.generate()
    assert pipeline.unet.training
    assert state() == before
    assert torch.equal(torch.get_rng_state(), random_state)
    assert pictures.generate()["house"][0].tobytes() == first["house"][0].tobytes()


def test_validation_prompts_are_read_by_the_text_encoder_as_it_is(tiny_sd):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    pipeline.text_encoder.requires_grad_(False)
    adapter = Adapter(pipeline, {"text_encoder": script.TARGETS["text_encoder"]}, 0)
    embed = partial(script.encode_prompts, pipeline.tokenizer, pipeline.text_encoder, trained=pipeline.text_encoder)
    before = embed(["house"])
    assert before.requires_grad
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 1
        assert not torch.allclose(embed(["house"]), before)
        assert not embed(["house"]).requires_grad


def test_a_validation_that_fails_does_not_end_the_training(train, monkeypatch, caplog):
    monkeypatch.setattr(validation, "to_pil", lambda image: to_pil(torch.full_like(image, torch.nan)))
    run = train("--validation_prompt", "a house", "--num_validation_images", 1)
    assert len(run.logs) == 4
    assert "no validation images: " in caplog.text
    assert not (run.folder / "before_after.png").exists()
    assert (run.folder / "README.md").is_file()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_validation_under_half_precision(train, precision):
    prompt = ("--validation_prompt", "a house", "--num_validation_images", 1, "--perceptual_weight", 0)
    assert (train("--mixed_precision", precision, *prompt).folder / "before_after.png").is_file()


class Poisoned(PixelLoss):
    """NaN on the calls in `bad`, counted from the first training step."""

    bad = ()

    def __init__(self):
        super().__init__()
        self.calls = -3  # the contract comes first

    def compare(self, images, target):
        self.calls += 1
        return super().compare(images, target) * (torch.nan if self.calls in self.bad else 1)


POISON = ("--perceptual_loss", "test_train_lora_sketch:Poisoned", "--perceptual_min_snr", 0)


def test_a_step_that_is_not_finite_is_skipped_and_counted(train, monkeypatch, caplog):
    monkeypatch.setattr(Poisoned, "bad", (3,))  # the first call is the trial of the loss
    run = train(*POISON)
    assert [log.get("skipped_steps", 0) for log in run.logs] == [0, 1, 1, 1]
    assert all(torch.isfinite(weight).all() for weight in run.adapter.values())
    skipped = [record.getMessage() for record in caplog.records if "skipped, not finite" in record.getMessage()]
    assert len(skipped) == 1
    assert "step 2 skipped" in skipped[0]
    assert skipped[0].count(".png at timestep ") == 2


def test_a_run_that_stays_not_finite_ends_and_saves_no_nan(train, monkeypatch, tmp_path):
    monkeypatch.setattr(Poisoned, "bad", range(4, 99))
    with pytest.raises(
        FloatingPointError, match=r"5 steps in a row were not finite, the last at step 7: .*png at time"
    ):
        train(*POISON, "--max_train_steps", 20, "--checkpointing_steps", 1)
    saved = checkpoints.find_checkpoints(tmp_path / "out")
    assert len(saved) == 6
    for checkpoint in saved:
        assert all(torch.isfinite(weight).all() for weight in load_file(checkpoint / script.WEIGHTS).values())


@pytest.mark.parametrize(
    ("first", "options"),
    [
        (4, ()),  # at an epoch's end
        (3, ()),  # in its middle
        (3, ("--gradient_accumulation_steps", 2)),
        (3, ("--dataloader_num_workers", 2, "--mixed_precision", "bf16", "--lr_scheduler", "cosine")),
    ],
)
def test_a_resumed_run_is_the_straight_run_bit_for_bit(train, first, options):
    options = (
        *options,
        "--random_flip",
        "--noise_offset",
        0.1,
        "--checkpointing_steps",
        first,
        "--perceptual_min_snr",
        0,
    )
    straight = train("--max_train_steps", 8, *options)
    stopped = train("--max_train_steps", 8, *options, output="resumed")
    for path in checkpoints.find_checkpoints(stopped.folder)[1:]:
        (path / checkpoints.STATE_FILE).unlink()  # as if the run had been killed while writing it
    (stopped.folder / script.WEIGHTS).unlink()
    resumed = train("--max_train_steps", 8, *options, "--resume_from_checkpoint", "latest", output="resumed")
    assert [log["step"] for log in resumed.logs] == list(range(first + 1, 9))
    assert resumed.logs == straight.logs[first:]
    assert resumed == straight


CHANGED = "--trigger_word ink --caption_dropout 0.4 --shuffle_tags --keep_tags 1".split()


@pytest.fixture
def tags(drawings, tmp_path):
    """Four drawings with lists of tags; in folders that repeat two of them twice."""
    folder = tmp_path / "tags"
    for number, repeats in enumerate((2, 2, 1, 1)):
        path = folder / f"{repeats}_house" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.open(drawings / ("house", "snow_man")[number % 2] / f"{number}.png").save(path)
        path.with_suffix(".txt").write_text("a, b, c, d")
    return ("--train_data_dir", str(folder))


@pytest.fixture
def read(monkeypatch):
    """The captions of each batch, and those of held-out images."""
    read = {"trained": [], "held out": []}

    def draw(batch, *args, draw=script.draw_sample):
        read["trained"] += batch["caption"]
        return draw(batch, *args)

    def held_out(self, index, *args, sample=script.HeldOut._sample):
        read["held out"].append(self.data[0, index]["caption"])
        return sample(self, index, *args)

    monkeypatch.setattr(script, "draw_sample", draw)
    monkeypatch.setattr(script.HeldOut, "_sample", held_out)
    return read


def test_changed_captions_are_trained_on_and_held_out_ones_are_whole(train, tags, read, caplog):
    run = train(*CHANGED, "--validation_share", 0.25, data=tags, steps=24)
    assert "--no-cache_prompts, because --shuffle_tags makes new captions" in caplog.text
    assert set(read["held out"]) == {"ink, a, b, c, d"}
    assert 0.2 < read["trained"].count("") / 48 < 0.6
    shuffled = set(read["trained"]) - {""}
    assert all(text.startswith("ink, ") and sorted(text[5:].split(", ")) == list("abcd") for text in shuffled)
    assert len(shuffled) > 12
    card = (run.folder / "README.md").read_text()
    assert (
        "Captions come from text files (" in card and "class folders as" not in card and "instance_prompt: ink" in card
    )


def test_changed_captions_are_the_same_after_a_resume_and_with_workers(train, tags):
    straight = train(*CHANGED, "--checkpointing_steps", 2, data=tags)
    train(*CHANGED, "--checkpointing_steps", 2, data=tags, output="halves", steps=2)
    resume = ("--resume_from_checkpoint", "latest", "--dataloader_num_workers", 1)
    assert train(*CHANGED, *resume, data=tags, output="halves") == straight
    assert train(data=tags, output="plain") != straight


def test_empty_captions_are_embedded_with_the_others(train, tags):
    options = ("--caption_dropout", 0.5)
    assert train(*options, "--cache_prompts", data=tags) == train(
        *options, "--no-cache_prompts", data=tags, output="each"
    )


def test_an_epoch_shows_images_as_often_as_their_folder_says(train, tags, monkeypatch, caplog):
    caplog.set_level("INFO")
    names = []
    collate = script.collate
    monkeypatch.setattr(script, "collate", lambda rows: names.extend(row["name"][-5] for row in rows) or collate(rows))
    train("--fit", "pad", data=tags, steps=3)
    assert sorted(names) == list("001123")
    assert "4 images, 6 in an epoch" in caplog.text and "0 of 4 images have latents in" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--shuffle_tags --cache_prompts", "--cache_prompts cannot be used: --shuffle_tags makes new captions"),
        ("--train_text_encoder --cache_prompts", "--cache_prompts cannot be used: --train_text_encoder changes what"),
        ("--text_encoder_lr 1e-5", "--text_encoder_lr needs --train_text_encoder"),
        ("--keep_tags 1", "--keep_tags needs --shuffle_tags"),
        ("--caption_dropout 1.5", "must be a number from 0 to below 1"),
    ],
)
def test_caption_options_that_contradict_each_other_are_refused(options, message, capsys):
    command = ["--pretrained_model_name_or_path", "x", "--train_data_dir", "y", *options.split()]
    with pytest.raises(SystemExit):
        script.parse_args(command)
    assert message in capsys.readouterr().err


def test_a_finished_run_resumed_trains_nothing_and_exports_again(train):
    run = train("--checkpointing_steps", 4)
    again = train("--resume_from_checkpoint", run.folder / "checkpoint-4", output="again")
    assert again.logs == []
    assert again == run


@pytest.mark.parametrize(("limit", "kept"), [(1, {4}), (3, {2, 3, 4}), (5, {1, 2, 3, 4})])
def test_the_newest_checkpoints_stay(train, limit, kept):
    run = train("--checkpointing_steps", 1, "--checkpoints_total_limit", limit)
    assert {int(path.name.split("-")[1]) for path in checkpoints.find_checkpoints(run.folder)} == kept


def test_checkpoints_are_adapters_and_old_ones_go(train, tiny_sd):
    run = train("--checkpointing_steps", 1, "--checkpoints_total_limit", 2)
    names = sorted(path.name for path in run.folder.iterdir() if "checkpoint" in path.name)
    assert names == ["checkpoint-3", "checkpoint-4"]
    torch.testing.assert_close(draw(tiny_sd, run.folder / "checkpoint-4"), draw(tiny_sd, run.folder))
    assert "model.safetensors" not in [path.name for path in (run.folder / "checkpoint-4").iterdir()]


def test_a_new_run_leaves_an_older_one_alone(train):
    run = train("--checkpointing_steps", 3, steps=6)
    before = run.adapter
    with pytest.raises(InputError, match="contains checkpoint-6 of a previous run"):
        train("--checkpointing_steps", 2, steps=2)
    assert all(torch.equal(run.adapter[name], weight) for name, weight in before.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rank", 8), r"checkpoint-4 belongs to another run: rank was 4, is 8"),
        (("--lora_alpha", 8), "lora_alpha was 4, is 8"),
        (("--seed", 1), "seed was 0, is 1"),
        (("--perceptual_min_snr", 2), r"perceptual_min_snr was 0\.0, is 2\.0"),
        (("--prediction_type", "v_prediction"), "prediction_type was None, is 'v_prediction'"),
        (("--max_train_samples", 3), "data was '7 images \\w+', is '3 images"),
        (
            ("--resume_from_checkpoint", "checkpoint-5"),
            "checkpoint-5 is not a complete .* has checkpoint-4",
        ),
    ],
)
def test_a_resume_that_would_be_another_run_is_refused(train, options, message):
    train("--checkpointing_steps", 4)
    with pytest.raises(InputError, match=message):
        train("--resume_from_checkpoint", "latest", *options)


def test_without_a_seed_one_is_drawn_and_a_resume_takes_it_over(train):
    first = train("--checkpointing_steps", 2, seed=None)
    resumed = train("--resume_from_checkpoint", first.folder / "checkpoint-2", output="resumed", seed=None)
    assert resumed == first
    assert train(output="other", seed=None) != first


def test_a_signal_ends_the_step_saves_and_exits_with_its_own_code(train, monkeypatch, tmp_path):
    draw, calls = script.draw_sample, []

    def interrupt_at_second_step(*args):
        calls.append(args)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(*args)

    monkeypatch.setattr(script, "draw_sample", interrupt_at_second_step)
    with pytest.raises(SystemExit) as exit:
        train()
    assert exit.value.code == 128 + signal.SIGTERM
    assert [path.name for path in checkpoints.find_checkpoints(tmp_path / "out")] == ["checkpoint-2"]
    monkeypatch.setattr(script, "draw_sample", draw)
    assert train("--resume_from_checkpoint", "latest") == train(output="straight")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda weights: {key: torch.zeros_like(w) for key, w in weights.items()},
            "predicts differently from the trained model, by up to",
        ),
        (lambda weights: {"base_model." + key: w for key, w in weights.items()}, "0 of 32 modules came back"),
        (lambda weights: dict(list(weights.items())[:8]), "4 of 32 modules came back"),
    ],
)
def test_an_export_that_does_not_load_as_trained_fails_the_run(train, monkeypatch, damage, message):
    to_tensors = lora_files.to_tensors
    monkeypatch.setattr(lora_files, "to_tensors", lambda layers: damage(to_tensors(layers)))
    with pytest.raises(TrainingError, match=message):
        train()


def test_an_adapter_that_was_not_trained_is_not_exported_as_one(train):
    with pytest.raises(TrainingError, match="changes nothing"):
        train("--learning_rate", 1e-30)


def test_a_model_that_predicts_no_finite_values_fails_the_run(train):
    with pytest.raises(TrainingError, match="predicts values that are not finite: lower `learning_rate`"):
        train("--learning_rate", 1e10)


def test_the_token_stays_out_of_trackers_and_log(train, monkeypatch, caplog):
    monkeypatch.setattr(Accelerator, "trackers", [], raising=False)
    seen = {}
    monkeypatch.setattr(Accelerator, "init_trackers", lambda self, name, config: seen.update(config))
    monkeypatch.setattr(sys, "argv", ["train", "--hub_token=hf_secret"])
    train("--hub_token", "hf_secret", "--validation_prompt", "a", "b", "--num_validation_images", 0)
    assert sys.argv == ["train", "--hub_token=***"]
    assert "`hub_token`" in caplog.text
    assert "hf_secret" not in caplog.text
    assert seen["rank"] == 4
    assert seen["validation_prompt"] == "['a', 'b']"
    assert "hf_secret" not in str(seen)
    assert {type(value) for value in seen.values()} <= {bool, int, float, str}


def test_tensorboard_takes_what_is_logged(train, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = Accelerator.log
    run = train("--report_to", "none")
    monkeypatch.undo()
    assert Accelerator.log is log
    options = ["--report_to", "tensorboard", "--validation_prompt", "a house", "--num_validation_images", "1"]
    args = script.parse_args(
        f"--pretrained_model_name_or_path x --train_data_dir y --output_dir {run.folder}".split() + options
    )
    reset_accelerate()
    accelerator = startup.start(args).accelerator
    script.start_trackers(accelerator, "text2image-fine-tune", args)
    accelerator.log(run.logs[0], 1)
    trackers.track_images(accelerator, "validation", {"a house": [Image.new("RGB", (32, 32))]}, 1)
    accelerator.end_training()
    events = EventAccumulator(str(run.folder / "logs" / "text2image-fine-tune"))
    events.Reload()
    assert {"train_loss", "denoising_loss", "gated_rows", "grad_norm", "lr"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["validation/a house"]


def test_the_hub_gets_adapter_card_and_picture_and_nothing_else(train, hub, drawings, tiny_sd):
    prompt = ("--validation_prompt", "a house", "--num_validation_images", 1)
    run = train("--push_to_hub", "--hub_token", "hf_writer", "--checkpointing_steps", 2, *prompt)
    repo = hub.repos["someone/out"]
    assert sorted(repo.files) == ["README.md", "before_after.png", "out.safetensors", script.WEIGHTS]
    card = (run.folder / "README.md").read_text()
    assert repo.files["README.md"].decode() == card
    for secret in ("hf_writer", str(tiny_sd), str(drawings)):
        assert secret not in card
    assert "base_model" not in card
    for line in (
        "license: creativeml-openrail-m",
        "| rank | 4 |",
        "| perceptual_loss | pixel |",
        "| steps | 4 |",
        "![before_after](./before_after.png)",
        "`out.safetensors` for AUTOMATIC1111",
    ):
        assert line in card
    repo.files["notes.md"] = b"by hand"
    train("--push_to_hub", "--hub_model_id", "out", output="again", steps=1)  # no validation prompt, no picture
    assert sorted(repo.files) == ["README.md", "notes.md", "out.safetensors", script.WEIGHTS]


def test_a_push_that_fails_keeps_the_files_and_says_how_to_retry(train, hub, tmp_path):
    hub.faults["commit"] = 409
    with pytest.raises(InputError, match=r"upload to someone/out failed: .*To upload them: python -c "):
        train("--push_to_hub")
    assert (tmp_path / "out" / script.WEIGHTS).is_file()


def test_a_hub_that_cannot_be_written_to_is_found_before_training(train, hub, tmp_path):
    with pytest.raises(InputError, match=r"`push_to_hub` cannot create out: .*access denied"):
        train("--push_to_hub", "--hub_token", "hf_reader")
    assert not (tmp_path / "out" / script.WEIGHTS).exists()


@pytest.mark.slow
def test_the_snippet_of_a_pushed_adapter_runs_as_it_stands(train, hub, tiny_sd, tmp_path, monkeypatch):
    """Base model and adapter come from the Hub."""
    base = hub.repos["someone/tiny-sd"] = Repo(private=False)
    base.files = {path.relative_to(tiny_sd).as_posix(): path.read_bytes() for path in files_in(tiny_sd)}
    words = ("--trigger_word", "sks", "--caption_template", "a {class}", "--license", "cc-by-4.0")
    source = ("--pretrained_model_name_or_path", "someone/tiny-sd", "--hub_private_repo")
    run = train("--push_to_hub", "--rank", 2, "--validation_share", 0.2, *source, *words)
    assert hub.repos["someone/out"].private
    card = ModelCard.load("someone/out")
    assert card.data.base_model == "someone/tiny-sd"
    assert card.data.license == "cc-by-4.0"
    assert card.data.instance_prompt == "sks"
    assert [example["text"] for example in card.data.widget] == ["sks, a house"]
    assert "trigger word 'sks'" in card.text
    assert "Captions come from class folders as 'a {class}' (" in card.text
    assert "On held-out images: denoising loss" in card.text
    snippet = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(snippet, names)
    assert Image.open("sketch.png").size == (32, 32)
    unet = names["pipeline"].unet
    loaded = get_peft_model_state_dict(unet, adapter_name=next(iter(unet.peft_config)))
    shapes, sums = zip(*sorted((tuple(weight.shape), float(weight.sum())) for weight in loaded.values()), strict=True)
    trained = sorted((tuple(weight.shape), float(weight.sum())) for weight in run.adapter.values())
    assert (shapes, sums) == tuple(zip(*trained, strict=True))


def test_a_dataset_folder_with_labels_and_captions(train, tmp_path, monkeypatch):
    import datasets

    rows = {
        "line": [Image.new("L", (32, 32), 10 * n) for n in range(3)],
        "text": ["poodle", "owl", "cat"],
        "label": [0, 1, 0],
    }
    features = datasets.Features(
        line=datasets.Image(), text=datasets.Value("string"), label=datasets.ClassLabel(names=["animal", "sea_bird"])
    )
    data = datasets.Dataset.from_dict(rows, features)
    (tmp_path / "parquet").mkdir()
    data.to_parquet(tmp_path / "parquet" / "train.parquet")
    data.save_to_disk(tmp_path / "arrow")
    read = []
    tokenize = encoding.tokenize
    monkeypatch.setattr(encoding, "tokenize", lambda *args: read.extend(args[1]) or tokenize(*args))
    options = ("--image_column", "line", "--max_train_steps", 2)
    train(*options, data=("--dataset_name", str(tmp_path / "parquet")))
    assert set(read) == {"poodle", "owl", "cat"}
    read.clear()
    train(*options, "--caption_column", "label", data=("--dataset_name", str(tmp_path / "arrow")))
    assert set(read) == {"a sketch of a animal", "a sketch of a sea bird"}


def test_long_captions_are_counted(train, tmp_path, caplog, drawings):
    path = tmp_path / "long"
    path.mkdir()
    Image.open(drawings / "house" / "0.png").save(path / "a.png")
    (path / "a.txt").write_text("a house " * 20)
    train(data=("--train_data_dir", str(path)))
    assert "1 captions have more than 77 tokens" in caplog.text


OFFICIAL = {
    "revision": None,
    "variant": None,
    "dataset_name": None,
    "dataset_config_name": None,
    "image_column": "image",
    "caption_column": "text",
    "validation_prompt": None,
    "num_validation_images": 4,
    "validation_epochs": 1,
    "max_train_samples": None,
    "output_dir": "sd-model-finetuned-lora",
    "cache_dir": None,
    "seed": None,
    "resolution": 512,
    "center_crop": False,
    "random_flip": False,
    "train_batch_size": 16,
    "num_train_epochs": 100,
    "max_train_steps": None,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "learning_rate": 1e-4,
    "scale_lr": False,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 500,
    "snr_gamma": None,
    "use_8bit_adam": False,
    "allow_tf32": False,
    "dataloader_num_workers": 0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_weight_decay": 1e-2,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "push_to_hub": False,
    "hub_token": None,
    "prediction_type": None,
    "hub_model_id": None,
    "logging_dir": "logs",
    "mixed_precision": None,
    "report_to": "tensorboard",
    "local_rank": -1,
    "checkpointing_steps": 500,
    "checkpoints_total_limit": None,
    "resume_from_checkpoint": None,
    "enable_xformers_memory_efficient_attention": False,
    "noise_offset": 0,
    "rank": 4,
    "image_interpolation_mode": "lanczos",
}


def test_options_and_defaults_are_the_official_scripts():
    args = vars(script.parse_args(["--pretrained_model_name_or_path", "x", "--train_data_dir", "y"]))
    assert {name: args[name] for name in OFFICIAL} == OFFICIAL
    assert (args["perceptual_crop"], args["perceptual_resolution"]) == (64, None)


def test_the_official_readmes_command_line_is_understood():
    command = """--pretrained_model_name_or_path=CompVis/stable-diffusion-v1-4
        --dataset_name=lambdalabs/naruto-blip-captions --caption_column=text --resolution=512 --random_flip
        --train_batch_size=1 --num_train_epochs=100 --checkpointing_steps=5000 --learning_rate=1e-04
        --lr_scheduler=constant --lr_warmup_steps=0 --seed=42 --output_dir=sd-naruto-model-lora
        --validation_prompt=creature --report_to=wandb"""
    args = script.parse_args(command.split())
    assert args.validation_prompt == ["creature"]
    assert args.learning_rate == 1e-4


def test_a_mistake_ends_without_a_traceback(tiny_sd, tmp_path):
    command = [sys.executable, "train_lora_sketch.py", "--pretrained_model_name_or_path", str(tiny_sd)]
    command += ["--train_data_dir", str(tmp_path / "nowhere"), "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(script.__file__).parent, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("train_lora_sketch.py: error: ")


DRIVER = """
import json, os, sys
import torch
import train_lora_sketch as script

steps, pipelines, names, draw, score = [], [], [], script.draw_sample, script.score
script.draw_sample = lambda batch, *args: names.append(batch["name"]) or draw(batch, *args)
def spy(*args):
    result = score(*args)
    steps.append([result.gated.tolist(), result.timesteps.tolist(), names[-1]])
    return result
script.score = spy
class Adapter(script.Adapter):
    def __init__(self, pipeline, *args, **options):
        super().__init__(pipeline, *args, **options)
        pipelines.append(pipeline)
script.Adapter = Adapter
args = script.parse_args(sys.argv[2:])
script.finish = lambda *rest: None
script.main(args)
rank = os.environ["RANK"]
trained = {n: p for n, p in pipelines[0].unet.named_parameters() if p.requires_grad}
torch.save(trained, f"{sys.argv[1]}/adapter-{rank}.pt")
json.dump(steps, open(f"{sys.argv[1]}/steps-{rank}.json", "w"))
"""


@pytest.mark.slow
def test_two_processes_share_batches_of_one_shape(tiny_sd, pages, tmp_path):
    (tmp_path / "driver.py").write_text(DRIVER)
    options = f"""--pretrained_model_name_or_path {tiny_sd} --output_dir {tmp_path / "out"} --resolution 32
        --train_data_dir {pages} --perceptual_loss pixel --train_batch_size 2 --num_train_epochs 2 --seed 0
        --learning_rate 1e-2 --lr_warmup_steps 0 --report_to none --fit bucket --feature_dir {tmp_path / "features"}"""
    done = two_processes(tmp_path / "driver.py", str(tmp_path), *options.split())
    assert done.returncode == 0, done.stderr[-3000:]
    adapters = [torch.load(tmp_path / f"adapter-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    steps = [json.loads((tmp_path / f"steps-{rank}.json").read_text()) for rank in (0, 1)]
    assert [len(rank) for rank in steps] == [6, 6]
    assert len({name for rank in steps for step in rank[:3] for name in step[2]}) == 7


@pytest.mark.slow
def test_two_processes_draw_apart_and_agree(tiny_sd, drawings, tmp_path):
    (tmp_path / "driver.py").write_text(DRIVER)
    options = f"""--pretrained_model_name_or_path {tiny_sd} --output_dir {tmp_path / "out"} --resolution 32
        --train_data_dir {drawings} --perceptual_loss pixel --train_batch_size 1 --num_train_epochs 3 --seed 0
        --learning_rate 1e-2 --lr_warmup_steps 2 --lr_scheduler linear --checkpointing_steps 6 --report_to none
        --center_crop --feature_dir {tmp_path / "features"} --perceptual_min_snr 1"""
    done = two_processes(tmp_path / "driver.py", str(tmp_path), *options.split())
    assert done.returncode == 0, done.stderr[-3000:]
    adapters = [torch.load(tmp_path / f"adapter-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    assert any(float(weight.detach().abs().max()) > 0 for name, weight in adapters[0].items() if "lora_B" in name)
    steps = [json.loads((tmp_path / f"steps-{rank}.json").read_text()) for rank in (0, 1)]
    assert len(steps[0]) == len(steps[1]) == 12  # three epochs of four batches: 7 images on 2 processes
    gates = [(a[0][0], b[0][0]) for a, b in zip(*steps, strict=True)]
    assert any(a != b for a, b in gates), "the gate was never open on one process and shut on the other"
    timesteps = [[step[1] for step in rank] for rank in steps]
    assert timesteps[0] != timesteps[1]
    names = [name for rank in steps for step in rank[:4] for name in step[2]]
    assert len(set(names)) == 7
    assert checkpoints.read_checkpoint(tmp_path / "out" / "checkpoint-12")["step"] == 12


def test_the_weight_of_the_term_may_change_on_a_resume_with_held_out_images(train):
    options = ("--validation_share", 0.3, "--checkpointing_steps", 2)
    train(*options, "--perceptual_weight", 0, steps=2)
    resume = ("--resume_from_checkpoint", "latest", "--resume_with", "perceptual_weight")
    run = train(*options, "--perceptual_weight", 0.3, *resume, "--validation_size", "64x32")
    assert "On held-out images: denoising loss" in (run.folder / "README.md").read_text()


def test_an_error_in_the_loop_keeps_the_steps_before_it(train, monkeypatch):
    straight = train(output="straight")
    draw, calls = script.draw_sample, []

    def fail(*args):
        calls.append(args)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return draw(*args)

    monkeypatch.setattr(script, "draw_sample", fail)
    with pytest.raises(torch.OutOfMemoryError):
        train()
    monkeypatch.setattr(script, "draw_sample", draw)
    assert train("--resume_from_checkpoint", "latest") == straight


def test_the_start_says_how_many_pictures_and_the_end_what_was_made(train, caplog, capsys):
    caplog.set_level("INFO")
    run = train("--validation_prompt", "a house", "--num_validation_images", 2, "--validation_epochs", 1, steps=8)
    assert "pictures: 4 during the run and 4 at its end, about 91% of the work" in caplog.text
    listing = capsys.readouterr().out
    for name in ("before_after.png", script.WEIGHTS, "out.safetensors"):
        assert name in listing
        assert (run.folder / name).is_file()
    assert "<lora:out:1>" in listing
    caplog.clear()
    train("--validation_prompt", "a house", "--num_validation_images", 2, "--validation_epochs", 9, output="other")
    assert "pictures: 0 during the run" in caplog.text
    assert "--validation_epochs" not in caplog.text


@pytest.mark.parametrize(
    ("colour", "says"), [("white", "nearly blank"), ("black", "far darker"), ("pink", "more colour"), (None, None)]
)
def test_pictures_unlike_the_drawings_are_warned_of(colour, says, drawings, caplog):
    paths = sorted(drawings.rglob("*.png"))
    data = CaptionedImages(paths, list(map(str, paths)), ["a"] * len(paths))
    pictures = [Image.open(path) if colour is None else Image.new("RGB", (32, 32), colour) for path in paths]
    caplog.set_level("INFO")
    Accelerator(cpu=True)  # which the log needs
    validation.compare_looks(data, [picture.convert("RGB") for picture in pictures])
    assert "your drawings: " in caplog.text and "% ink, strokes " in caplog.text
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert any(says in warning for warning in warnings) if says else warnings == []
