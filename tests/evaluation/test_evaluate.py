import json
import shutil

import numpy as np
import pytest
import torch
from conftest import NARROW, draw_class, reset_accelerate
from PIL import Image, ImageOps
from processes import two_processes

from sketch_perceptual.commands import evaluate as script
from sketch_perceptual.commands import search
from sketch_perceptual.data.images import fit_image, load_image, to_tensor
from sketch_perceptual.data.near_duplicates import content_key
from sketch_perceptual.errors import InputError
from sketch_perceptual.evaluation import set_distances
from sketch_perceptual.measures.class_distances import class_distances
from sketch_perceptual.measures.image_quality import frechet_distance, ssim
from sketch_perceptual.networks.backbone import AttentionVGG16
from sketch_perceptual.networks.embedder import SketchEmbedder, load_embedder
from sketch_perceptual.networks.style_net import JohnsonNet, load_johnson

pytestmark = pytest.mark.usefixtures("narrow")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """22 drawings: 21 of three classes, and one that is alone in its class."""
    root = tmp_path_factory.mktemp("pictures")
    for number, name in enumerate(("bridge", "hot_dog", "n02012849")):
        draw_class(root / name, 7 * number, 7)
    draw_class(root / "single", 21, 1)
    return root


@pytest.fixture
def models(tmp_path):
    """Two backbones, and a head on the second for each of two seeds."""
    torch.manual_seed(0)
    for name in ("one", "two"):
        network = AttentionVGG16(pool_after_attention=True, num_classes=4, head="linear", reduction=2)
        network.save_pretrained(tmp_path / name)
    for seed in (3, 4):
        embedder = SketchEmbedder(network._hub_mixin_config, "head", 32)
        embedder.backbone.features.load_state_dict(network.features.state_dict())
        embedder.save_pretrained(tmp_path / "heads" / f"seed-{seed}")
    return tmp_path


@pytest.fixture
def evaluate(pictures, models, tmp_path, capsys):
    """Run a task in this process; what it printed and what it wrote."""

    def evaluate(task, *options, data=("--train_data_dir", pictures), resolution=32):
        reset_accelerate()
        capsys.readouterr()
        fixed = [*data, "--feature_dir", tmp_path / "features", "--resolution", resolution]
        fixed += ["--output", tmp_path / f"{task}.json"]
        script.evaluate(script.parse_args([task, *map(str, [*fixed, *options])]))
        return capsys.readouterr().out.splitlines(), json.loads((tmp_path / f"{task}.json").read_text())

    return evaluate


def test_distances_are_those_of_the_embeddings(evaluate, models, pictures, tmp_path):
    options = ("--models", f"first={models / 'one'}", models / "two", "--figure", tmp_path / "bars.png")
    printed, record = evaluate("distance", *options)
    paths = sorted(pictures.rglob("*.png"))
    labels = [sorted({path.parent.name for path in paths}).index(path.parent.name) for path in paths]
    for name, folder in (("first", "one"), ("two", "two")):
        expected = class_distances(load_embedder(models / folder, resolution=32).embed(paths), labels)
        found = record["models"][name]["mean"]
        assert [found[key] for key in ("intra", "inter", "ratio")] == pytest.approx(
            [expected.intra, expected.inter, expected.ratio], rel=1e-4
        )
        assert record["models"][name]["runs"][0]["class_intra"][3] is None  # one drawing
    assert (record["data"]["images"], record["data"]["classes"], record["data"]["alone"]) == (22, 4, 1)
    assert record["data"]["class_names"] == ["bridge", "hot dog", "crane", "single"]
    assert printed[0].split() == ["embedding", "intra", "inter", "ratio"]
    assert [line.split()[:2] for line in printed[1:3]] == [["first", "pooled"], ["two", "pooled"]]
    assert printed[3] == str(tmp_path / "distance.json")
    assert torch.__version__.startswith(record["versions"]["torch"])
    assert Image.open(tmp_path / "bars.png").width > 400


@pytest.mark.parametrize("embedding", ["flat", "logits"])
def test_other_embeddings_are_measured_too(evaluate, models, embedding):
    _, pooled = evaluate("distance", "--models", models / "one")
    _, other = evaluate("distance", "--models", models / "one", "--embedding", embedding)
    assert other["models"]["one"]["runs"][0]["embedding"] == embedding
    assert other["models"]["one"]["mean"] != pooled["models"]["one"]["mean"]


