"""The README and the pages are true, and modules import one way only."""

import ast
import contextlib
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image

import distill_lora_sketch
import train_backbone
import train_johnson
import train_lora_sketch
import train_retrieval
from sketch_perceptual.commands import compare, convert, evaluate, search, stylize
from sketch_perceptual.drawings import __main__ as drawings

ROOT = Path(train_lora_sketch.__file__).parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
CODE = {page: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for page, text in PAGES.items()}

PACKAGE = ROOT / "sketch_perceptual"

# The floors: what each room, or module beside them, may import of the others.
MAY_IMPORT = {
    "errors": set(),
    "seeds": set(),
    "extras": {"errors"},
    "files": {"errors"},
    "cli": {"errors"},
    "figures": {"errors", "extras", "files"},
    "drawings": {"cli", "errors", "files"},
    "data": {"cli", "errors", "extras", "figures", "files", "seeds"},
    "networks": {"errors", "extras", "data", "files"},
    "losses": {"errors", "extras", "data", "drawings", "networks"},
    "measures": {"errors", "extras", "data", "networks", "seeds"},
    "training": {"__version__", "cli", "data", "errors", "files", "seeds"},
    "diffusion": {"cli", "errors", "losses", "networks", "training"},
    "lora": {
        *("cli", "errors", "figures", "files", "seeds"),
        *("data", "diffusion", "measures", "networks", "training"),
    },
    "evaluation": {
        *("cli", "errors", "extras", "figures", "files", "seeds"),
        *("data", "diffusion", "lora", "losses", "measures", "networks", "training"),
    },
    "commands": {
        *("__version__", "cli", "errors", "extras", "figures", "files", "seeds"),
        *("data", "diffusion", "evaluation", "lora", "losses", "measures", "networks", "training"),
    },
    "__main__": {"__version__", "cli", "extras"},
}
MAY_KNOW = {  # who may import what trains and draws
    "accelerate": {"training", "diffusion", "lora", "evaluation", "commands"},
    "diffusers": {"training", "diffusion", "lora", "evaluation"},
    "peft": {"lora", "evaluation"},
    "transformers": {"training", "evaluation"},
}
# Where options may be named: a library function's error names its argument, and the script the option.
COMMANDS = {
    *("commands/compare.py", "commands/convert.py", "commands/stylize.py", "commands/search.py"),
    *("commands/evaluate.py", "drawings/__main__.py"),
}
OPTIONS_FILES = {"training/options.py", "data/options.py", "diffusion/options.py", "diffusion/pipelines.py"}

FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
MODULES = sorted({file.split("/")[0].removesuffix(".py") for file in FILES} - {"__init__"})


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def test_every_room_has_its_floor():
    assert sorted(MAY_IMPORT) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_one_way_only(module):
    """A module, or a folder of them, which may import each other."""
    path = PACKAGE / module
    ours, outside = set(), set()
    for file in path.glob("*.py") if path.is_dir() else [PACKAGE / f"{module}.py"]:
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.Import):
                outside |= {name.name.split(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                outside.add(node.module.split(".")[0])
            elif isinstance(node, ast.ImportFrom) and node.level == 1 + path.is_dir():
                ours |= {node.module.split(".")[0]} if node.module else {name.name for name in node.names}
    assert ours <= MAY_IMPORT[module]
    assert {name for name, rooms in MAY_KNOW.items() if module not in rooms} & outside == set()


@pytest.mark.parametrize("file", FILES)
def test_only_commands_name_options(file):
    if file in {*COMMANDS, *OPTIONS_FILES, "__main__.py"} or file.startswith(("evaluation/", "lora/")):
        return
    texts = [node.value for node in ast.walk(tree(PACKAGE / file)) if isinstance(node, ast.Constant)]
    ours = set.union(*OPTIONS.values())
    assert [text for text in texts if isinstance(text, str) and set(re.findall(r"--\w+", text)) & ours] == []


@pytest.mark.parametrize("file", sorted(file for file in COMMANDS if file.startswith("commands/")))
def test_errors_of_commands_name_arguments(file):
    """Their help may name options, what they raise is put into options by `in_options`."""
    raised = [node for node in ast.walk(tree(PACKAGE / file)) if isinstance(node, ast.Raise)]
    texts = [node.value for error in raised for node in ast.walk(error) if isinstance(node, ast.Constant)]
    assert texts
    assert [text for text in texts if isinstance(text, str) and "--" in text] == []


@pytest.mark.parametrize("code", ["import sketch_perceptual", "from sketch_perceptual import *; PerceptualLoss()"])
def test_a_loss_needs_little(code):
    heavy = "accelerate diffusers peft transformers datasets torchvision matplotlib".split()
    code += f"; import sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def options_of(parse_args, *arguments):
    """The options in a script's --help."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
        parse_args([*arguments, "--help"])
    return set(re.findall(r"--\w+", text.getvalue()))


TRAINERS = {
    "train_lora_sketch.py": train_lora_sketch,
    "distill_lora_sketch.py": distill_lora_sketch,
    "train_backbone.py": train_backbone,
    "train_johnson.py": train_johnson,
    "train_retrieval.py": train_retrieval,
}
OPTIONS = {name: options_of(script.parse_args) for name, script in TRAINERS.items()}
OPTIONS |= {
    f"sketch-perceptual evaluate {task}": options_of(evaluate.parse_args, task)
    for task in ("distance", "retrieval", "transfer", "generation")
}
OPTIONS |= {
    "sketch-perceptual compare": options_of(compare.main),
    "sketch-perceptual search": options_of(search.main),
    "sketch-perceptual stylize": options_of(stylize.main),
    "sketch-perceptual convert": options_of(convert.main),
    "sketch_perceptual.drawings": options_of(drawings.main),
}
SCRIPT = re.compile(r"(?:train|distill)_\w+\.py|(?<=-m )sketch_perceptual\.\w+|sketch-perceptual (?:evaluate )?[a-z]+")
NOT_OURS = {"--mixed_precision"}  # of `accelerate launch`, where it stands before the script


def commands(text):
    """Each command in a page, or in a part of it: the script, and what follows it on the line."""
    blocks = re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)
    for line in "\n".join(blocks).replace("\\\n", " ").split("\n"):
        if script := SCRIPT.search(line):
            yield script[0], line[script.end() :]


COMMAND_LINES = [(page, *command) for page, text in PAGES.items() for command in commands(text)]


def sections():
    """(page, title) -> text, and the scripts whose commands are in it, or else in the page."""
    for page, text in PAGES.items():
        for section in re.split(r"^(?=#+ )", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE):
            title, _, text_of_section = section.partition("\n")
            scripts = [script for script, _ in list(commands(text_of_section)) or commands(text)]
            yield (page, title.strip("# ")), text_of_section, [script for script in scripts if script in OPTIONS]


SECTIONS = {place: (text, scripts) for place, text, scripts in sections() if "`--" in text}
# Sections that name options of other scripts than those whose commands stand there.
ABOUT = {
    "sketch-perceptual": ["train_lora_sketch.py"],
    "What survives what": list(TRAINERS),
    "Expected results": ["train_lora_sketch.py", "train_backbone.py", "train_retrieval.py"],
    "What the paper leaves open": ["train_lora_sketch.py", "train_backbone.py"],
    "A loss of your own": ["train_lora_sketch.py"],
}


@pytest.mark.parametrize(("page", "script", "line"), COMMAND_LINES)
def test_commands_in_the_pages_have_their_own_options(page, script, line):
    assert set(re.findall(r"--\w+", line)) <= OPTIONS[script]


@pytest.mark.parametrize("place", SECTIONS, ids=" / ".join)
def test_options_in_a_section_are_those_of_its_scripts(place):
    (text, scripts), (_, title) = SECTIONS[place], place
    named = set(re.findall(r"`(--\w+)", text)) - NOT_OURS
    if title == "What survives what":  # the same for all trainers
        known = set.intersection(*(OPTIONS[script] for script in ABOUT[title]))
    else:
        known = set.union(*(OPTIONS[script] for script in ABOUT.get(title, scripts)))
    assert named <= known


def anchors(text):
    """Of its headings, as code hosts name them."""
    titles = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


STUDIES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "research").glob("*.md"))
LINKED = [*PAGES, "benchmarks/README.md", *STUDIES]


@pytest.mark.parametrize("page", LINKED)
def test_links_in_a_page_lead_somewhere(page):
    for link in re.findall(r"\]\((?!http)([^)]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_every_page_is_in_the_contents_of_the_site():
    listed = re.findall(r"^[\w/-]+$", (ROOT / "docs/conf.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert {page.removesuffix(".md") for page in LINKED} - {"README"} <= set(listed)
    assert [name for name in listed if not (ROOT / f"{name}.md").is_file()] == []


def test_the_readme_is_two_screens():
    assert len(PAGES["README.md"].splitlines()) <= 115


def test_the_recipe_goes_into_a_plain_training_loop(tiny_sd):
    page = CODE["docs/use-the-loss.md"]
    build = next(code for code in page if "PerceptualTerm(" in code)
    call, call_with_prior, call_from_latents = (code for code in page if ".add(" in code)
    assert {build, call} <= set(CODE["README.md"])
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
    names["loss"].backward(retain_graph=True)
    assert pipeline.unet.conv_in.weight.grad.abs().sum() > 0
    names |= {"torch": torch, "model_input": latents, "noisy_model_input": noisy_latents, "loss": plain}
    exec(call_from_latents, names)
    assert names["loss"] > plain
    model_pred, prior_pred = model_pred.chunk(2)
    half, prior = ((x - y).square().mean() for x, y in zip((model_pred, prior_pred), noise.chunk(2), strict=True))
    names |= {"model_pred": model_pred, "loss": half + prior}
    exec(call_with_prior, names)
    assert names["loss"] > half + prior


@pytest.mark.parametrize("number", [0, 1])
def test_drawings_are_found_as_shown(number, tmp_path, monkeypatch, drawings, capsys):
    """Alone, and with FAISS."""
    code = CODE["docs/find-drawings.md"][number]
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


@pytest.mark.parametrize("factory", ["SQ8", "PQ8x4", "PCA32,SQ8", "IVF4,Flat", "OPQ8,PQ8x4"])
def test_compressed_indexes_are_made_as_shown(factory):
    faiss = pytest.importorskip("faiss")
    vectors = torch.nn.functional.normalize(torch.randn(300, 64, generator=torch.Generator().manual_seed(0)))
    gallery = datasets.Dataset.from_dict({"embedding": vectors.numpy()})
    gallery.add_faiss_index("embedding")
    exec(CODE["docs/find-drawings.md"][2].replace("SQ8", factory), {"gallery": gallery, "faiss": faiss})
    _, nearest = gallery.get_nearest_examples("embedding", vectors[3].numpy(), k=1)
    assert nearest["embedding"][0] == pytest.approx(vectors[3].tolist())


def test_the_loss_alone_runs_as_shown(capsys):
    alone, *_, own = CODE["docs/use-the-loss.md"]
    exec(alone.replace("256, 256", "64, 64"), {})
    assert "tensor([" in capsys.readouterr().out
    exec(own, {})
