"""Models made from configurations, small and random, and what the tests of the scripts share."""

import os

from hub_server import HUB

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_ENDPOINT"] = HUB.url
os.environ["HF_XET_CLIENT_RETRY_MAX_ATTEMPTS"] = "1"
os.environ["HF_XET_CLIENT_RETRY_BASE_DELAY"] = "1ms"

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http
from PIL import Image, ImageDraw
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sketch_perceptual.cli import interruption
from sketch_perceptual.networks import backbone as backbone_module
from sketch_perceptual.networks.backbone import AttentionVGG16

ROOT = Path(__file__).parent.parent


# A job in the background, or under nohup, ignores these; runs under test hear them.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

NARROW = ((4, 4), (4, 4), (8, 8, 8), (8, 8, 8), (8, 8, 8))


def pytest_collection_modifyitems(items):
    """Slow tests last."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Features and scans go to a folder of this session, those of subprocesses too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def narrow(monkeypatch):
    """VGG-16 with 2,000 weights."""
    monkeypatch.setattr(backbone_module, "STAGES", NARROW)


def reset_accelerate():
    """Forget the run before: accelerate keeps its state in the process."""
    PartialState._reset_state()
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub without anything on it, and its client as one has it who is logged in; it tries again without waiting."""
    HUB.clear()
    places = {"HF_HUB_CACHE": str(tmp_path / "hub-cache"), "HF_TOKEN_PATH": str(tmp_path / "no-token")}
    for name, value in ({"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True} | places).items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    hurried = SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None})
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", hurried)
    renew = getattr(_http, "reset_sessions", lambda: None)  # before 1.0 a session is offline or not
    renew()
    yield HUB
    constants.HF_HUB_OFFLINE = True
    renew()


def draw_class(folder, first, count):
    """`count` drawings of one class, all different."""
    folder.mkdir(parents=True)
    for number in range(first, first + count):
        image = Image.new("RGB", (40, 36), "white")
        draw = ImageDraw.Draw(image)
        draw.line((2 * number % 40, 0, 39 - 5 * number % 40, 35), "black", 2)
        draw.ellipse((3 * number % 29, 5, 3 * number % 29 + 9, 30), outline="black")
        image.save(folder / f"{number}.png")


def torchrun(driver, *options):
    """Run a script in two CPU processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launch, str(driver), *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture
def signals():
    """Puts back what a trainer does to signal handlers."""
    handlers = {number: signal.getsignal(number) for number in interruption.SIGNALS}
    yield
    interruption.defer(False)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def tiny_tokenizer(folder):
    """A CLIPTokenizer of single letters."""
    letters = "abcdefghijklmnopqrstuvwxyz.,"
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory):
    """Folder of a `StableDiffusionPipeline` that draws at 32 px on 8x8 latents."""
    folder = tmp_path_factory.mktemp("tiny-sd")
    torch.manual_seed(0)
    StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=[8, 8, 8],
            down_block_types=["DownEncoderBlock2D"] * 3,
            up_block_types=["UpDecoderBlock2D"] * 3,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=32,
        ),
        unet=UNet2DConditionModel(
            block_out_channels=[16, 16],
            down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
            up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=16,
            attention_head_dim=2,
            sample_size=8,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=100,
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
            )
        ),
        tokenizer=tiny_tokenizer(folder),
        scheduler=PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def drawings(tmp_path_factory):
    """Seven drawings in two class folders, each its own."""
    folder = tmp_path_factory.mktemp("drawings")
    for number in range(7):
        image = Image.new("RGB", (40, 36), "white")
        draw = ImageDraw.Draw(image)
        draw.line((4 * number, 0, 39 - 3 * number, 35), "black", 2)
        draw.ellipse((5, 5, 12 + 3 * number, 30), outline="black")
        path = folder / ("house", "snow_man")[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        image.save(path)
    return folder


@pytest.fixture(scope="session")
def backbone(tmp_path_factory):
    """Folder of an attention-VGG16 with random weights."""
    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(0)
    AttentionVGG16(pool_after_attention=True, num_classes=0, resolution=48).save_pretrained(folder)
    return folder
