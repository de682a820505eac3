"""What a base installation does, and what it says of the rest."""

import configparser
import re
import runpy
import subprocess
import sys

import pytest
from conftest import ROOT

from sketch_perceptual import InputError
from sketch_perceptual.__main__ import main
from sketch_perceptual.extras import SCRIPTS, optional, require
from sketch_perceptual.networks.style_net import JohnsonNet

SEARCH = {"accelerate", "datasets", "faiss", "psutil"}
NOT_IN_BASE = {*SCRIPTS, *SEARCH, "tensorboard", "lpips", "torch_fidelity", "torchmetrics", "scipy"}
TRAINERS = ("train_lora_sketch", "distill_lora_sketch", "train_backbone", "train_johnson", "train_retrieval")


def run_without(modules, arguments, folder):
    """`sketch-perceptual` where these modules are not installed."""
    code = f"import sys; sys.modules.update(dict.fromkeys({sorted(modules)}))\n"
    code += "from sketch_perceptual.__main__ import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_what_is_missing_is_named_with_its_extra(monkeypatch):
    assert optional("json", "train").loads("1") == 1
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(InputError, match=r"^this needs lpips \(.+\): pip install 'sketch-perceptual\[eval\]'$"):
        optional("lpips", "eval")
    with pytest.raises(ImportError, match=r"sketch_perceptual\.no_such"):
        optional("sketch_perceptual.no_such", "eval")


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize(("module", "extra"), dict.fromkeys(TRAINERS, "train").items())
def test_scripts_say_what_they_miss_before_they_import_it(module, extra, monkeypatch, capsys):
    for package in ("accelerate", "peft"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert stop.value.code == 2
    says = f"{module}.py: error: this needs accelerate, peft: pip install 'sketch-perceptual[{extra}]'\n"
    assert capsys.readouterr().err == says


def test_evaluate_says_what_it_misses(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, "sketch_perceptual.commands.evaluate", raising=False)
    monkeypatch.setattr("sys.argv", ["/home/x/sketch_perceptual/__main__.py"])
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", "distance"])
    says = "sketch-perceptual: error: this needs peft: pip install 'sketch-perceptual[eval]'\n"
    assert capsys.readouterr().err == says


def test_a_torchvision_of_another_torch_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    with pytest.raises(SystemExit) as stop:
        require("train")
    assert stop.value.code == 2
    says = (
        r".*error: torch \S+, torchvision \S+ do not work together \(.*::nms does not exist\): install both from .+\n"
    )
    assert re.fullmatch(says, capsys.readouterr().err)


def test_a_search_says_what_it_misses(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.delitem(sys.modules, "sketch_perceptual.commands.search", raising=False)
    with pytest.raises(SystemExit) as stop:
        main(["search", "--help"])
    assert stop.value.code == 2
    says = (
        r"sketch-perceptual search: error: this needs accelerate \(.+\): pip install 'sketch-perceptual\[search\]'\n"
    )
    assert re.fullmatch(says, capsys.readouterr().err)


def test_extras_install_what_scripts_require():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    extras = {
        name: set(re.findall(r"^[\w-]+", text, re.MULTILINE))
        for name, text in config["options.extras_require"].items()
    }
    assert set(SCRIPTS) <= extras["train"] <= extras["eval"] <= extras["all"] <= extras["test"]
    assert extras["search"] <= extras["all"]


@pytest.mark.slow
def test_a_base_installation_compares_and_stylizes(drawings, tmp_path):
    JohnsonNet(width=4).save_pretrained(tmp_path / "style")
    one, other, *_ = sorted(drawings.rglob("*.png"))
    compared = run_without(NOT_IN_BASE, ["compare", one, other, "--figure", "figure.png"], tmp_path)
    assert compared.returncode == 0, compared.stderr
    assert (tmp_path / "figure.png").is_file()
    options = ["--model", "style", "--input", one, "--output", "drawn.png"]
    assert run_without(NOT_IN_BASE, ["stylize", *options], tmp_path).returncode == 0


@pytest.mark.slow
def test_a_search_needs_its_own_extra_alone(drawings, tmp_path):
    query = min(drawings.rglob("*.png"))
    options = ["--query", query, "--gallery", drawings, "--figure", "found.png", "--resolution", 32]
    done = run_without(NOT_IN_BASE - SEARCH, ["search", *options], tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 7
