"""Pictures for prompts, and their scores."""

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import NARROW, reset_accelerate, tiny_tokenizer, torchrun
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

import evaluate as script
from sketch_perceptual.data.images import fit_image, to_tensor
from sketch_perceptual.errors import InputError
from sketch_perceptual.evaluation import prompts as generation
from sketch_perceptual.evaluation.prompts import cycle_prompts, draw_prompts, find_classes, open_folder, read_prompts
from sketch_perceptual.measures.image_quality import ClipFeatures, frechet_distance
from sketch_perceptual.measures.ink import chroma, ink, is_black
from sketch_perceptual.networks.backbone import AttentionVGG16
from sketch_perceptual.networks.embedder import load_embedder

LOOKS = {"seed": 3, "resolution": 32, "num_inference_steps": 2, "guidance_scale": 2.0}


def test_prompts_come_again_with_a_number():
    assert cycle_prompts(["a", "b", "a"], 5) == [("a", 0), ("b", 0), ("a", 1), ("a", 2), ("b", 1)]
    assert cycle_prompts(["a", "b", "a"], 2) == [("a", 0), ("b", 0)]


@given(st.lists(st.text(), min_size=1, max_size=5), st.integers(1, 12), st.integers(0, 12))
def test_any_prompts_come_back_from_the_folder(prompts, count, more):
    """Each its own noise; and a longer list goes on where a shorter one ended."""
    cycled = cycle_prompts(prompts, count + more)
    assert [prompt for prompt, _ in cycled] == [prompts[index % len(prompts)] for index in range(count + more)]
    assert len(set(cycled)) == count + more
    with tempfile.TemporaryDirectory() as folder:
        assert open_folder(Path(folder), cycled[:count], {}) == open_folder(Path(folder), cycled, {})[:count]
        lines = Path(folder, "metadata.jsonl").read_text().splitlines()
        assert [json.loads(line)["text"] for line in lines] == [prompt for prompt, _ in cycled]


def test_prompts_of_a_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffa fox\n\n  ein Fuchs für Ümit \n", encoding="utf-8")
    assert read_prompts(path) == ["a fox", "ein Fuchs für Ümit"]
    for damage in (b" \n", b"\xff\xfe\x00"):
        path.write_bytes(damage)
        with pytest.raises(InputError, match=r"--prompts .*prompts\.txt"):
            read_prompts(path)
    with pytest.raises(InputError, match=r"--prompts nowhere\.txt cannot be read"):
        read_prompts("nowhere.txt")


def test_the_class_in_a_prompt_is_the_longest_that_is_named():
    classes = ["dog", "hot_dog", "n02012849", "n03126707", "tee-shirt"]  # the third and fourth are both cranes
    prompts = ["A sketch of a Hot Dog", "a doge", "a dog and a hot dog", "two cranes", "a crane", "a tee-shirt."]
    assert list(find_classes(prompts, classes)) == [{1}, set(), {1}, set(), {2, 3}, {4}]


def test_colour_ink_and_blackness():
    picture = Image.new("RGB", (10, 10), "white")
    assert (chroma(picture), ink(picture), is_black(picture)) == (0, 0, False)
    picture.paste("black", (0, 0, 10, 2))
    picture.paste((255, 55, 155), (0, 5, 5, 10))
    assert chroma(picture) == pytest.approx(0.25 * 200 / 255)
    assert ink(picture) == pytest.approx(0.2 + 0.25)  # luma 126
    assert is_black(Image.new("L", (3, 3)))
    assert not is_black(Image.new("RGB", (3, 3), (0, 1, 0)))


