"""Pictures for prompts, and their scores."""

import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import NARROW, ROOT, reset_accelerate
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from processes import two_processes
from tiny_clip import save_clip

from sketch_perceptual.commands import evaluate as script
from sketch_perceptual.data.images import fit_image, to_tensor
from sketch_perceptual.errors import InputError
from sketch_perceptual.files import MARK
from sketch_perceptual.lora import sampling
from sketch_perceptual.lora.sampling import draw_prompts
from sketch_perceptual.measures.image_quality import frechet_distance
from sketch_perceptual.measures.strokes import SHAPE
from sketch_perceptual.networks.backbone import AttentionVGG16
from sketch_perceptual.networks.embedder import load_embedder


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def adapters(tiny_sd, tmp_path):
    """A LoRA for each of two seeds, strong enough to change what is drawn."""
    unet = StableDiffusionPipeline.from_pretrained(tiny_sd).unet
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    for seed in (1, 2):
        torch.manual_seed(seed)
        for name, weight in unet.named_parameters():
            if "lora" in name:
                torch.nn.init.normal_(weight, std=0.7)
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
        StableDiffusionPipeline.save_lora_weights(tmp_path / "loras" / f"seed-{seed}", layers)
    return tmp_path / "loras"


@pytest.fixture
def evaluate(narrow, tiny_sd, drawings, tmp_path, capsys):
    """Score models in this process; the table and what was written."""
    torch.manual_seed(0)
    classes = ["house", "snow_man"]
    options = {"pool_after_attention": True, "num_classes": 2, "head": "linear", "reduction": 2, "classes": classes}
    AttentionVGG16(**options).save_pretrained(tmp_path / "classifier")

    def evaluate(*models, **options):
        reset_accelerate()
        capsys.readouterr()
        script.evaluate(script.parse_args(command(tiny_sd, drawings, tmp_path, *models, **options)))
        return capsys.readouterr().out.splitlines(), json.loads((tmp_path / "generation.json").read_text())

    return evaluate


def command(tiny_sd, drawings, folder, *models, **options):
    fixed = {"train_data_dir": drawings, "pretrained_model_name_or_path": tiny_sd, "num_images": 7}
    fixed |= {"output_dir": folder / "generated", "output": folder / "generation.json"}
    fixed |= {"feature_dir": folder / "features", "backbone": folder / "classifier"}
    fixed |= {"num_inference_steps": 2, "resolution": 32, "generation_batch_size": 2} | options
    pairs = [item for name, value in fixed.items() for item in (f"--{name}", value) if item is not True]
    return list(map(str, ["generation", *pairs, "--models", *models]))


