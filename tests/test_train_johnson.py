import json
import os
import signal
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import NARROW, draw_class, reset_accelerate, torchrun
from PIL import Image
from processes import run_killed

import train_johnson as script
from sketch_perceptual.data.images import to_tensor
from sketch_perceptual.errors import InputError
from sketch_perceptual.losses import StyleLoss
from sketch_perceptual.networks.backbone import AttentionVGG16
from sketch_perceptual.networks.hub_model import fingerprint
from sketch_perceptual.networks.style_net import load_johnson
from sketch_perceptual.training import checkpoints, steps

pytestmark = pytest.mark.usefixtures("narrow")
SMALL = """--width 4 --resolution 32 --train_batch_size 2 --num_train_epochs 2 --seed 0 --report_to none
    --num_validation_images 2 --dataloader_num_workers 0"""


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Seven coloured pictures, one of them not square."""
    root = tmp_path_factory.mktemp("photos")
    for number in range(7):
        pixels = np.random.default_rng(number).integers(0, 256, (5, 5 + (number == 3), 3), np.uint8)
        Image.fromarray(pixels).resize((40 + 8 * (number == 3), 40), Image.Resampling.BICUBIC).save(
            root / f"{number}.png"
        )
    return root


@pytest.fixture(scope="session")
def sketches(tmp_path_factory):
    root = tmp_path_factory.mktemp("sketches")
    draw_class(root / "all", 0, 3)
    return root / "all"


@pytest.fixture
def network(tmp_path):
    torch.manual_seed(0)
    AttentionVGG16(pool_after_attention=True, num_classes=0, reduction=2).save_pretrained(tmp_path / "network")
    return tmp_path / "network"


@pytest.fixture
def options(photos, sketches, network):
    return f"{SMALL} --train_data_dir {photos} --style {sketches} --backbone {network}".split()


class Run:
    def __init__(self, folder, logs):
        self.folder, self.logs = folder, logs

    @property
    def metrics(self):
        return json.loads((self.folder / "metrics.json").read_text())

    @property
    def weights(self):
        return (self.folder / "model.safetensors").read_bytes()


@pytest.fixture
def train(options, tmp_path, monkeypatch, signals):
    def train(*more, output="out", fixed=None):
        reset_accelerate()
        logs = []
        monkeypatch.setattr(Accelerator, "log", lambda self, values, step: logs.append({"step": step} | values))
        args = [*(fixed or options), "--output_dir", tmp_path / output, *more]
        script.main(script.parse_args(list(map(str, args))))
        return Run(tmp_path / output, logs)

    return train


def test_the_defaults_are_the_papers():
    args = vars(script.parse_args(["--train_data_dir", "train2017", "--style", "sketches"]))
    paper = {
        "resolution": 256,
        "train_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        "adam_weight_decay": 0,
        "norm": "instance",
        "content_layer": "relu2_2",
        "style_layers": ["relu1_2", "relu2_2", "relu3_3", "relu4_3"],
        "normalize_losses": True,
        "style_target": "mean",
    }
    assert {name: args[name] for name in paper} == paper


def test_what_is_trained_loads_and_draws_what_was_shown(train, photos):
    run = train("--validation_steps", 4)
    network = load_johnson(run.folder).eval()
    drawn = sorted(path.name for path in (run.folder / "validation").iterdir())
    assert drawn == ["step-000004.png", "step-000008.png"]
    final = np.asarray(Image.open(run.folder / "validation.png"))
    assert np.array_equal(final, np.asarray(Image.open(run.folder / "validation" / "step-000008.png")))
    history = run.metrics["history"]
    assert [record["step"] for record in history] == [4, 8]
    assert {"train_loss", "content_loss", "style_loss", "total_variation", "grad_norm", "lr"} <= set(run.logs[0])
    assert history[-1]["train_loss"] == run.logs[-1]["train_loss"]
    assert network(to_tensor(Image.open(photos / "0.png"))[None]).std() > 0


def test_the_loss_falls(train):
    run = train("--num_train_epochs", 12, "--learning_rate", 1e-2)
    losses = [log["train_loss"] for log in run.logs]
    assert np.mean(losses[-4:]) < 0.7 * np.mean(losses[:4])


def test_losses_are_counted_in_those_of_the_untrained_network(train):
    """Whatever the scale of the backbone: louder features leave the first step's loss as it was."""
    first = train("--max_train_steps", 1, "--tv_weight", 0)
    assert first.logs[0]["train_loss"] == pytest.approx(1 + 0.3, rel=0.5)
    scales = first.metrics["scales"]
    plain = train("--max_train_steps", 1, "--tv_weight", 0, "--no-normalize_losses", output="plain")
    log = plain.logs[0]
    assert log["train_loss"] == pytest.approx(log["content_loss"] + 0.3 * log["style_loss"], rel=1e-5)
    expected = log["content_loss"] / scales["content"] + 0.3 * log["style_loss"] / scales["style"]
    assert first.logs[0]["train_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_mean_style_is_the_mean_over_all_drawings(network, sketches):
    fit = partial(script.fit_image, resolution=32)
    style_loss = StyleLoss(network)
    paths = sorted(sketches.iterdir())
    images = script.Images(paths, list(map(str, paths)))
    mean = script.StyleTarget(style_loss, images, fit, 0, is_mean=True)(step=5)
    each = [style_loss.grams(to_tensor(script.fit_image(images.image(n), 32))[None]) for n in range(3)]
    for name, gram in mean.items():
        torch.testing.assert_close(gram, sum(grams[name] for grams in each) / 3)
    target = script.StyleTarget(style_loss, images, fit, 0, is_mean=False)
    seen = {float(target(step)["relu1_2"].sum()) for step in range(20)}
    assert len(seen) == 3
    assert float(target(4)["relu1_2"].sum()) == float(target(4)["relu1_2"].sum())


@pytest.mark.parametrize(
    "more", [["--dataloader_num_workers", "2"], ["--style_target", "random", "--random_flip", "--norm", "batch"]]
)
def test_an_interrupted_run_resumes_to_the_same_network(train, monkeypatch, more):
    straight = train(*more, output="straight")
    seen, check = [], steps.Meter.close

    def interrupt(self, *args):
        seen.append(args)
        if len(seen) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return check(self, *args)

    monkeypatch.setattr(steps.Meter, "close", interrupt)
    with pytest.raises(SystemExit) as exit:
        train(*more)
    assert exit.value.code == 128 + signal.SIGTERM
    resumed = train("--resume_from_checkpoint", "latest", *more)
    assert resumed.weights == straight.weights
    assert resumed.metrics["scales"] == straight.metrics["scales"]


def test_another_setting_cannot_resume_and_a_checkpoint_is_a_network(train):
    run = train("--checkpointing_steps", 4)
    names = [path.name for path in checkpoints.find_checkpoints(run.folder)]
    assert names == ["checkpoint-4", "checkpoint-8"]
    assert fingerprint(load_johnson(run.folder / "checkpoint-8")) == fingerprint(load_johnson(run.folder))
    with pytest.raises(InputError, match=r"style_weight was 0\.3, is 5\.0"):
        train("--resume_from_checkpoint", "latest", "--style_weight", 5)


def poison(monkeypatch, bad):
    losses, count = script.TransferLoss.__call__, []

    def poisoned(*args):
        count.append(1)
        found = losses(*args)
        if len(count) in bad:
            found["style"] = found["style"] * torch.nan
        return found

    monkeypatch.setattr(script.TransferLoss, "__call__", poisoned)


def test_a_step_that_is_not_finite_is_skipped_and_named(train, monkeypatch, caplog):
    poison(monkeypatch, {8})  # the first seven are the probes
    run = train("--num_validation_images", 1)
    skipped = [record.getMessage() for record in caplog.records if "skipped, not finite" in record.getMessage()]
    assert len(skipped) == 1
    assert skipped[0].count(".png") == 2
    assert all(weight.isfinite().all() for weight in load_johnson(run.folder).parameters())


def test_a_run_that_stays_not_finite_ends_and_saves_no_nan(train, monkeypatch, tmp_path):
    poison(monkeypatch, range(12, 99))
    with pytest.raises(FloatingPointError, match="5 steps in a row were not finite"):
        train("--num_train_epochs", 9, "--checkpointing_steps", 2)
    for checkpoint in checkpoints.find_checkpoints(tmp_path / "out"):
        assert all(weight.isfinite().all() for weight in load_johnson(checkpoint).parameters())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_float32_weights(train, precision):
    run = train("--mixed_precision", precision)
    network = load_johnson(run.folder)
    assert {weight.dtype for weight in network.parameters()} == {torch.float32}
    assert all(weight.isfinite().all() for weight in network.parameters())


def test_blank_photos_are_left_out_and_a_blank_style_is_finite(train, photos, tmp_path, caplog):
    """Instance normalisation divides by a deviation of 0, fifteen times."""
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for path in photos.iterdir():
        (mixed / path.name).write_bytes(path.read_bytes())
    for colour in ("white", "black"):
        Image.new("RGB", (40, 40), colour).save(mixed / f"{colour}.png")
    run = train("--train_data_dir", mixed, "--style", mixed / "white.png")
    assert "2 near-constant photos are left out" in caplog.text
    assert run.metrics["settings"]["data"].startswith("7 photos, 1 drawings")
    assert all(np.isfinite(log["train_loss"]) and log["grad_norm"] < 1e6 for log in run.logs)
    for path in photos.iterdir():
        (mixed / path.name).unlink()
    with pytest.raises(InputError, match="all photos are near-constant"):
        train("--train_data_dir", mixed)


def test_a_paired_set_is_content_and_style(train, photos, sketches, network, tmp_path):
    root = tmp_path / "pairs"
    for number, sketch in enumerate(sorted(sketches.iterdir())):
        for folder, source in (("photo", photos / f"{number}.png"), ("sketch", sketch)):
            target = root / ("test" if number == 2 else "train") / folder / f"{number}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    fixed = f"{SMALL} --paired_data_dir {root} --backbone {network}".split()
    run = train(fixed=fixed, output="paired")
    assert run.metrics["settings"]["data"].startswith("2 photos, 2 drawings")
    other = train("--train_data_dir", photos, fixed=fixed, output="other")
    assert other.metrics["settings"]["data"].startswith("7 photos, 2 drawings")


def test_the_hub_gets_the_network_and_the_card_tells_how_it_was_made(train, hub):
    run = train("--push_to_hub", "--hub_token", "hf_writer", "--checkpointing_steps", 4)
    assert sorted(hub.repos["someone/out"].files) == sorted(script.FILES)
    assert not any(b"hf_writer" in path.read_bytes() for path in run.folder.rglob("*") if path.is_file())
    card = (run.folder / "README.md").read_text()
    for line in ("in the style of 3 drawings", "VGG-16 with attention", "on 7 photos for 8 steps", "| width | 4 |"):
        assert line in card
    snippet = card.split("```python\n")[1].split("```")[0]
    assert 'load_johnson("someone/out")' in snippet
    exec(snippet.replace("sketch.png", str(run.folder / "x.png")), {})
    assert Image.open(run.folder / "x.png").size == (300, 200)


DRIVER = f"""
import os, signal, sys
import torch
import train_johnson as script
from sketch_perceptual.networks import backbone

backbone.STAGES = {NARROW}
networks, seen, losses, net = [], [], script.TransferLoss.__call__, script.JohnsonNet
script.JohnsonNet = lambda *args: networks.append(net(*args)) or networks[-1]
def spy(*args):
    seen.append(args)
    if len(seen) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return losses(*args)
script.TransferLoss.__call__ = spy
script.entry.run(script.main, script.parse_args(sys.argv[3:]))
torch.save(networks[0].state_dict(), f"{{sys.argv[1]}}/network-{{os.environ.get('RANK', 0)}}.pt")
"""


@pytest.fixture
def driver(tmp_path):
    path = tmp_path / "driver.py"
    path.write_text(DRIVER)
    return path


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_network(train, driver, options, tmp_path):
    command = [driver, tmp_path, "13", *options, "--output_dir", tmp_path / "out"]
    command += ["--checkpointing_steps", "4"]
    run_killed(*command)
    assert [path.name for path in checkpoints.find_checkpoints(tmp_path / "out")] == ["checkpoint-4"]
    resumed, straight = train("--resume_from_checkpoint", "latest"), train(output="straight")
    assert resumed.weights == straight.weights


@pytest.mark.slow
def test_two_processes_agree(driver, options, tmp_path):
    done = torchrun(driver, str(tmp_path), "0", *options, "--output_dir", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"network-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    exported = load_johnson(tmp_path / "out").state_dict()
    assert all(torch.equal(exported[name], first[name]) for name in first)