def test_a_folder_says_what_it_holds_and_refuses_what_it_does_not(tmp_path):
    folder = tmp_path / "new" / "lora"
    paths = open_folder(folder, cycle_prompts(["ä", "b"], 3), {"seed": 1})
    assert [path.name for path in paths] == ["00000.png", "00001.png", "00002.png"]
    assert open_folder(folder, cycle_prompts(["ä", "b"], 2), {"seed": 1}) == paths[:2]
    assert len(open_folder(folder, cycle_prompts(["ä", "b"], 5), {"seed": 1})) == 5
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["ä", "b", "ä", "b", "ä"]
    with pytest.raises(InputError, match=r"lora was drawn with seed=1, now it is 2: choose another --output_dir"):
        open_folder(folder, cycle_prompts(["ä", "b"], 3), {"seed": 2})
    with pytest.raises(InputError, match=r"lora has a picture of 'b' where 'c' belongs"):
        open_folder(folder, cycle_prompts(["ä", "c"], 3), {"seed": 1})
    (folder / ".settings.json").write_text("{")
    with pytest.raises(InputError, match=r"settings\.json cannot be read"):
        open_folder(folder, cycle_prompts(["ä", "b"], 3), {"seed": 1})


@pytest.fixture
def pipeline(tiny_sd):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_a_picture_follows_from_its_prompt_and_number_alone(pipeline, tmp_path):
    prompts = cycle_prompts(["a fox", "an owl"], 3)
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    draw_prompts(pipeline, prompts, paths, **LOOKS)
    draw_prompts(pipeline, prompts[2:], [tmp_path / "alone.png"], **LOOKS)
    assert abs(pixels(tmp_path / "alone.png") - pixels(paths[2])).max() <= 1
    assert abs(pixels(paths[0]) - pixels(paths[2])).max() > 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.png", "1.png", "2.png", "alone.png"]