def test_models_and_folders_are_scored_side_by_side(evaluate, adapters, clip, drawings, tmp_path, monkeypatch):
    (adapters / "seed-1" / "README.md").write_text(f"{MARK}\n# LoRA\n\n## Scores\n\nold\n\n## Training\n\noptions\n")
    printed, record = evaluate(
        "base=none",
        f"lora={adapters}",
        f"copies={drawings}",
        clip_model=clip,
        classifier=tmp_path / "classifier",
        figure=tmp_path / "sheet.png",
        write_scores=True,
    )
    scores = "images frechet kernel clip accuracy nearest_same strokes shape width ends edge paper ink chroma"
    assert printed[0].split() == scores.split()
    assert [line.split()[0] for line in printed[1:5]] == ["the", "base", "lora", "copies"]
    assert printed[1].split()[2:4] == ["7", printed[1].split()[3]]  # the drawings have no distance to themselves
    card = (adapters / "seed-1" / "README.md").read_text()
    assert card.startswith(f"{MARK}\n# LoRA\n\n## Scores\n\n|  | images | frechet |") and card.endswith(
        "## Training\n\noptions\n"
    )
    assert card.count("\n| lora | 7 |") == 1 and "old" not in card
    assert "2 prompts, 2 steps at guidance 7.5, seed 0; `frechet` in the features of another backbone." in card
    assert printed[-1] == str(adapters / "seed-1" / "README.md")
    base, lora, copies = (record["models"][name] for name in ("base", "lora", "copies"))
    assert [run["model"] for run in lora["runs"]] == ["seed-1", "seed-2"]
    assert lora["deviation"]["frechet"] > 0
    assert len({run["unet"] for run in [*base["runs"], *lora["runs"]]}) == 3
    assert copies["mean"]["frechet"] == pytest.approx(0, abs=1e-4)
    assert copies["mean"]["nearest_same"] == 1
    of_the_drawings = record["models"]["the drawings"]["mean"]
    assert copies["mean"]["strokes"] == 0 < base["mean"]["strokes"]
    assert copies["mean"]["shape"] == pytest.approx(0, abs=0.5)
    ink = base["runs"][0]["as_drawn"]["ink"]
    assert ink["difference"] == pytest.approx(base["mean"]["ink"] - of_the_drawings["ink"])
    assert set(base["runs"][0]["equal_ink"]) == {"level", "ink", *SHAPE}
    for score in ("clip", "clip_cosine", "accuracy", "chroma", "ink", "ends"):
        assert copies["mean"][score] == pytest.approx(of_the_drawings[score])
    assert of_the_drawings["chroma"] == 0 < base["mean"]["chroma"]

    folder = tmp_path / "generated" / "base"
    lines = map(json.loads, (folder / "metadata.jsonl").read_text().splitlines())
    paths, texts = zip(*((folder / line["file_name"], line["text"]) for line in lines), strict=True)
    assert sorted(set(texts)) == ["a sketch of a house", "a sketch of a snow man"]
    embedder = load_embedder(tmp_path / "classifier", resolution=32, fit="crop")
    drawn, true = (
        torch.stack([embedder.prepare(path) for path in of]) for of in (paths, sorted(drawings.rglob("*.png")))
    )
    true = torch.stack([to_tensor(fit_image(Image.open(path), 32)) for path in sorted(drawings.rglob("*.png"))])
    expected = frechet_distance(embedder.features(drawn), embedder.features(true))
    assert base["mean"]["frechet"] == pytest.approx(expected, rel=1e-3)
    assert Image.open(tmp_path / "sheet.png").width > 6 * 160

    monkeypatch.setattr(sampling, "draw_prompts", None)  # all is there
    paths[0].touch()
    again = evaluate("base=none", f"folder={folder}")[1]["models"]
    assert again["base"]["mean"] == pytest.approx(again["folder"]["mean"])
    assert again["base"]["mean"]["frechet"] == pytest.approx(base["mean"]["frechet"])


def test_an_interrupted_drawing_goes_on(evaluate, tmp_path, monkeypatch):
    evaluate("none")
    whole = {path.name: path.read_bytes() for path in (tmp_path / "generated" / "none").glob("*.png")}
    for name in ("00003.png", "00006.png"):
        (tmp_path / "generated" / "none" / name).unlink()
    drawn = []

    def note(pipeline, prompts, paths, **options):
        drawn.extend(path.name for path in paths)
        draw_prompts(pipeline, prompts, paths, **options)

    monkeypatch.setattr(sampling, "draw_prompts", note)
    evaluate("none")
    assert drawn == ["00003.png", "00006.png"]
    for name in drawn:
        assert abs(pixels(tmp_path / "generated" / "none" / name)).max() > 0
    assert {path.name for path in (tmp_path / "generated" / "none").glob("*.png")} == set(whole)


def test_black_squares_are_counted_and_not_scored(evaluate, drawings, tmp_path, caplog):
    for path in sorted(drawings.rglob("*.png")):
        copy = tmp_path / "pictures" / path.parent.name / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    _, clean = evaluate(tmp_path / "pictures")
    for number in range(3):
        Image.new("RGB", (32, 32)).save(tmp_path / "pictures" / "house" / f"black-{number}.png")
    _, record = evaluate(tmp_path / "pictures")
    (run,) = record["models"]["pictures"]["runs"]
    assert (run["images"], run["black"]) == (7, 3)
    assert record["models"]["pictures"]["mean"] == clean["models"]["pictures"]["mean"]
    assert "pictures: 3 of 10 pictures are entirely black" in caplog.text