def test_what_was_kept_apart_is_measured_alone(evaluate, models):
    _, whole = evaluate("distance", "--models", models / "one", "--validation_share", 0.3)
    _, part = evaluate("distance", "--models", models / "one", "--validation_share", 0.3, "--subset", "validation")
    assert part["data"]["images"] == 6
    assert sum(part["models"]["one"]["runs"][0]["counts"]) == 6
    assert part["models"]["one"]["mean"] != whole["models"]["one"]["mean"]
    assert len(part["data"]["split"]) == 12


def test_retrieval_has_a_row_a_model_and_a_mean_over_seeds(evaluate, models, tmp_path):
    options = ("--models", f"bare={models / 'one'}", f"trained={models / 'heads'}", "--validation_share", 0.3)
    printed, record = evaluate("retrieval", *options, "--figure", tmp_path / "sheet.png")
    bare, trained = (record["models"][name] for name in ("bare", "trained"))
    assert "deviation" not in bare
    assert [run["model"] for run in trained["runs"]] == ["seed-3", "seed-4"]
    assert len({run["weights"] for run in trained["runs"]}) == 2
    tops = [run["top1"] for run in trained["runs"]]
    assert trained["mean"]["top1"] == pytest.approx(np.mean(tops))
    assert trained["deviation"]["top1"] == pytest.approx(np.std(tops, ddof=1))
    assert (record["data"]["queries"], record["data"]["gallery"]) == (6, 16)
    assert "+-" in printed[2]
    assert "+-" not in printed[1]
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).reshape(-1, 3)
    for colour in ((0x1A, 0x96, 0x41), (0xD7, 0x19, 0x1C)):  # both right ones and wrong ones are framed
        assert (sheet == colour).all(1).any()


def test_no_query_is_ranked_against_itself(evaluate, models, pictures, tmp_path):
    """Each drawing twice, once turned: the copy would be the nearest by far, and is on the query's side."""
    twice = tmp_path / "twice"
    for path in pictures.rglob("*.png"):
        (twice / path.parent.name).mkdir(parents=True, exist_ok=True)
        image = Image.open(path)
        image.save(twice / path.parent.name / path.name)
        image.transpose(Image.Transpose.ROTATE_180).save(twice / path.parent.name / f"turned-{path.name}")
    _, once = evaluate("retrieval", "--models", models / "one")
    _, double = evaluate("retrieval", "--models", models / "one", data=("--train_data_dir", twice))
    assert double["data"]["queries"] >= 2 * once["data"]["queries"]
    assert double["models"]["one"]["mean"]["top1"] < 1


def save_split(folder, paths, held_out, background="white"):
    """As train_retrieval.py writes it."""
    keys = [content_key(load_image(paths[index], background)) for index in held_out]
    (folder / "split.json").write_text(json.dumps({"validation": sorted(keys), "left_out": []}))


def test_queries_are_what_the_training_held_out(evaluate, models, pictures, tmp_path):
    paths, heads = sorted(pictures.rglob("*.png")), models / "heads"
    held_out = [0, 8, 15]
    for seed in (3, 4):
        save_split(heads / f"seed-{seed}", paths, held_out)
    options = ("--models", models / "one", heads, "--validation_share", 0.3)
    _, record = evaluate("retrieval", *options)
    assert (record["data"]["queries"], record["data"]["gallery"]) == (3, 19)
    vectors = load_embedder(models / "one", resolution=32).embed(paths)
    labels = [path.parent.name for path in paths]
    others = [index for index in range(len(paths)) if index not in held_out]
    nearest = (vectors[held_out] @ vectors[others].T).argmax(1).tolist()
    right = [labels[row] == labels[others[index]] for row, index in zip(held_out, nearest, strict=True)]
    assert record["models"]["one"]["mean"]["top1"] == pytest.approx(np.mean(right))


