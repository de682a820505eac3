import json
import os
import shutil
import signal
import statistics

import pytest
import torch
from accelerate import Accelerator
from conftest import NARROW, draw_class, reset_accelerate
from PIL import Image
from processes import run_killed, two_processes

import train_retrieval as script
from sketch_perceptual.data.near_duplicates import content_key
from sketch_perceptual.errors import InputError
from sketch_perceptual.measures.ranking import rank
from sketch_perceptual.networks.backbone import AttentionVGG16
from sketch_perceptual.networks.embedder import SketchEmbedder
from sketch_perceptual.networks.hub_model import fingerprint
from sketch_perceptual.training import checkpoints, steps

pytestmark = pytest.mark.usefixtures("narrow")
SMALL = """--head linear --embedding_dim 16 --resolution 32 --report_to none --num_seeds 2 --num_train_epochs 3
    --train_batch_size 4 --images_per_class 2 --learning_rate 1e-2 --seed 5"""


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """18 drawings of three classes, 6 of which become queries with --validation_share 0.3."""
    root = tmp_path_factory.mktemp("pictures")
    for number, name in enumerate(("bridge", "hot_dog", "n02012849")):
        draw_class(root / name, 6 * number, 6)
    return root


@pytest.fixture
def network(tmp_path):
    torch.manual_seed(0)
    network = AttentionVGG16(pool_after_attention=True, num_classes=4, head="linear", reduction=2)
    network.save_pretrained(tmp_path / "network")
    return tmp_path / "network"


@pytest.fixture
def options(pictures, network, tmp_path):
    return f"""{SMALL} --train_data_dir {pictures} --validation_share 0.3 --backbone {network}
        --feature_dir {tmp_path / "features"}""".split()


class Run:
    """One training in this process: its folder and what it logged."""

    def __init__(self, folder, logs):
        self.folder, self.logs = folder, logs

    @property
    def metrics(self):
        return json.loads((self.folder / "metrics.json").read_text())

    def weights(self, seed=5):
        return (self.folder / f"seed-{seed}" / "model.safetensors").read_bytes()


@pytest.fixture
def train(options, tmp_path, monkeypatch, signals):
    def train(*more, output="out"):
        reset_accelerate()
        logs = []
        monkeypatch.setattr(Accelerator, "log", lambda self, values, step: logs.append({"step": step} | values))
        args = script.parse_args([*options, "--output_dir", str(tmp_path / output), *map(str, more)])
        script.main(args)
        return Run(tmp_path / output, logs)

    return train


def test_the_defaults_are_the_papers():
    args = vars(script.parse_args(["--train_data_dir", "ImageNet-Sketch"]))
    paper = {
        "head": "vgg",
        "embedding_dim": 512,
        "triplet_weight": 0.1,
        "triplet_margin": 0.2,
        "learning_rate": 1e-4,
        "lr_step_size": 7,
        "lr_gamma": 0.1,
        "num_train_epochs": 20,
        "num_seeds": 5,
        "validation_share": 0.1,
    }
    assert {name: args[name] for name in paper} == paper


def test_each_seed_leaves_an_embedder_and_the_metrics_are_theirs(train, network, pictures):
    run = train()
    first, second = (SketchEmbedder.from_pretrained(run.folder / f"seed-{seed}") for seed in (5, 6))
    saved = AttentionVGG16.from_pretrained(network)
    assert fingerprint(first.backbone.features) == fingerprint(saved.features)  # frozen
    assert (first.embedding, first.resolution, first.fit) == ("head", 32, "pad")
    assert fingerprint(first) != fingerprint(second)

    found = run.metrics["runs"]
    assert [record["seed"] for record in found] == [5, 6]
    for name, value in run.metrics["summary"].items():
        values = [record[name] for record in found]
        assert value == {"mean": statistics.mean(values), "deviation": statistics.stdev(values)}
    split = json.loads((run.folder / "seed-5" / "split.json").read_text())
    paths = sorted(pictures.rglob("*.png"))
    apart = [script_key(path) in split["validation"] for path in paths]
    assert sum(apart) == 6
    labels = [path.parent.name for path in paths]
    number = {name: index for index, name in enumerate(sorted(set(labels)))}
    sides = [[path for path, is_apart in zip(paths, apart, strict=True) if is_apart == side] for side in (True, False)]
    again = rank(
        *(second.embed(side) for side in sides), *([number[path.parent.name] for path in side] for side in sides)
    ).scores
    assert {name: found[1][name] for name in again} == pytest.approx(again)


