"""The README is true, and modules import one way only."""

import ast
import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image

import evaluate
import train_backbone
import train_johnson
import train_lora_sketch
import train_retrieval
from sketch_perceptual import __main__ as compare

ROOT = Path(train_lora_sketch.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)

MAY_IMPORT = {
    "errors": set(),
    "seeds": set(),
    "figures": set(),
    "drawings": {"errors"},
    "data": {"errors", "seeds", "running"},
    "networks": {"errors", "data"},
    "losses": {"errors", "data", "drawings", "networks"},
    "diffusion": {"errors"},
    "measures": {"errors", "data", "networks", "seeds"},
    "running": {"errors", "data", "networks"},
    "evaluation": {"errors", "data", "diffusion", "measures", "networks", "running", "seeds"},
    "johnson": {"errors", "data", "networks"},
}
TRAINING = {"accelerate", "diffusers", "peft", "transformers"}
MAY_TRAIN = {"data", "running", "evaluation"}

MODULES = {path.stem for path in (ROOT / "sketch_perceptual").glob("[a-z]*")} - {"assets"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_modules_import_one_way_only(module):
    """A module, or a folder of them, which may import each other."""
    path = ROOT / "sketch_perceptual" / module
    files = path.glob("*.py") if path.is_dir() else [path.with_suffix(".py")]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    ours = {node.module.split(".")[0] for node in froms if node.level == 1 + path.is_dir()}
    outside = {name.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for name in node.names}
    outside |= {node.module.split(".")[0] for node in froms if not node.level}
    assert ours <= MAY_IMPORT[module]
    assert module in MAY_TRAIN or not outside & TRAINING


def test_options_and_files_in_the_readme_exist():
    options = set(re.findall(r"`?(--\w+)", README))
    data = ["--train_data_dir", "y"]
    known = vars(train_lora_sketch.parse_args(["--pretrained_model_name_or_path", "x", *data]))
    known |= vars(train_backbone.parse_args(data)) | vars(train_retrieval.parse_args(data))
    known |= vars(train_johnson.parse_args([*data, "--style", "x"])) | {"input": None, "output": None}
    for task in (
        ["distance", *data],
        ["retrieval", *data],
        ["transfer", "--paired_data_dir", "x", "--models", "y"],
        ["generation", *data, "--models", "y"],
        ["search", "--query", "x", "--gallery", "y"],
    ):
        known |= vars(evaluate.parse_args(task))
    known |= vars(compare.parse_args(["a.png", "b.png"]))
    assert {option[2:] for option in options} <= set(known)
    for path in re.findall(r"\]\((?!http|#)([^)]+)\)", README):
        assert (ROOT / path).is_file(), path


def test_the_recipe_goes_into_a_plain_training_loop(tiny_sd):
    build, call = (
        next(code for code in CODE if "PerceptualTerm(" in code),
        next(code for code in CODE if "loss +" in code),
    )
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    noise_scheduler = DDPMScheduler.from_pretrained(tiny_sd, subfolder="scheduler")
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        latents = pipeline.vae.encode(images).latent_dist.sample() * pipeline.vae.config.scaling_factor
    noise, timesteps = torch.randn_like(latents), torch.tensor([100, 900])
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    model_pred = pipeline.unet(noisy_latents, timesteps, torch.zeros(2, 77, 16), return_dict=False)[0]
    plain = (model_pred - noise).square().mean()
    names = {"vae": pipeline.vae, "noise_scheduler": noise_scheduler, "batch": {"pixel_values": images}, "loss": plain}
    names |= {"model_pred": model_pred, "noisy_latents": noisy_latents, "timesteps": timesteps}
    exec(build, names)
    exec(call, names)
    assert names["loss"] > plain
    names["loss"].backward()
    assert pipeline.unet.conv_in.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("number", [0, 1])
def test_drawings_are_found_as_shown(number, tmp_path, monkeypatch, drawings, capsys):
    """Alone, and with FAISS."""
    code = [code for code in CODE if "embedder" in code][number]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(drawings, tmp_path / "drawings")
    images = sorted(drawings.rglob("*.png"))
    for name, path in zip(("fox.png", "wolf.png"), images, strict=False):
        shutil.copy(path, name)
    names = {}
    exec(code.replace("load_embedder()", "load_embedder(resolution=32)"), names)
    if number == 0:
        assert names["vectors"].shape == (2, 512)
        return
    assert names["similarities"][0] == pytest.approx(1, abs=1e-4)
    assert names["similarities"].tolist() == sorted(names["similarities"], reverse=True)
    assert np.array_equal(np.asarray(names["found"]["image"][0]), np.asarray(Image.open(images[0])))
    again = datasets.Dataset.from_dict({"image": list(map(str, images))})
    again.load_faiss_index("embedding", "drawings.faiss")
    assert again.get_nearest_examples("embedding", names["embedder"].embed(["fox.png"])[0].numpy(), k=1)[1] == {
        "image": [str(images[0])]
    }


def test_the_loss_alone_runs_as_shown(capsys):
    exec(next(code for code in CODE if "prediction, target" in code).replace("256, 256", "64, 64"), {})
    assert "tensor([" in capsys.readouterr().out
