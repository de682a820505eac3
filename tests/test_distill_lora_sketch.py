"""Students that draw in few steps: their pairs, their start, their training and their files."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, reset_accelerate
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline
from huggingface_hub import ModelCard
from PIL import Image
from processes import two_processes
from safetensors import safe_open
from safetensors.torch import load_file

import distill_lora_sketch as script
from sketch_perceptual.diffusion import process_of
from sketch_perceptual.errors import InputError
from sketch_perceptual.lora import files as lora_files
from sketch_perceptual.lora.adapter import Adapter
from sketch_perceptual.lora.files import Layer
from sketch_perceptual.lora.samples import Sample

MODULES = {  # each with another rank and alpha
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q": (2, 3.0),
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (3, 3.0),
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_v": (2, 1.0),
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (4, 2.0),
}


def make_layers(modules=MODULES, dora=False):
    torch.manual_seed(1)
    return {
        name: Layer(
            torch.randn(rank, 16) / 4, torch.randn(16, rank) / 4, alpha, torch.rand(16) + 0.5 if dora else None
        )
        for name, (rank, alpha) in sorted(modules.items())
    }


@pytest.fixture
def teacher(tmp_path):
    path = tmp_path / "teacher.safetensors"
    lora_files.write_kohya(path, make_layers(), {})
    return path


@pytest.fixture
def distill(tiny_sd, teacher, tmp_path, monkeypatch, signals):
    """Distil in this process: six pairs of 32 px, three steps of two."""
    (tmp_path / "prompts.txt").write_text("a fox\nan owl\n")

    def distill(*options, output="student", prompts=tmp_path / "prompts.txt", lora=teacher):
        reset_accelerate()
        logs = []
        monkeypatch.setattr(Accelerator, "log", lambda self, values, step: logs.append({"step": step} | values))
        fixed = f"""--pretrained_model_name_or_path {tiny_sd} --teacher_lora {lora} --prompts {prompts}
            --output_dir {tmp_path / output} --num_pairs 6 --teacher_num_inference_steps 2 --resolution 32
            --num_train_epochs 1 --train_batch_size 2 --perceptual_loss pixel --report_to none --seed 0"""
        script.main(script.parse_args([*fixed.split(), *map(str, options)]))
        return tmp_path / output, logs

    return distill


def student_of(folder):
    return load_file(folder / script.WEIGHTS)


@pytest.mark.parametrize("dora", [False, True])
def test_a_student_starts_as_its_teacher(tiny_sd, tmp_path, dora):
    """Whatever the ranks and alphas; and can be saved and loaded with them."""
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    layers = make_layers(dora=dora)
    adapter = Adapter.of_layers(pipeline, layers)
    back = adapter.layers()
    assert back.keys() == layers.keys()
    for name, layer in layers.items():
        assert back[name].alpha == layer.alpha
        assert torch.equal(back[name].down, layer.down)
        assert torch.equal(back[name].up, layer.up)
        assert not dora or torch.equal(back[name].magnitude, layer.magnitude)
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    layer, linear = layers[f"unet.{name}"], pipeline.unet.get_submodule(name)
    weight = linear.base_layer.weight + layer.alpha / layer.rank * layer.up @ layer.down
    if dora:
        weight = weight * (layer.magnitude / weight.norm(dim=1))[:, None]
    x = torch.randn(3, 16)
    torch.testing.assert_close(linear(x), x @ weight.T)
    adapter.save(tmp_path)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.zero_()
    adapter.load(tmp_path)
    torch.testing.assert_close(linear(x), x @ weight.T)


def test_a_student_is_drawn_with_as_its_card_says(distill, tiny_sd, tmp_path, capsys):
    folder, logs = distill("--validation_prompt", "a fox", "--num_validation_images", 1)
    assert [log["step"] for log in logs if "train_loss" in log] == [1, 2, 3]
    assert all(log["gated_rows"] == 1 for log in logs if "train_loss" in log)
    before = lora_files.folded(lora_files.read(tmp_path / "teacher.safetensors").layers)
    after = lora_files.read(folder / "student.safetensors").layers
    assert before.keys() == after.keys()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name].up, after[name].up)}
    assert changed == {"unet"}  # the text encoder's are the teacher's
    with safe_open(folder / "student.safetensors", "pt") as file:
        assert file.metadata()["modelspec.usage_hint"] == "sampler ddim, scheduler sgm_uniform, 4 steps, CFG 1"
    assert "sampler ddim, scheduler sgm_uniform, 4 steps, CFG 1" in capsys.readouterr().out

    card = ModelCard.load(folder / "README.md")
    (snippet,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    snippet = snippet.replace("path/to/stable-diffusion-v1-5", str(tiny_sd)).replace(
        "path/to/this/folder", str(folder)
    )
    snippet = snippet.replace("sketch.png", str(tmp_path / "drawn.png"))
    scope: dict = {}
    exec(snippet, scope)
    assert scope["pipeline"].scheduler.timesteps.tolist() == [999, 749, 499, 249]
    assert Image.open(tmp_path / "drawn.png").size == (32, 32)
    assert Image.open(folder / "before_after.png").width > 2 * 32


def test_a_student_goes_on_bit_for_bit(distill):
    options = ("--num_train_epochs", 2, "--checkpointing_steps", 3)
    folder, _ = distill(*options)
    whole = student_of(folder)
    (folder / script.WEIGHTS).unlink()
    distill(*options, "--resume_from_checkpoint", "checkpoint-3")
    resumed = student_of(folder)
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    with pytest.raises(InputError, match="num_inference_steps was 4, is 2"):
        distill(*options, "--num_inference_steps", 2, "--resume_from_checkpoint", "checkpoint-3")
    (folder.parent / "prompts.txt").write_text("a fox\n")
    with pytest.raises(InputError, match="prompts was"):
        distill(*options, "--resume_from_checkpoint", "checkpoint-3")


def test_pairs_are_drawn_once(distill, tmp_path):
    first, _ = distill()
    pairs = first / "pairs"
    rows = [json.loads(line) for line in (pairs / "metadata.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == ["a fox", "an owl"] * 3
    files = {path: path.read_bytes() for path in pairs.iterdir() if path.suffix in (".png", ".safetensors")}
    assert len(files) == 12
    (pairs / "00001.png").unlink()
    (pairs / "00004.safetensors").unlink()
    again, _ = distill("--pairs_dir", pairs, output="again")
    assert all(path.read_bytes() == content for path, content in files.items())
    assert (again / script.WEIGHTS).read_bytes() == (first / script.WEIGHTS).read_bytes()
    assert not (again / "pairs").exists()

    with pytest.raises(InputError, match=r"was drawn with num_inference_steps=2, not 3: choose another `pairs_dir`"):
        distill("--pairs_dir", pairs, "--teacher_num_inference_steps", 3, output="other")
    lora_files.write_kohya(tmp_path / "other.safetensors", make_layers({**MODULES, next(iter(MODULES)): (2, 9.0)}), {})
    with pytest.raises(InputError, match=r"was drawn with unet=.*`pairs_dir`"):
        distill("--pairs_dir", pairs, lora=tmp_path / "other.safetensors", output="other")
    (pairs / "00002.safetensors").write_bytes(b"\0" * 9)
    with pytest.raises(InputError, match=r"00002\.safetensors cannot be read .*: delete it to draw it again"):
        distill("--pairs_dir", pairs, output="damaged")


def test_prompts_may_be_captions(distill, drawings, tmp_path):
    folder, _ = distill("--caption_template", "one {class}", "--trigger_word", "ink", prompts=drawings)
    rows = [json.loads(line) for line in (folder / "pairs" / "metadata.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == ["ink, one house", "ink, one snow man"] * 3


def test_a_dry_run_reads_the_teacher_and_the_prompts(distill, tmp_path, caplog):
    folder, _ = distill("--dry_run")
    assert "4 layers of rank 2, 3, 4; 6 pictures of 2 prompts, 24 passes of the U-Net" in caplog.text
    assert not folder.exists()
    only_text = {name: values for name, values in MODULES.items() if name.startswith("text")}
    lora_files.write_kohya(tmp_path / "text.safetensors", make_layers(only_text), {})
    with pytest.raises(InputError, match=r"text\.safetensors has no layers of the U-Net"):
        distill("--dry_run", lora=tmp_path / "text.safetensors")
    with pytest.raises(InputError, match=r"`prompts` .*nowhere\.txt cannot be read"):
        distill("--dry_run", prompts=tmp_path / "nowhere.txt")


def test_teachers_that_do_not_fit_or_overflow_are_refused(distill, tmp_path):
    wide = {
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q": Layer(torch.ones(2, 24), torch.ones(24, 2), 1)
    }
    lora_files.write_kohya(tmp_path / "wide.safetensors", wide, {})
    with pytest.raises(InputError, match=r"to_q is \(16, 16\) in the model, \(24, 24\) in the LoRA"):
        distill(lora=tmp_path / "wide.safetensors")
    loud = {name: Layer(x.down * 1e25, x.up * 1e25, x.alpha) for name, x in make_layers().items()}
    lora_files.write_kohya(tmp_path / "loud.safetensors", loud, {})
    with pytest.raises(InputError, match="pictures of the teacher are not finite"):
        distill(lora=tmp_path / "loud.safetensors", output="loud")


@pytest.mark.slow
def test_two_processes_share_the_pairs(distill, tiny_sd, teacher, tmp_path):
    single, _ = distill()
    options = f"""--pretrained_model_name_or_path {tiny_sd} --teacher_lora {teacher}
        --prompts {tmp_path / "prompts.txt"} --output_dir {tmp_path / "two"}
        --num_pairs 6 --teacher_num_inference_steps 2 --resolution 32 --num_train_epochs 1 --train_batch_size 2
        --perceptual_loss pixel --report_to none --seed 0 --generation_batch_size 2"""
    done = two_processes(ROOT / "distill_lora_sketch.py", *options.split())
    assert done.returncode == 0, done.stderr[-3000:]
    for path in sorted((single / "pairs").glob("*.safetensors")):
        expected, found = load_file(path), load_file(tmp_path / "two" / "pairs" / path.name)
        assert torch.equal(found["noise"], expected["noise"])
        torch.testing.assert_close(found["latents"], expected["latents"], rtol=1e-3, atol=1e-3)
    weights = student_of(tmp_path / "two")
    assert weights.keys() == student_of(single).keys()
    assert all(weight.isfinite().all() for weight in weights.values())


class Perfect(torch.nn.Module):
    """Predicts the noise between what it is given and the clean latents; notes what it is given."""

    def __init__(self, process, clean):
        super().__init__()
        self.process, self.clean = process, clean

    def forward(self, noisy, timesteps, embeds, return_dict):
        self.given = noisy
        alpha, sigma = (factor.view(-1, 1, 1, 1) for factor in self.process.factors(timesteps))
        return (((noisy - alpha * self.clean) / sigma).requires_grad_(),)


def test_the_loss_is_that_of_the_steps_that_draw(tiny_sd):
    """A student that makes no error has none, and DDIM then draws the pair's picture from its noise."""
    process = process_of(DDPMScheduler.from_pretrained(tiny_sd, subfolder="scheduler"))
    scheduler = DDIMScheduler.from_config(process.noise_scheduler.config, **script.DDIM)
    scheduler.set_timesteps(4)
    clean, noise = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8)
    unet = Perfect(process, clean)
    sample = Sample(clean, noise, scheduler.timesteps, torch.zeros(4, 1))
    losses = script.score(unet, process, None, scheduler.timesteps[0], 0, sample, torch.Generator())
    assert float(losses.denoising.detach().max()) < 1e-4
    assert torch.equal(unet.given[0], noise[0])
    assert not torch.allclose(unet.given[1], noise[1], atol=0.1)
    latents = noise
    for timestep in scheduler.timesteps:
        (predicted,) = unet(latents, timestep.expand(4), None, return_dict=False)
        latents = scheduler.step(predicted, timestep, latents).prev_sample
    torch.testing.assert_close(latents, clean, atol=0.2, rtol=0)  # the last step leaves the schedule's least noise

    off = SimpleNamespace(predict_x0=lambda *_: clean + 0.5, add_noise=process.add_noise)
    losses = script.score(unet, off, None, scheduler.timesteps[0], 0, sample, torch.Generator())
    expected = (0.5**2 + script.HUBER**2) ** 0.5 - script.HUBER
    torch.testing.assert_close(losses.denoising.detach(), torch.full((4,), expected))