def test_what_queries_find_is_shown(train, monkeypatch):
    tracked = []
    monkeypatch.setattr(script, "track_images", lambda *what: tracked.append(what[1:]))
    run = train("--num_train_epochs", 1)
    shown = [Image.open(run.folder / f"seed-{seed}" / "nearest.png") for seed in (5, 6)]
    assert [(phase, list(rows)) for phase, rows, _ in tracked] == [("nearest", ["seed 5"]), ("nearest", ["seed 6"])]
    assert [rows[f"seed {seed}"][0].tobytes() for seed, (_, rows, _) in zip((5, 6), tracked, strict=True)] == [
        sheet.tobytes() for sheet in shown
    ]


def test_a_drawing_that_is_gone_costs_the_sheet_alone(train, pictures, tmp_path, monkeypatch, caplog):
    shutil.copytree(pictures, tmp_path / "mine")
    evaluate = script.evaluate

    def lose_them(*args):
        shutil.rmtree(tmp_path / "mine", ignore_errors=True)
        return evaluate(*args)

    monkeypatch.setattr(script, "evaluate", lose_them)
    run = train("--train_data_dir", tmp_path / "mine", "--num_train_epochs", 1)
    assert "seed 5: what queries find was not drawn (" in caplog.text
    assert len(run.metrics["runs"]) == 2 and not (run.folder / "seed-5" / "nearest.png").exists()


def script_key(path):
    return content_key(Image.open(path).convert("RGB"))


def test_the_head_learns_and_the_rate_falls_in_steps(train, monkeypatch):
    rates = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam, "step", lambda self, *a: rates.append(self.param_groups[0]["lr"]) or step(self, *a)
    )
    run = train("--num_train_epochs", 9, "--lr_step_size", 4, "--num_seeds", 1)
    epochs = [log for log in run.logs if "seed-5/cross_entropy" in log]
    per_epoch = [rates[log["step"] - 1] for log in epochs]
    assert per_epoch == pytest.approx([1e-2] * 4 + [1e-3] * 4 + [1e-4])
    losses = [log["seed-5/cross_entropy"] for log in epochs]
    assert losses[-1] < losses[0]
    assert {"triplet_loss", "active_triplets", "embedding_std"} < {name.split("/")[-1] for name in run.logs[0]}
    assert run.metrics["summary"]["top1"]["deviation"] is None
    assert run.logs[-1]["seed-5/top1"] == run.metrics["runs"][0]["top1"]


def test_features_are_computed_once(train, monkeypatch):
    calls = []
    features = SketchEmbedder.features
    monkeypatch.setattr(
        SketchEmbedder, "features", lambda self, images: calls.append(len(images)) or features(self, images)
    )
    first = train()
    assert sum(calls) == 18
    second = train(output="again")
    assert sum(calls) == 18
    assert first.weights() == second.weights()


def test_an_edited_drawing_and_another_size_get_new_features(options, train, monkeypatch, pictures, tmp_path):
    calls = []
    features = SketchEmbedder.features
    monkeypatch.setattr(
        SketchEmbedder, "features", lambda self, images: calls.append(len(images)) or features(self, images)
    )
    copy = tmp_path / "copy"
    for path in pictures.rglob("*.png"):
        (copy / path.parent.name).mkdir(parents=True, exist_ok=True)
        (copy / path.parent.name / f"renamed-{path.name}").write_bytes(path.read_bytes())
    train()
    train("--train_data_dir", copy, output="renamed")
    assert sum(calls) == 18
    edited = next(copy.rglob("*.png"))
    Image.open(edited).rotate(30, fillcolor="white").save(edited)
    train("--train_data_dir", copy, output="edited")
    assert sum(calls) == 19
    train("--resolution", 48, output="larger")
    assert sum(calls) == 19 + 18