def test_a_damaged_picture_and_one_of_another_size_are_drawn_again(evaluate, tmp_path):
    _, whole = evaluate("none")
    folder = tmp_path / "generated" / "none"
    before = {path.name: pixels(path) for path in sorted(folder.glob("*.png"))}
    Image.new("RGB", (16, 16), "white").save(folder / "00001.png")
    (folder / "00002.png").write_bytes((folder / "00002.png").read_bytes()[:99])
    _, again = evaluate("none")
    for name, picture in before.items():
        assert abs(pixels(folder / name) - picture).max() <= 1
    assert again["models"]["none"]["mean"]["chroma"] == pytest.approx(
        whole["models"]["none"]["mean"]["chroma"], rel=0.1
    )


def test_a_folder_that_is_no_model_is_explained(evaluate, tmp_path):
    folder = tmp_path / "samples"
    folder.mkdir()
    with pytest.raises(InputError, match=r"`models` .*samples .*LoRA .*no images"):
        evaluate(folder)
    for index in range(2):
        Image.effect_noise((32, 32), 50).save(folder / f"{index}.png")
    with pytest.raises(InputError, match=r"`models` .*samples .*LoRA .*2 of 2"):
        evaluate(folder)
    _, record = evaluate(folder, default_caption="a fox")  # as the sentence says
    assert record["models"]["samples"]["mean"]["frechet"] > 0


def test_a_path_with_an_equals_sign_is_a_model(evaluate, adapters, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(adapters / "seed-1", tmp_path / "runs" / "lr=1e-4" / "best")
    _, record = evaluate("runs/lr=1e-4/best", "again=runs/lr=1e-4/best")
    assert {"best", "again"} < set(record["models"])
    assert record["models"]["best"]["runs"][0]["unet"] == record["models"]["again"]["runs"][0]["unet"]


HOLD = """
import sys
from sketch_perceptual.training.lock import lock_folder

lock_folder(sys.argv[1])
print("held", flush=True)
input()
"""


def test_a_folder_that_another_run_draws_into_is_refused(evaluate, tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "generated" / "none")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"none .*process {holder.pid}"):
            evaluate("none")
        holder.communicate("\n")
    evaluate("none")


DRIVER = f"""
import sys
from sketch_perceptual.commands import evaluate as script
from sketch_perceptual.networks import backbone

backbone.STAGES = {NARROW}
script.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_two_processes_score_as_one(evaluate, tiny_sd, drawings, adapters, clip, tmp_path):
    models = ["none", f"lora={adapters / 'seed-1'}"]
    options = {"clip_model": clip, "classifier": tmp_path / "classifier"}
    _, alone = evaluate(*models, **options)
    (tmp_path / "driver.py").write_text(DRIVER)
    options |= {"output_dir": tmp_path / "two", "feature_dir": tmp_path / "two-features"}
    done = two_processes(tmp_path / "driver.py", *command(tiny_sd, drawings, tmp_path, *models, **options))
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((tmp_path / "generation.json").read_text())
    for name, result in alone["models"].items():
        means = [
            {key: math.nan if x is None else x for key, x in of["mean"].items()}
            for of in (two["models"][name], result)
        ]
        assert means[0] == pytest.approx(means[1], rel=1e-3, abs=1e-5, nan_ok=True), name
    pictures = list((tmp_path / "generated").rglob("*.png"))
    assert len(pictures) == 14
    for path in pictures:
        twin = tmp_path / "two" / path.relative_to(tmp_path / "generated")
        assert np.abs(np.int16(Image.open(path)) - np.int16(Image.open(twin))).max() <= 2, path.name
