import json
import os
import re
import signal
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import NARROW, draw_class, reset_accelerate
from PIL import Image
from processes import run_killed, two_processes
from safetensors.torch import load_file, save_file

import train_backbone as script
from sketch_perceptual.data.class_names import imagenet_classes
from sketch_perceptual.data.near_duplicates import content_key
from sketch_perceptual.errors import InputError
from sketch_perceptual.losses import PerceptualLoss, build_loss, check_loss
from sketch_perceptual.networks import backbone
from sketch_perceptual.networks.backbone import AttentionVGG16, load_backbone
from sketch_perceptual.networks.hub_model import fingerprint
from sketch_perceptual.training import checkpoints

pytestmark = pytest.mark.usefixtures("narrow")
WHOLE = backbone.STAGES  # before they are made narrow
AS_SAVED = "--resolution 32 --head linear --report_to none --dataloader_num_workers 0"
SMALL = f"{AS_SAVED} --pool_after_attention --reduction 2"


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """14 drawings of two classes; 12 are trained on, in 6 batches of 2."""
    root = tmp_path_factory.mktemp("pictures")
    draw_class(root / "hot_dog", 0, 7)
    draw_class(root / "n02012849", 7, 7)
    return root


class Run:
    """One training in this process: its folder, what it logged, and the network as it was left."""

    def __init__(self, folder, logs, network):
        self.folder, self.logs, self.network = folder, logs, network

    @property
    def metrics(self):
        return json.loads((self.folder / "best" / "metrics.json").read_text())

    def __eq__(self, other):
        ours, theirs = ([r | {"train_loss": 0} for r in run.metrics["history"]] for run in (self, other))
        return ours == theirs and all(
            (self.folder / file).read_bytes() == (other.folder / file).read_bytes()
            for file in ("last/model.safetensors", "best/model.safetensors", "best/split.json")
        )


@pytest.fixture
def train(pictures, tmp_path, monkeypatch, signals):
    """Train in this process from random weights, unless the options say otherwise; 2 epochs of 6 steps."""

    def train(*options, output="out", data=("--train_data_dir", pictures), epochs=2, usual=SMALL):
        reset_accelerate()
        logs, networks, build = [], [], script.build_network
        monkeypatch.setattr(Accelerator, "log", lambda self, values, step: logs.append({"step": step} | values))
        with monkeypatch.context() as patch:
            patch.setattr(script, "build_network", lambda *args: networks.append(build(*args)) or networks[0])
            fixed = f"""{usual} --init_weights none --train_batch_size 2 --learning_rate 1e-2 --seed 0
                --num_train_epochs {epochs} --logging_steps 1 --output_dir {tmp_path / output}"""
            script.main(script.parse_args([*fixed.split(), *map(str, data), *map(str, options)]))
        return Run(tmp_path / output, logs, networks[0][0])

    return train


def test_the_defaults_are_algorithm_1(monkeypatch):
    monkeypatch.setattr(backbone, "STAGES", WHOLE)
    args = vars(script.parse_args(["--train_data_dir", "ImageNet-Sketch"]))
    with torch.device("meta"):
        network = AttentionVGG16(**script.network_settings(SimpleNamespace(**args), None), num_classes=0)
    assert (network.attention, network.pool_after_attention, network.settings["open_gates"]) == ("cbam", False, False)
    paper = {
        "init_weights": "imagenet",
        "head": "vgg",
        "validation_share": 0.1,
        "resolution": 224,
        "train_batch_size": 32,
        "num_train_epochs": 25,
        "adam_weight_decay": 0,
        "learning_rate": 1e-4,
        "lr_scheduler": "constant",
        "max_grad_norm": None,
    }
    assert {name: args[name] for name in paper} == paper