def test_a_saved_split_that_does_not_fit_is_refused(evaluate, models, pictures, tmp_path):
    paths, (first, second) = sorted(pictures.rglob("*.png")), (models / "heads" / f"seed-{seed}" for seed in (3, 4))
    save_split(first, paths, [0, 8])
    save_split(second, paths, [0, 9])
    with pytest.raises(InputError, match=r"heads/seed-3 and .*heads/seed-4 "):
        evaluate("retrieval", "--models", models / "heads")
    save_split(second, paths, [0, 8])
    evaluate("retrieval", "--models", models / "heads")
    fewer = tmp_path / "fewer"
    shutil.copytree(pictures, fewer)
    (fewer / paths[8].relative_to(pictures)).unlink()
    with pytest.raises(InputError, match=r"1 of the 2 drawings .*seed-3 "):
        evaluate("retrieval", "--models", models / "heads", data=("--train_data_dir", fewer))
    for text in ("[]", "[" * 100_000, '{"validation": 5, "left_out": []}'):
        (first / "split.json").write_text(text)
        with pytest.raises(InputError, match=r"seed-3/split\.json "):
            evaluate("retrieval", "--models", models / "heads")


@pytest.mark.parametrize("task", ["distance", "retrieval"])
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--models", "x="], "`models`: 'x=' names no model"),
        (["--models", "null"], r"null/config\.json must hold an object, got null"),
        (["--models", "five"], r"five/config\.json must hold an object, got 5"),
        (["--models", "one", "--background", "whiet"], "`background`: 'whiet' is not a colour"),
    ],
)
def test_a_wrong_option_is_blamed_for_itself(evaluate, models, monkeypatch, task, options, sentence):
    for name, text in (("null", "null"), ("five", "5")):
        shutil.copytree(models / "one", models / name)
        (models / name / "config.json").write_text(text)
    monkeypatch.chdir(models)
    with pytest.raises(InputError, match=sentence):
        evaluate(task, *options)


@pytest.fixture
def transparent(tmp_path):
    """White ink on no paper: on white all are blank and alike."""
    root = tmp_path / "transparent"
    for number in range(6):
        image = Image.new("RGBA", (36, 36))
        image.paste("white", (3 * number, 4, 3 * number + 9, 20 + 2 * number))
        path = root / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return root


def test_an_embedder_has_its_own_background(evaluate, models, transparent):
    paths = sorted(transparent.rglob("*.png"))
    labels = [path.parent.name == "b" for path in paths]
    black = load_embedder(models / "one", resolution=32, background="black")
    black.save_pretrained(models / "black")
    data = ("--train_data_dir", transparent)
    _, record = evaluate("distance", "--models", models / "one", models / "black", data=data)
    (white_run,), (black_run,) = (record["models"][name]["runs"] for name in ("one", "black"))
    assert (white_run["background"], black_run["background"]) == ("white", "black")
    assert white_run["inter"] == pytest.approx(0, abs=1e-5)
    expected = class_distances(black.embed(paths), torch.tensor(labels).long())
    assert black_run["inter"] == pytest.approx(expected.inter, rel=1e-3)
    assert expected.inter > 0.001
    _, record = evaluate("distance", "--models", models / "black", "--background", "white", data=data)
    assert record["models"]["black"]["mean"]["inter"] == pytest.approx(0, abs=1e-5)


def test_files_are_written_before_a_reader_goes_away(evaluate, models, tmp_path, monkeypatch):
    def gone(*lines):
        raise BrokenPipeError

    monkeypatch.setattr(script, "print_result", gone)
    with pytest.raises(BrokenPipeError):
        evaluate("distance", "--models", models / "one", "--figure", tmp_path / "bars.png")
    assert json.loads((tmp_path / "distance.json").read_text())["models"]["one"]["mean"]["ratio"] > 0
    assert Image.open(tmp_path / "bars.png").width > 100


