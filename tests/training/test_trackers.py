"""Trackers that cannot track are told at once; pictures keep their captions. Of those not installed, stand-ins."""

import argparse
import sys
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from accelerate.utils import LoggerType
from PIL import Image

from sketch_perceptual.errors import InputError
from sketch_perceptual.training import trackers

IMAGES = {"a house": [Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8))], "a cat": [Image.new("RGB", (8, 6))]}
VARIABLES = ("WANDB_MODE", "WANDB_API_KEY", *trackers.COMET_VARIABLES)


@pytest.mark.parametrize(
    ("name", "available", "variables", "says"),
    [
        ("wandb", "", {}, "`report_to` wandb needs its package: pip install wandb"),
        ("trackio", "", {}, "`report_to` trackio needs its package: pip install trackio"),
        ("aim", "", {}, "`report_to` aim needs its package: pip install aim"),
        ("tensorboard", "", {}, "`report_to` tensorboard needs its package"),
        ("all", "", {}, "`report_to` all: no tracker is installed"),
        ("all", "tensorboard", {}, None),
        ("wandb", "wandb", {}, "`report_to` wandb: .*`wandb login`.*WANDB_MODE=offline"),
        ("wandb", "wandb", {"WANDB_MODE": "offline"}, None),
        ("comet_ml", "comet_ml", {}, "`report_to` comet_ml: .*`comet login`.*COMET_START_ONLINE=0"),
        ("comet_ml", "comet_ml", {"COMET_API_KEY": "x"}, None),
        ("comet_ml", "comet_ml", {"COMET_START_ONLINE": "0"}, None),
        ("trackio", "trackio", {}, None),
    ],
)
def test_a_tracker_that_cannot_track_is_refused_at_once(name, available, variables, says, monkeypatch, tmp_path):
    if name not in ["all", *LoggerType.list()]:
        pytest.skip("this accelerate does not know it, and refuses it itself")
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: available.split())
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    if says is None:
        trackers.check_trackers([name])
    else:
        with pytest.raises(InputError, match=says):
            trackers.check_trackers([name])


def test_what_accelerate_has_is_found():
    trackers.check_trackers(["tensorboard"])
    with pytest.raises(InputError, match="`report_to` dvclive needs its package"):
        trackers.check_trackers(["dvclive"])


class Tracker:
    """Keeps what it is sent."""

    def __init__(self, name):
        self.name, self.sent = name, []
        self.writer = self.tracker = self
        self.alive = False

    def log(self, values, step):
        self.sent.append((step, values))

    def log_image(self, picture, name, step):
        self.sent.append((step, {name: picture}))


def accelerator_with(tracker):
    return SimpleNamespace(trackers=[tracker], is_main_process=True, init_trackers=lambda name, options: None)


def test_a_comet_that_logs_nothing_is_refused():
    """Without a connection comet_ml only says so and goes on."""
    with pytest.raises(InputError, match=r"`report_to` comet_ml: .*`comet login`.*COMET_START_ONLINE=0"):
        trackers.start_trackers(accelerator_with(Tracker("comet_ml")), "x", argparse.Namespace(hub_token=None))


def captioned(picture, caption):
    return picture, caption


def test_wandb_gets_each_picture_with_its_prompt(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Image=captioned))
    tracker = Tracker("wandb")
    trackers.track_images(accelerator_with(tracker), "validation", IMAGES, 3)
    first, second, third = IMAGES["a house"] + IMAGES["a cat"]
    assert tracker.sent == [(3, {"validation": [(first, "a house"), (second, "a house"), (third, "a cat")]})]


def test_trackio_gets_each_picture_with_its_prompt(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(Image=captioned))
    tracker = Tracker("trackio")
    trackers.track_images(accelerator_with(tracker), "validation", IMAGES, 3)
    assert tracker.sent == [
        (3, {"validation/a house/0": (IMAGES["a house"][0], "a house")}),
        (3, {"validation/a house/1": (IMAGES["a house"][1], "a house")}),
        (3, {"validation/a cat/0": (IMAGES["a cat"][0], "a cat")}),
    ]


def test_comet_gets_each_picture_with_its_prompt():
    tracker = Tracker("comet_ml")
    trackers.track_images(accelerator_with(tracker), "validation", IMAGES, 3)
    assert [next(iter(values)) for _, values in tracker.sent] == [
        "validation: a house (0)",
        "validation: a house (1)",
        "validation: a cat (0)",
    ]


def test_tensorboard_gets_prompts_as_tags_and_texts(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
    trackers.start_trackers(accelerator, "run", argparse.Namespace(rank=4, prompts=["a"], hub_token="hf_secret"))
    trackers.track_images(accelerator, "validation", IMAGES, 3)
    trackers.track_text(accelerator, "worst classes", "| class |", 3)
    accelerator.end_training()
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert set(events.Tags()["images"]) == {"validation/a house", "validation/a cat"}
    assert "worst classes/text_summary" in events.Tags()["tensors"]
    assert not any(b"hf_secret" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_pictures_that_cannot_be_written_cost_no_training(caplog):
    class Full(Tracker):
        def log_image(self, picture, name, step):
            raise OSError("no space left")

    accelerator = accelerator_with(Full("comet_ml"))
    trackers.track_images(accelerator, "validation", IMAGES, 3)
    assert accelerator.trackers == []
    assert "no space left" in caplog.text