def test_best_and_last_load_anywhere_and_give_the_trained_logits(train, monkeypatch):
    tracked = []
    monkeypatch.setattr(script, "track_images", lambda *what: tracked.append(what[1:]))
    run = train(epochs=3)
    last = AttentionVGG16.from_pretrained(run.folder / "last").eval()
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    torch.testing.assert_close(last(images), run.network.eval()(images))
    best = AttentionVGG16.from_pretrained(run.folder / "best")
    assert set(best.calibration) == set(best.tap_index)
    assert best.settings["resolution"] == 32
    assert best.classes == last.classes == ["hot_dog", "n02012849"]
    history = run.metrics["history"]
    assert [record["epoch"] for record in history] == [1, 2, 3]
    assert run.metrics["best"] == max(history, key=lambda record: record["top1"])
    assert (fingerprint(best) == fingerprint(last)) == (run.metrics["best"]["epoch"] == 3)
    split = json.loads((run.folder / "best" / "split.json").read_text())
    assert (split["train_images"], split["validation_images"], len(split["validation"])) == (12, 2, 2)
    assert Image.open(run.folder / "best" / "curve.png").width > 600
    assert {"train_loss", "grad_norm", "images_per_second", "lr"} <= set(run.logs[0])
    epochs = [log for log in run.logs if "validation_top1" in log]
    assert [log["validation_top1"] for log in epochs] == [record["top1"] for record in history]
    assert [(phase, step) for phase, _, step in tracked] == [("learning curve", 6 * epoch) for epoch in (1, 2, 3)]
    tables = [log["worst classes"] for log in run.logs if "worst classes" in log]
    assert tables[2] == script.worst_table(history[2]["worst_classes"])


def test_the_card_tells_how_it_was_made_and_its_snippet_runs(train, pictures, monkeypatch, capsys, tmp_path):
    run = train("--hub_model_id", "someone/net", "--license", "cc-by-4.0")
    card = (run.folder / "best" / "README.md").read_text()
    best = run.metrics["best"]
    for line in (
        "VGG-16 with attention before its first two max-pools",
        "On 2 held-out drawings, which share no copy with the 12 trained on",
        f"top-1 {best['top1']:.1%}, top-5 {best['top5']:.1%} after epoch {best['epoch']} of 2",
        "12 images for training, 2 held out",
        "| attention | cbam |",
        "| init_weights | none |",
        f"| init_all | {run.metrics['settings']['init_all']} |",
        "| learning_rate | 0.01 |",
        "![curve](./curve.png)",
        "license: cc-by-4.0",
    ):
        assert line in card
    for secret in (str(pictures), str(tmp_path)):
        assert secret not in card
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert 'from_pretrained("someone/net")' in snippet
    exec(snippet.replace("someone/net", str(run.folder / "best")), {})
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2] in ("hot_dog", "n02012849")
    assert printed[-1].startswith("tensor([")


def test_weights_from_a_file_and_their_hash(train, tmp_path):
    trunk = AttentionVGG16("none", num_classes=0)
    save_file(trunk.state_dict(), tmp_path / "trunk.safetensors")
    run = train("--init_weights", tmp_path / "trunk.safetensors", "--learning_rate", 1e-30)
    torch.testing.assert_close(run.network.features[5].weight, trunk.features[5].weight)
    settings = run.metrics["settings"]
    convolutions = torch.nn.ModuleList(layer for layer in trunk.features if isinstance(layer, torch.nn.Conv2d))
    assert settings["init_weights"] == "trunk.safetensors"
    assert settings["init_convolutions"] == fingerprint(convolutions)
    assert settings["new_weights"].startswith("classifier, features.4.attention.channel.mlp.0")


@pytest.mark.parametrize(
    ("freeze", "trained"),
    [
        ((), {"conv", "attention", "classifier"}),
        (("--freeze", "convolutions"), {"attention", "classifier"}),
        (("--freeze", "features"), {"classifier"}),
    ],
)
def test_what_is_frozen_stays(train, freeze, trained):
    start = train("--learning_rate", 1e-30, output="start").network.state_dict()
    after = train(*freeze, "--adam_weight_decay", 0.1).network.state_dict()
    changed = {name for name in start if not torch.allclose(start[name], after[name], 0, 1e-20)}
    kinds = {"attention" if ".attention." in n else "conv" if n.startswith("features.") else n[:10] for n in changed}
    assert kinds == trained


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("--checkpointing_steps", 6),  # at an epoch's end, before its validation
        (),  # after it
        ("--checkpointing_steps", 8),  # in the middle of the second epoch
        ("--checkpointing_steps", 4, "--gradient_accumulation_steps", 2, "--lr_scheduler", "cosine"),
        ("--checkpointing_steps", 8, "--dataloader_num_workers", 2, "--mixed_precision", "bf16", "--head", "vgg"),
    ],
)
def test_a_resumed_run_is_the_straight_run_bit_for_bit(train, monkeypatch, options):
    if "vgg" in options:  # whose dropout is drawn anew, with fewer weights
        monkeypatch.setattr(
            backbone,
            "_classifier",
            lambda channels, classes, head: torch.nn.Sequential(
                torch.nn.Dropout(), torch.nn.Linear(channels * 49, classes)
            ),
        )
    options = (*options, "--logging_steps", 3, "--checkpoints_total_limit", 9)
    straight, stopped = train(*options, epochs=3), train(*options, output="resumed", epochs=3)
    first, *later = checkpoints.find_checkpoints(stopped.folder)
    for path in later:
        (path / checkpoints.STATE_FILE).unlink()  # as if the run had been killed while writing it
    (stopped.folder / "last" / "model.safetensors").unlink()
    resumed = train(*options, "--resume_from_checkpoint", "latest", output="resumed", epochs=3)
    assert min(log["step"] for log in resumed.logs) > int(first.name.split("-")[1]) or "epoch" in resumed.logs[0]
    assert resumed == straight


