"""sketch-perceptual: one program of several commands."""

import platform
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from sketch_perceptual import __version__
from sketch_perceptual.__main__ import COMMANDS, main
from sketch_perceptual.cli.arguments import Parser
from sketch_perceptual.commands import compare, convert, env, evaluate, search, stylize

pytestmark = pytest.mark.usefixtures("signals")


@pytest.mark.parametrize(
    ("command", "module"),
    {"compare": compare, "convert": convert, "evaluate": evaluate, "search": search, "stylize": stylize}.items(),
)
def test_a_command_gets_all_that_follows_it(command, module, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "main", seen.append)
    main([command, "a.png", "--help", "--figure", "f.png"])
    assert seen == [["a.png", "--help", "--figure", "f.png"]]


@pytest.mark.parametrize("command", COMMANDS)
def test_usage_names_the_command(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: sketch-perceptual {command} ")


def test_what_is_no_command_is_refused(capsys):
    for arguments in (["a.png", "b.png"], []):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert all(name in printed for name in ("sketch-perceptual: error:", "required: command\n", *COMMANDS))


def test_a_mistyped_command_is_guessed(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["compair", "a.png", "b.png"])
    assert stop.value.code == 2
    assert "'compair': did you mean compare?" in capsys.readouterr().err


def test_the_environment_has_versions_and_no_secrets(capsys, monkeypatch):
    for name, value in {"HF_TOKEN": "hf_secret", "HOME": "/home/secret", "USER": "secret"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(platform, "node", lambda: "secret")
    main(["env"])
    lines = dict(line.removeprefix("- ").split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["sketch-perceptual"] == __version__
    assert lines["torch"] == torch.__version__.split("+")[0] or lines["torch"] == torch.__version__
    assert "secret" not in str(lines)
    assert str(ROOT) not in str(lines)


def test_accelerators_have_names_and_memory(monkeypatch):
    assert env.accelerators() or not torch.accelerator.is_available()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    card = type("Properties", (), {"name": "H100", "total_memory": 80 * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    assert env.accelerators() == ["cuda H100 80 GiB"] * 2
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    assert env.accelerators() == ["mps"]


def test_a_missing_package_is_said_to_be_missing(monkeypatch):
    monkeypatch.setattr(env, "PACKAGES", ["torch", "no-such-package"])
    assert env.environment()["no-such-package"] == "not installed"


@pytest.mark.slow
def test_errors_name_the_command():
    command = [sys.executable, "-m", "sketch_perceptual", "evaluate", "transfer", "--paired_data_dir", "nowhere"]
    done = subprocess.run([*command, "--models", "x"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("sketch-perceptual evaluate: error: ")


@pytest.mark.parametrize(
    ("options", "near"),
    [
        (["compare", "a", "b", "--figrue", "x.png"], "--figure"),
        (["evaluate", "distance", "--train_data_dir", "d", "--models", "x", "--outptu", "y"], "--output"),
        (["evaluate", "retreival"], "retrieval"),
    ],
)
def test_a_misspelt_option_is_recognised(options, near, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(options)
    assert capsys.readouterr().err.rstrip("?\n").endswith(f"did you mean {near}")


def test_the_help_shows_every_default(capsys):
    parser = Parser()
    add = parser.group("options")
    add("--rate", type=float, default=0.5)
    add("--layers", nargs="+", default=["a", "b"], help="which layers")
    add("--fast", action="store_true", help="be fast")
    parser.set_defaults(rate=0.25)
    parser.print_help()
    text = " ".join(capsys.readouterr().out.split())
    assert "default: 0.25" in text and "which layers; default: a b" in text and text.endswith("be fast")