def test_an_interrupted_run_resumes_to_the_same_embedders(train, monkeypatch):
    straight = train(output="straight")
    seen = []
    check = steps.Meter.close

    def interrupt(self, *args):
        seen.append(args)
        if len(seen) == 17:
            os.kill(os.getpid(), signal.SIGTERM)
        return check(self, *args)

    monkeypatch.setattr(steps.Meter, "close", interrupt)
    with pytest.raises(SystemExit) as exit:
        train()
    assert exit.value.code == 128 + signal.SIGTERM
    resumed = train("--resume_from_checkpoint", "latest")
    assert resumed.weights(5) == straight.weights(5)
    assert resumed.weights(6) == straight.weights(6)
    assert resumed.metrics == straight.metrics
    more = train("--resume_from_checkpoint", "latest", "--num_seeds", 3)
    assert [record["seed"] for record in more.metrics["runs"]] == [5, 6, 7]
    assert more.metrics["runs"][:2] == straight.metrics["runs"]


def test_a_checkpoint_loads_as_an_embedder(train):
    run = train("--num_seeds", 1)
    checkpoint = checkpoints.find_checkpoints(run.folder)[-1]
    assert fingerprint(SketchEmbedder.from_pretrained(checkpoint)) == fingerprint(
        SketchEmbedder.from_pretrained(run.folder / "seed-5")
    )
    with pytest.raises(InputError, match=r"triplet_weight was 0\.1, is 0\.5"):
        train("--resume_from_checkpoint", "latest", "--triplet_weight", 0.5)


def test_a_run_that_goes_on_elsewhere_takes_its_finished_seeds_along(train):
    straight = train("--checkpoints_total_limit", 9)
    last = checkpoints.find_checkpoints(straight.folder)[-2]
    resumed = train("--resume_from_checkpoint", last, output="elsewhere")
    assert resumed.metrics == straight.metrics
    assert resumed.weights(5) == straight.weights(5)
    shutil.rmtree(straight.folder / "seed-5")
    with pytest.raises(InputError, match=r"the embedder of seed 5 is missing: there is no .*seed-5"):
        train("--resume_from_checkpoint", last, output="nowhere")


def test_a_step_that_is_not_finite_is_skipped_and_counted(train, monkeypatch, caplog):
    count = []
    loss = script.triplet_loss

    def poisoned(*args):
        count.append(1)
        value, active = loss(*args)
        return value * (torch.nan if len(count) == 2 else 1), active

    monkeypatch.setattr(script, "triplet_loss", poisoned)
    run = train("--num_seeds", 1)
    assert "step 2 skipped, not finite: gradient" in caplog.text
    assert "1 steps were skipped" in caplog.text
    embedder = SketchEmbedder.from_pretrained(run.folder / "seed-5")
    assert all(weight.isfinite().all() for weight in embedder.parameters())
    assert all(0 < log["seed-5/cross_entropy"] < 10 for log in run.logs if "seed-5/top1" not in log)


def test_collapse_is_noticed(train, monkeypatch, caplog):
    monkeypatch.setattr(script.Head, "reset", lambda self, seed: torch.nn.init.zeros_(self.head.weight))
    train("--learning_rate", 1e-30, "--num_train_epochs", 1, "--num_seeds", 1)
    assert "the embeddings are nearly all alike" in caplog.text


