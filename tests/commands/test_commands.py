"""sketch-perceptual: one program of four commands."""

import platform
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from sketch_perceptual import __version__
from sketch_perceptual.__main__ import COMMANDS, main
from sketch_perceptual.commands import compare, env, search, stylize

pytestmark = pytest.mark.usefixtures("signals")


@pytest.mark.parametrize(("command", "module"), {"compare": compare, "search": search, "stylize": stylize}.items())
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