def test_what_is_flagged_or_not_finite_is_black(pipeline, tmp_path, monkeypatch):
    pipeline.safety_checker = pipeline.unet  # any network: what it would say is said below
    monkeypatch.setattr(
        pipeline, "run_safety_checker", lambda images, device, dtype: (images, [True] + [False] * (len(images) - 1))
    )
    decode = generation.decode

    def overflow(vae, latents):
        images = decode(vae, latents)
        images[1, 0, 0, 0] = torch.inf
        return images

    monkeypatch.setattr(generation, "decode", overflow)
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    draw_prompts(pipeline, cycle_prompts(["a"], 3), paths, **LOOKS)
    assert [is_black(Image.open(path)) for path in paths] == [True, True, False]


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = shape | {"vocab_size": 100, "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 1}
    vision = shape | {"image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    tiny_tokenizer(folder).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(folder)
    return folder


def test_clip_sees_what_transformers_sees(clip, drawings):
    network = ClipFeatures(clip)
    model, processor = CLIPModel.from_pretrained(clip), CLIPImageProcessor.from_pretrained(clip)
    pictures = [fit_image(Image.open(path), 32) for path in sorted(drawings.rglob("*.png"))[:3]]
    with torch.no_grad():
        expected = model.get_image_features(**processor(pictures, return_tensors="pt"))
    expected = getattr(expected, "pooler_output", expected)
    found = network.features(torch.stack(list(map(to_tensor, pictures))))
    assert torch.nn.functional.cosine_similarity(found, expected).min() > 0.999  # it resizes eight-bit levels
    assert torch.allclose(network.features(to_tensor(pictures[0])[None]), found[:1], atol=1e-6)


def test_a_long_prompt_keeps_its_end_token(clip):
    """And neither the other prompts of a batch nor their length change a prompt's vector."""
    network = ClipFeatures(clip)
    long = "a sketch of a fox"
    tokens = network.tokenizer(long).input_ids
    assert len(tokens) > 12
    kept = torch.tensor([[*tokens[:11], network.tokenizer.eos_token_id]])
    with torch.no_grad():
        expected = network.model.get_text_features(input_ids=kept, attention_mask=torch.ones_like(kept))
    expected = getattr(expected, "pooler_output", expected)
    assert torch.allclose(network.texts([long]), expected, atol=1e-6)
    together = network.texts(["a fox", long, *["an owl"] * 70])
    assert torch.allclose(together[:1], network.texts(["a fox"]), atol=1e-6)
    assert torch.allclose(together[-1:], network.texts(["an owl"]), atol=1e-6)


def test_transformers_4_returns_the_vectors_themselves(clip, monkeypatch):
    network = ClipFeatures(clip)
    for output in (torch.ones(1, 8), SimpleNamespace(pooler_output=torch.ones(1, 8))):
        monkeypatch.setattr(network.model, "get_text_features", lambda output=output, **tokens: output)
        assert network.texts(["a"]).sum() == 8


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
        script.main(script.parse_args(command(tiny_sd, drawings, tmp_path, *models, **options)))
        return capsys.readouterr().out.splitlines(), json.loads((tmp_path / "generation.json").read_text())

    return evaluate


def command(tiny_sd, drawings, folder, *models, **options):
    fixed = {"train_data_dir": drawings, "pretrained_model_name_or_path": tiny_sd, "num_images": 7}
    fixed |= {"output_dir": folder / "generated", "output": folder / "generation.json"}
    fixed |= {"feature_dir": folder / "features", "backbone": folder / "classifier"}
    fixed |= {"num_inference_steps": 2, "resolution": 32, "generation_batch_size": 2} | options
    pairs = [item for name, value in fixed.items() for item in (f"--{name}", value)]
    return list(map(str, ["generation", *pairs, "--models", *models]))


def test_models_and_folders_are_scored_side_by_side(evaluate, adapters, clip, drawings, tmp_path, monkeypatch):
    printed, record = evaluate(
        "base=none",
        f"lora={adapters}",
        f"copies={drawings}",
        clip_model=clip,
        classifier=tmp_path / "classifier",
        figure=tmp_path / "sheet.png",
    )
    assert printed[0].split() == ["images", "frechet", "kernel", "clip", "accuracy", "nearest_same", "chroma", "ink"]
    assert [line.split()[0] for line in printed[1:5]] == ["the", "base", "lora", "copies"]
    assert printed[1].split()[2:4] == ["7", printed[1].split()[3]]  # the drawings have no distance to themselves
    base, lora, copies = (record["models"][name] for name in ("base", "lora", "copies"))
    assert [run["model"] for run in lora["runs"]] == ["seed-1", "seed-2"]
    assert lora["deviation"]["frechet"] > 0
    assert len({run["unet"] for run in [*base["runs"], *lora["runs"]]}) == 3
    assert copies["mean"]["frechet"] == pytest.approx(0, abs=1e-4)
    assert copies["mean"]["nearest_same"] == 1
    of_the_drawings = record["models"]["the drawings"]["mean"]
    for score in ("clip", "clip_cosine", "accuracy", "chroma", "ink"):
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

    monkeypatch.setattr(script, "draw_prompts", None)  # all is there
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

    monkeypatch.setattr(script, "draw_prompts", note)
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
    _, found = evaluate(tmp_path / "pictures")
    (run,) = found["models"]["pictures"]["runs"]
    assert (run["images"], run["black"]) == (7, 3)
    assert found["models"]["pictures"]["mean"] == clean["models"]["pictures"]["mean"]
    assert "pictures: 3 of 10 pictures are black all over and are not scored" in caplog.text


DRIVER = f"""
import sys
import evaluate as script
from sketch_perceptual.networks import backbone

backbone.STAGES = {NARROW}
script.run(script.main, script.parse_args(sys.argv[1:]))
"""


def test_two_processes_score_as_one(evaluate, tiny_sd, drawings, adapters, clip, tmp_path):
    models = ["none", f"lora={adapters / 'seed-1'}"]
    options = {"clip_model": clip, "classifier": tmp_path / "classifier"}
    _, alone = evaluate(*models, **options)
    (tmp_path / "driver.py").write_text(DRIVER)
    options |= {"output_dir": tmp_path / "two", "feature_dir": tmp_path / "two-features"}
    done = torchrun(tmp_path / "driver.py", *command(tiny_sd, drawings, tmp_path, *models, **options))
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((tmp_path / "generation.json").read_text())
    for name, result in alone["models"].items():
        assert two["models"][name]["mean"] == pytest.approx(result["mean"], rel=1e-3, abs=1e-5), name
    for path in (tmp_path / "generated").rglob("*.png"):
        twin = tmp_path / "two" / path.relative_to(tmp_path / "generated")
        assert np.abs(np.int16(Image.open(path)) - np.int16(Image.open(twin))).max() <= 2, path.name