def test_a_finished_run_resumed_trains_nothing(train):
    run = train()
    before = (run.folder / "last" / "model.safetensors").read_bytes()
    again = train("--resume_from_checkpoint", "latest")
    assert again.logs == []
    assert (run.folder / "last" / "model.safetensors").read_bytes() == before


def test_a_checkpoint_holds_all_that_the_result_needs(train, tmp_path):
    """Resumed in another folder, on what was the best epoch so far."""
    straight = train(output="straight", epochs=3)
    (tmp_path / "moved").mkdir()
    (straight.folder / "checkpoint-12").rename(tmp_path / "moved" / "checkpoint-12")
    resumed = train("--resume_from_checkpoint", tmp_path / "moved" / "checkpoint-12", output="elsewhere", epochs=3)
    assert resumed == straight


def test_weights_that_are_not_finite_are_not_written(train, tmp_path):
    with pytest.raises(FloatingPointError, match=r"after step 2 weights are not finite .* there is no checkpoint"):
        train("--adam_epsilon", 0, "--max_train_steps", 2)
    assert not list((tmp_path / "out").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--attention", "none"), "attention was 'cbam', is 'none'"),
        (("--seed", 1), "seed was 0, is 1"),
        (("--validation_share", 0.3), r"validation_share was 0\.1, is 0\.3"),
        (("--freeze", "features"), "freeze was None, is 'features'"),
    ],
)
def test_a_resume_that_would_be_another_run_is_refused(train, options, message):
    train(epochs=1)
    with pytest.raises(InputError, match=message):
        train("--resume_from_checkpoint", "latest", *options)