def test_lone_drawings_train_and_are_counted(train, pictures, tmp_path, caplog):
    root = tmp_path / "lone"
    draw_class(root / "many", 0, 6)
    draw_class(root / "few", 6, 2)
    draw_class(root / "single", 8, 1)
    run = train("--train_data_dir", root, "--train_batch_size", 8, "--num_seeds", 1)
    assert "one drawing to train on, which forms no triplet: 2" in caplog.text
    assert "fewer classes than --train_batch_size / --images_per_class = 4" in caplog.text
    assert run.metrics["runs"][0]["unmatched"] == 0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_float32_weights(train, precision):
    run = train("--mixed_precision", precision, "--num_seeds", 1)
    embedder = SketchEmbedder.from_pretrained(run.folder / "seed-5")
    assert {weight.dtype for weight in embedder.parameters()} == {torch.float32}
    assert run.metrics["runs"][0]["cross_entropy"] > 0


def test_vggs_head_trains_on_the_flat_map(train):
    run = train("--head", "vgg", "--num_seeds", 1, "--num_train_epochs", 1, "--mining", "batch_all", "--fit", "crop")
    embedder = SketchEmbedder.from_pretrained(run.folder / "seed-5")
    assert embedder.backbone.classifier[0].in_features == 8 * 49
    assert embedder.embed([Image.new("RGB", (32, 32))]).shape == (1, 16)


def test_the_hub_gets_the_first_seed_and_the_card_tells_how_it_was_made(train, hub, capsys):
    run = train("--push_to_hub", "--hub_token", "hf_writer", "--hub_model_id", "someone/net")
    assert sorted(hub.repos["someone/net"].files) == sorted(script.FILES)
    folder = run.folder / "seed-5"
    assert sorted(path.name for path in folder.iterdir()) == sorted([*script.FILES, "nearest.png"])
    assert not any(b"hf_writer" in path.read_bytes() for path in run.folder.rglob("*") if path.is_file())
    card, found = (folder / "README.md").read_text(), run.metrics["runs"][0]
    for line in (
        "Drawings to vectors of 16 numbers",
        "Of 6 held-out drawings, which share no copy with the 12 trained on",
        f"{found['top1']:.1%} find one of their class first",
        "| triplet_margin | 0.2 |",
        "| seed | 5 |",
    ):
        assert line in card
    snippet = card.split("```python\n")[1].split("```")[0]
    assert '"someone/net"' in snippet
    exec(snippet, {})
    assert "tensor(" in capsys.readouterr().out


DRIVER = f"""
import os, signal, sys
import torch
import train_retrieval as script
from sketch_perceptual.networks import backbone

backbone.STAGES = {NARROW}
heads, reset, seen, loss = [], script.Head.reset, [], script.triplet_loss
script.Head.reset = lambda self, seed: heads.append(self) or reset(self, seed)
def spy(*args):
    seen.append(args)
    if len(seen) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return loss(*args)
script.triplet_loss = spy
script.entry.run(script.main, script.parse_args(sys.argv[3:]))
torch.save(heads[-1].state_dict(), f"{{sys.argv[1]}}/head-{{os.environ.get('RANK', 0)}}.pt")
"""


@pytest.fixture
def driver(tmp_path):
    path = tmp_path / "driver.py"
    path.write_text(DRIVER)
    return path


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_embedders(train, driver, options, tmp_path):
    command = [driver, tmp_path, "15", *options, "--output_dir", tmp_path / "out"]
    run_killed(*command)
    resumed, straight = train("--resume_from_checkpoint", "latest"), train(output="straight")
    assert resumed.metrics == straight.metrics
    assert resumed.weights(6) == straight.weights(6)


@pytest.mark.slow
def test_two_processes_agree_and_share_the_features(driver, options, train, tmp_path):
    done = two_processes(driver, str(tmp_path), "0", *options, "--output_dir", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"head-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    caches = [path for path in (tmp_path / "features").iterdir() if path.name != "scans"]
    assert len(caches) == 1
    assert len(list(caches[0].iterdir())) == 2
    alone = train(output="alone")
    assert (
        alone.metrics["settings"]["split"]
        == json.loads((tmp_path / "out" / "metrics.json").read_text())["settings"]["split"]
    )