def test_any_name_stands_in_a_figure(evaluate, models, tmp_path):
    name = r"$a_{^$ [b] $x^{$"
    _, record = evaluate("distance", "--models", f"{name}={models / 'one'}", "--figure", tmp_path / "bars.png")
    assert list(record["models"]) == [name]
    evaluate("retrieval", "--models", f"{name}={models / 'one'}", "--figure", tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").width > 5 * 160


def test_features_are_shared_between_tasks_and_heads(evaluate, models, monkeypatch):
    calls = []
    features = SketchEmbedder.features
    monkeypatch.setattr(
        SketchEmbedder, "features", lambda self, images: calls.append(len(images)) or features(self, images)
    )
    evaluate("retrieval", "--models", models / "two", models / "heads")
    evaluate("distance", "--models", models / "two", "--embedding", "logits")
    evaluate("distance", "--models", models / "heads")
    assert sum(calls) == 22
    evaluate("distance", "--models", models / "one")
    assert sum(calls) == 2 * 22


@pytest.fixture
def find(tmp_path, capsys):
    """Search in this process; what it printed."""

    def find(*options):
        reset_accelerate()
        capsys.readouterr()
        fixed = ["--feature_dir", tmp_path / "features", "--resolution", 32]
        search.print_similar(search.parse_args([*map(str, [*fixed, *options])]))
        return capsys.readouterr().out.splitlines()

    return find


@pytest.fixture
def gallery(pictures, tmp_path):
    folder = tmp_path / "gallery"
    for path in pictures.rglob("*.png"):
        (folder / "below").mkdir(parents=True, exist_ok=True)
        (folder / "below" / path.name).write_bytes(path.read_bytes())
    return folder


def test_search_finds_the_most_alike_and_names_the_query(find, models, gallery, tmp_path, monkeypatch):
    query = gallery / "below" / "3.png"
    Image.open(query).rotate(2, fillcolor="white").save(gallery / "nearly.png")
    options = ("--query", query, "--gallery", gallery, "--model", models / "one", "--count", 4)
    printed = find(*options, "--figure", tmp_path / "found.png")
    assert printed[0] == f"the query or a copy of it\t{query}"
    found = [line.split("\t") for line in printed[1:]]
    embedder = load_embedder(models / "one", resolution=32)
    others = [path for path in sorted(gallery.rglob("*.png")) if path != query]
    expected = (embedder.embed(others) @ embedder.embed([query])[0]).sort(descending=True)
    assert [float(similarity) for similarity, _ in found] == pytest.approx(expected.values[:4].tolist(), abs=1e-3)
    assert found[0][1] == str(others[expected.indices[0]])
    assert Image.open(tmp_path / "found.png").width > 5 * 160

    calls = []
    features = SketchEmbedder.features
    monkeypatch.setattr(
        SketchEmbedder, "features", lambda self, images: calls.append(len(images)) or features(self, images)
    )
    draw_class(gallery / "new", 30, 1)
    again = find(*options)
    assert sum(calls) == 1 + 1  # the new one and the query
    assert len(again) == 5


def test_search_reads_white_on_black_as_it_is_told(find, models, gallery):
    query = gallery / "below" / "3.png"
    ImageOps.invert(Image.open(query).convert("RGB")).save(gallery / "negative.png")
    options = ("--query", query, "--gallery", gallery, "--model", models / "one", "--count", 22)
    for invert, first in (("never", False), ("auto", True)):
        printed = find(*options, "--invert", invert)
        assert (printed[1] == f"1.0000\t{gallery / 'negative.png'}") is first


def test_a_damaged_picture_in_the_gallery_is_named_or_left_out(find, models, gallery):
    options = ("--query", gallery / "below" / "3.png", "--gallery", gallery, "--model", models / "one")
    find(*options)
    (gallery / "cut.png").write_bytes((gallery / "below" / "1.png").read_bytes()[:150])
    with pytest.raises(InputError, match=r"1 of 23 images cannot be read\.\n.*cut\.png"):
        find(*options)
    printed = find(*options, "--on_bad_image", "skip", "--count", 99)
    assert len(printed) == 22
    assert not any("cut.png" in line for line in printed)


DRIVER = f"""
import sys
from sketch_perceptual.commands import evaluate as script
from sketch_perceptual.networks import backbone

backbone.STAGES = {NARROW}
script.main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("task", ["retrieval", "distance"])
def test_two_processes_say_what_one_says(evaluate, models, pictures, tmp_path, task):
    (tmp_path / "driver.py").write_text(DRIVER)
    options = ["--models", models / "one", f"heads={models / 'heads'}", "--validation_share", "0.3"]
    _, alone = evaluate(task, *options)
    fixed = ["--train_data_dir", pictures, "--resolution", 32, "--feature_dir", tmp_path / "features-of-two"]
    fixed += ["--extraction_batch_size", 3, "--output", tmp_path / "two.json"]
    done = two_processes(tmp_path / "driver.py", task, *map(str, [*fixed, *options]))
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((tmp_path / "two.json").read_text())
    assert two["data"] == alone["data"] | {"mixed_precision": None}
    for name, result in alone["models"].items():
        assert two["models"][name]["mean"] == pytest.approx(result["mean"], rel=1e-5)
    assert done.stdout.count(str(tmp_path / "two.json")) == 1


@pytest.fixture
def pairs(pictures, tmp_path):
    """Seven pairs: drawings in colour, and the drawings."""
    for path in sorted(pictures.rglob("*.png"))[:7]:
        for folder in ("photos", "sketches"):
            (tmp_path / "pairs" / "test" / folder).mkdir(parents=True, exist_ok=True)
            image = Image.open(path)
            if folder == "photos":
                image = Image.blend(image, Image.new("RGB", image.size, "orange"), 0.5)
            image.save(tmp_path / "pairs" / "test" / folder / path.name)
    return tmp_path / "pairs"


@pytest.fixture
def styles(tmp_path):
    torch.manual_seed(0)
    for name in "ab":
        JohnsonNet(width=4).save_pretrained(tmp_path / name)
    return tmp_path


def transfer(pairs, styles, *options):
    reset_accelerate()
    fixed = ["--paired_data_dir", pairs, "--resolution", 32, "--output", styles / "transfer.json"]
    fixed += ["--models", styles / "a", f"second={styles / 'b'}", "--backbone", styles / "one"]
    script.evaluate(script.parse_args(["transfer", *map(str, [*fixed, *options])]))
    return json.loads((styles / "transfer.json").read_text())


def test_drawings_are_scored_in_pairs_and_as_a_set(models, pairs, styles, capsys):
    record = transfer(pairs, styles, "--figure", styles / "sheet.png")
    photos, sketches = (
        torch.stack([to_tensor(fit_image(Image.open(path), 32)) for path in sorted((pairs / "test" / name).iterdir())])
        for name in ("photos", "sketches")
    )
    with torch.no_grad():
        drawn = load_johnson(styles / "a").eval()(photos).clamp(-1, 1)
    found, features = record["models"]["a"]["mean"], load_embedder(models / "one").features
    assert found["ssim"] == pytest.approx(float(ssim(drawn, sketches).mean()), abs=1e-5)
    assert found["ssim_shuffled"] == pytest.approx(float(ssim(drawn, sketches.roll(-1, 0)).mean()), abs=1e-5)
    assert found["frechet"] == pytest.approx(frechet_distance(features(drawn), features(sketches)), rel=1e-3)
    blank = record["models"]["blank page"]["mean"]["ssim"]
    assert blank == pytest.approx(float(ssim(torch.ones_like(sketches), sketches).mean()), abs=1e-5)
    assert record["models"]["the photo"]["mean"]["ssim"] > blank
    assert record["data"]["pairs"] == 7
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "ssim", "blank", "the", "a", "second", str(styles / "transfer.json")
    ]  # fmt: skip
    assert Image.open(styles / "sheet.png").height > 4 * 160


def test_inception_and_what_is_all_the_same(models, pairs, styles, monkeypatch, caplog):
    class Inception(torch.nn.Module):
        def __init__(self, weights):
            super().__init__()
            assert weights == "weights.safetensors"

        def features(self, images):
            return images.mean((2, 3)).cpu()

    monkeypatch.setattr(set_distances, "InceptionFeatures", Inception)
    monkeypatch.setattr(JohnsonNet, "forward", lambda self, images: torch.zeros_like(images))
    found = transfer(pairs, styles, "--inception_weights", "weights.safetensors")["models"]["a"]["mean"]
    assert found["fid"] is None
    assert found["kid"] > 0
    assert "no fid: the rows of features are all the same" in caplog.text
    assert "fewer than 2048" in caplog.text


@pytest.mark.slow
def test_two_processes_score_as_one(models, pairs, styles):
    (styles / "driver.py").write_text(DRIVER)
    alone = transfer(pairs, styles)
    fixed = ["--paired_data_dir", pairs, "--resolution", 32, "--output", styles / "two.json"]
    fixed += ["--models", styles / "a", f"second={styles / 'b'}", "--backbone", styles / "one"]
    done = two_processes(styles / "driver.py", "transfer", *map(str, fixed))
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((styles / "two.json").read_text())
    for name, result in alone["models"].items():
        assert two["models"][name]["mean"] == pytest.approx(result["mean"], rel=1e-4, abs=1e-6)