def test_a_signal_saves_and_the_run_goes_on(train, monkeypatch, tmp_path):
    add, seen = script.Meter.add, []

    def interrupt(self, *args):
        seen.append(args)
        if len(seen) == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        add(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(script.Meter, "add", interrupt)
        with pytest.raises(SystemExit) as exit:
            train("--logging_steps", 100)
    assert exit.value.code == 128 + signal.SIGTERM
    assert [path.name for path in checkpoints.find_checkpoints(tmp_path / "out")] == ["checkpoint-6", "checkpoint-8"]
    assert train("--resume_from_checkpoint", "latest") == train(output="straight")


def poison(monkeypatch, bad):
    """NaN in the loss of the batches in `bad`, counted from 0."""
    count, cross_entropy = [], torch.nn.functional.cross_entropy

    def poisoned(logits, labels, reduction):
        count.append(logits.requires_grad)
        return cross_entropy(logits, labels, reduction=reduction) * (
            torch.nan if logits.requires_grad and sum(count) - 1 in bad else 1
        )

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", poisoned)


def test_a_step_that_is_not_finite_is_skipped_and_counted(train, monkeypatch, caplog):
    poison(monkeypatch, {1})
    run = train("--logging_steps", 4)
    assert all(torch.isfinite(weight).all() for weight in run.network.state_dict().values())
    skipped = [record.getMessage() for record in caplog.records if "skipped, not finite" in record.getMessage()]
    assert len(skipped) == 1
    assert "step 2 skipped" in skipped[0]
    assert skipped[0].count(".png") == 2
    assert "1 steps were skipped" in caplog.text
    assert all(0 < record["train_loss"] < 10 for record in run.metrics["history"])


def test_a_run_that_stays_not_finite_ends_and_saves_no_nan(train, monkeypatch, tmp_path):
    poison(monkeypatch, range(7, 99))
    with pytest.raises(FloatingPointError, match=r"5 steps in a row were not finite, the last at step 12: .*\.png"):
        train(epochs=9)
    saved = [*(tmp_path / "out").rglob("model.safetensors")]
    assert {path.parent.name for path in saved} == {"best", "checkpoint-6", "checkpoint-12"}
    assert all(torch.isfinite(weight).all() for path in saved for weight in load_file(path).values())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_float32_weights(train, precision):
    start = train("--learning_rate", 1e-30, output="start").network.state_dict()
    after = train("--mixed_precision", precision, "--learning_rate", 1e-6, epochs=1).network.state_dict()
    assert {weight.dtype for weight in after.values()} == {torch.float32}
    assert 0 < max(float((after[name] - start[name]).abs().max()) for name in start) < 1e-4


def test_gradient_checkpointing_changes_nothing_but_memory(train):
    plain, checkpointed = train(epochs=1), train("--gradient_checkpointing", output="checkpointed", epochs=1)
    for name, weight in plain.network.state_dict().items():
        torch.testing.assert_close(checkpointed.network.state_dict()[name], weight)


def test_a_network_that_knows_the_classes_is_scored_before_tuning(train, tmp_path):
    first = train()
    again = train("--init_weights", first.folder / "last", output="again", epochs=1)
    before = again.metrics["before_tuning"]
    assert before == {k: first.metrics["history"][-1][k] for k in ("loss", "top1", "top5", "worst_classes")}
    assert "Before tuning: top-1" in (again.folder / "best" / "README.md").read_text()
    draw_class(tmp_path / "others" / "fish", 0, 3)
    draw_class(tmp_path / "others" / "bird", 3, 3)
    other = train(
        "--init_weights", first.folder / "last", data=("--train_data_dir", tmp_path / "others"), output="o"
    ).metrics
    assert "before_tuning" not in other
    assert other["settings"]["new_weights"] == "classifier"


def test_imagenets_own_network_is_scored_where_the_classes_are_imagenets(tmp_path):
    vgg = AttentionVGG16("none")
    save_file(vgg.state_dict(), tmp_path / "vgg16.safetensors")
    arguments = ["--train_data_dir", "x", "--seed", "0", "--reduction", "2", "--init_weights"]
    args = script.parse_args([*arguments, str(tmp_path / "vgg16.safetensors")])
    network, untouched, _ = script.build_network(args, list(imagenet_classes()), 0)
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    assert torch.equal(untouched.eval()(images), vgg.eval()(images))
    assert torch.equal(network.classifier[6].weight, vgg.classifier[6].weight)
    assert script.build_network(args, list(imagenet_classes())[:999], 0)[1] is None


def test_a_saved_network_is_tuned_further_as_it_is(train, tmp_path):
    AttentionVGG16("identity", num_classes=0).save_pretrained(tmp_path / "control")
    run = train("--init_weights", tmp_path / "control", usual=AS_SAVED)
    assert (run.network.attention, run.network.pool_after_attention) == ("identity", False)
    assert run.metrics["settings"]["attention"] == "identity"
    assert run.metrics["settings"]["new_weights"] == "classifier"


@pytest.mark.parametrize(
    ("saved", "options", "message"),
    [
        ({"attention": "identity"}, "--attention cbam", "attention=identity, this run has attention=cbam"),
        (
            {"reduction": 2},
            "--pool_after_attention",
            "pool_after_attention=False, this run has pool_after_attention=True",
        ),
        ({"reduction": 4}, "--reduction 2", "reduction=4, this run has reduction=2"),
    ],
)
def test_a_saved_network_of_another_architecture_is_refused(saved, options, message, train, tmp_path):
    AttentionVGG16(**saved, num_classes=0).save_pretrained(tmp_path / "saved")
    with pytest.raises(InputError, match=f"saved was saved with {message}"):
        train("--init_weights", tmp_path / "saved", *options.split(), usual=AS_SAVED)


def test_the_bundled_network_is_tuned_further(train, monkeypatch):
    monkeypatch.setattr(backbone, "STAGES", WHOLE)
    run = train("--init_weights", "bundled", "--freeze", "features", usual=AS_SAVED)
    bundled = load_backbone()
    assert run.network.last_layer == bundled.last_layer
    for name, weight in bundled.state_dict().items():
        assert torch.equal(run.network.state_dict()[name], weight), name
    assert "| init_weights | bundled |" in (run.folder / "best" / "README.md").read_text()


@pytest.fixture
def mixed(tmp_path):
    """Two classes, one with one picture, and every oddity that ImageNet-Sketch or a scanner brings."""
    root = tmp_path / "mixed"
    draw_class(root / "many", 0, 6)
    draw_class(root / "single", 6, 1)
    Image.new("L", (30, 30)).save(root / "many" / "black.JPEG")
    grey = Image.open(root / "many" / "0.png").convert("L").transpose(Image.Transpose.ROTATE_90)
    grey.point(lambda level: level * 257, "I").convert("I;16").save(root / "many" / "scan.tiff")
    (root / "many" / "cut.png").write_bytes((root / "many" / "1.png").read_bytes()[:150])
    (root / ".ipynb_checkpoints").mkdir()
    (root / ".ipynb_checkpoints" / "0.png").write_bytes((root / "many" / "0.png").read_bytes())
    (root / "empty").mkdir()
    return root


def test_odd_pictures_are_named_and_what_can_be_read_is_trained_on(train, mixed, caplog):
    with pytest.raises(InputError, match=r"1 of 10 images cannot be read\.\n.*cut\.png"):
        train(data=("--train_data_dir", mixed))
    run = train("--on_bad_image", "skip", data=("--train_data_dir", mixed))
    assert run.network.classes == ["many", "single"]
    for part in (
        "1 near-constant: perhaps their transparency was lost",
        "black.JPEG",
        "empty",
        "8 images for training, 1 held out",
        "with near-duplicates: 2 in 1 groups",  # the scan is the first drawing, turned
        "classes without a held-out image: 1",
    ):
        assert part in caplog.text


def test_groups_stay_whole(train, pictures, tmp_path):
    import datasets

    images = sorted(pictures.rglob("*.png"))
    rows = {
        "image": [Image.open(path).copy() for path in images],
        "name": [path.parent.name for path in images],
        "hand": [*"abcdefg"] * 2,
    }
    features = datasets.Features(
        image=datasets.Image(), name=datasets.ClassLabel(names=["hot_dog", "n02012849"]), hand=datasets.Value("string")
    )
    (tmp_path / "hands").mkdir()
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "hands" / "train.parquet")
    run = train(
        "--label_column", "name", "--group_column", "hand", data=("--dataset_name", tmp_path / "hands"), epochs=1
    )
    split = json.loads((run.folder / "best" / "split.json").read_text())
    hands = {content_key(Image.open(path).convert("RGB")): rows["hand"][n] for n, path in enumerate(images)}
    apart = {hands[key] for key in split["validation"]}
    assert len(apart) == 1
    assert len(split["validation"]) == 2
    assert "held-out drawings by hand" in (run.folder / "best" / "README.md").read_text()


def test_the_hub_gets_the_model_its_card_and_reports_and_nothing_else(train, hub):
    run = train("--push_to_hub", "--hub_token", "hf_writer", "--checkpointing_steps", 2)
    assert sorted(hub.repos["someone/out"].files) == sorted(script.FILES)
    assert sorted(path.name for path in (run.folder / "best").iterdir()) == sorted(script.FILES)
    assert not any(b"hf_writer" in path.read_bytes() for path in run.folder.rglob("*") if path.is_file())


def test_a_loss_takes_the_tuned_network(train):
    folder = train(epochs=1).folder / "best"
    loss = build_loss("attention_vgg", backbone=folder)
    check_loss(loss)
    images, target = torch.rand(2, 1, 3, 32, 32) * 2 - 1
    cut = load_backbone(folder).truncate("relu4_3")
    assert torch.equal(PerceptualLoss(cut)(images, target), loss(images, target))
    with pytest.raises(InputError, match=r"ends at relu4_3 .*relu5_1"):
        PerceptualLoss(cut, layers=["relu5_1"])


def test_the_worst_classes_are_a_table():
    row = {"class": "cat", "images": 4, "top1": 0.25, "taken_for": "dog", "times": 3}
    assert script.worst_table([row]).splitlines() == [
        "| class | images | top1 | taken_for | times |",
        "| --- | --- | --- | --- | --- |",
        "| cat | 4 | 25% | dog | 3 |",
    ]


class Fixed(torch.nn.Module):
    """Says class 2, then 0, of everything."""

    def forward(self, images):
        return torch.tensor([[2.0, 0, 3, 0, 0, 0, 1]]).expand(len(images), -1)


def test_accuracies_have_known_answers():
    labels = torch.tensor([2, 2, 0, 0, 6, 4, 5])  # of 7 classes; 2 is first, then 0, 6, 1, 3
    loader = [{"pixel_values": torch.zeros(len(part), 3, 8, 8), "label": part} for part in labels.split(3)]
    reset_accelerate()
    found = script.evaluate(Accelerator(cpu=True), Fixed(), loader, [*"abcdefg"])
    logits = Fixed()(torch.zeros(7, 3, 8, 8))
    assert found["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)))
    assert found["top1"] == 2 / 7
    assert found["top5"] == sum(int(label) in logits[0].topk(5).indices for label in labels) / 7
    assert [row["class"] for row in found["worst_classes"]] == ["a", "e", "f", "g"]
    assert found["worst_classes"][0] == {"class": "a", "images": 2, "top1": 0.0, "taken_for": "c", "times": 2}


def test_the_forecast_counts_what_is_left_and_advises():
    steps = SimpleNamespace(total=10 * 100, ends=[100])
    network = AttentionVGG16("cbam", num_classes=2, head="linear", reduction=2)
    text = script.cost_forecast(network, steps, 100, 10)
    assert "10.0 images a second: 1.7 minutes an epoch, 16.7 minutes in all" in text
    assert "--pool_after_attention keeps them" in text
    assert "--gradient_checkpointing needs less memory" in text
    plain = script.cost_forecast(AttentionVGG16("none", num_classes=2, head="linear"), steps, 100, 10)
    assert "--" not in plain


def test_a_loader_script_is_refused_with_what_to_do(train, tmp_path):
    (tmp_path / "imagenet_sketch").mkdir()
    (tmp_path / "imagenet_sketch" / "imagenet_sketch.py").write_text("raise SystemExit('ran')")
    with pytest.raises(InputError, match=r"scripts are no longer supported.*"):
        train("--dataset_name", tmp_path / "imagenet_sketch", data=())


def test_a_disk_that_is_too_small_is_found_before_training(train, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(script.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match=r"has 0\.0 GB left .* lower `checkpoints_total_limit`"):
        train()


DRIVER = f"""
import os, signal, sys
import torch
import train_backbone as script
from sketch_perceptual.networks import backbone

backbone.STAGES = {NARROW}
networks, build, add, seen = [], script.build_network, script.Meter.add, []
script.build_network = lambda *args: networks.append(build(*args)) or networks[0]
def spy(self, *args):
    seen.append(args)
    if len(seen) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, *args)
script.Meter.add = spy
script.entry.run(script.main, script.parse_args(sys.argv[3:]))
torch.save(networks[0][0].state_dict(), f"{{sys.argv[1]}}/network-{{os.environ.get('RANK', 0)}}.pt")
"""


@pytest.fixture
def driver(tmp_path):
    path = tmp_path / "driver.py"
    path.write_text(DRIVER)
    return path


@pytest.mark.slow
def test_a_run_killed_in_its_second_epoch_resumes_to_the_same_network(train, driver, pictures, tmp_path):
    options = f"""{SMALL} --train_data_dir {pictures} --init_weights none --train_batch_size 2 --learning_rate 1e-2
        --seed 0 --num_train_epochs 2 --output_dir {tmp_path / "out"}"""
    command = [driver, tmp_path, "9", *options.split()]
    run_killed(*command)
    assert [path.name for path in checkpoints.find_checkpoints(tmp_path / "out")] == ["checkpoint-6"]
    assert train("--resume_from_checkpoint", "latest") == train(output="straight")


@pytest.mark.slow
def test_two_processes_agree_and_evaluate_as_one(driver, pictures, tmp_path):
    options = f"""{SMALL} --train_data_dir {pictures} --init_weights none --train_batch_size 2 --learning_rate 1e-2
        --seed 0 --num_train_epochs 2 --validation_share 0.5 --output_dir {tmp_path / "out"}"""
    options = options.replace("batch_size 2", "batch_size 3")  # 8 drawings in batches of 6 and 2
    done = two_processes(driver, str(tmp_path), "0", *options.split())
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"network-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)

    reset_accelerate()
    args = script.parse_args(options.split())
    data = script.open_drawings(args, 0, resolution=args.resolution)
    history = json.loads((tmp_path / "out" / "best" / "metrics.json").read_text())["history"]
    kept = json.loads((tmp_path / "out" / "best" / "split.json").read_text())["validation"]
    data = data.select(n for n in range(len(data)) if content_key(data.image(n)) in kept)
    data.augment = False
    assert len(data) == 8
    network = AttentionVGG16.from_pretrained(tmp_path / "out" / "last")
    alone = script.evaluate(Accelerator(cpu=True), network, script.make_validation_loader(data, 3), data.classes)
    for name in ("top1", "top5"):
        assert alone[name] == history[-1][name]
    assert alone["loss"] == pytest.approx(history[-1]["loss"], rel=1e-5)
