"""What a release holds, and that all its parts name one version."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
from conftest import ROOT

from sketch_perceptual import __version__
from sketch_perceptual.networks.backbone import BUNDLED

FOLDERS = ("benchmarks", "docs", "research", "sketch_perceptual", "tests", "tools")
TRAINERS = {f"train_{name}.py" for name in ("lora_sketch", "backbone", "johnson", "retrieval")}
TRAINERS |= {"distill_lora_sketch.py"}


def test_all_parts_name_one_version():
    citation, changes = ((ROOT / name).read_text(encoding="utf-8") for name in ("CITATION.cff", "CHANGELOG.md"))
    newest = re.search(r"^## (.+)$", changes, re.MULTILINE)[1]
    assert re.search(r"^version: (.+)$", citation, re.MULTILINE)[1] == newest.split()[0] == __version__
    if shutil.which("git") and (ROOT / ".git").exists():
        command = ["git", "tag", "--points-at", "HEAD"]
        tags = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
        assert set(tags) <= {f"v{__version__}"}
        assert not tags or "unreleased" not in newest


def build(folder, kind):
    """Path of the sdist or wheel that pip would build there."""
    code = f"import setuptools.build_meta as backend; print(backend.build_{kind}('dist'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "dist" / done.stdout.splitlines()[-1]


def files_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_an_sdist_has_all_and_its_wheel_what_runs(tmp_path, monkeypatch):
    pytest.importorskip("setuptools", minversion="70.1")  # older ones need another package
    monkeypatch.setenv("REPOSITORY", "https://host/owner/name/")
    tree, unpacked = tmp_path / "tree", tmp_path / f"sketch_perceptual-{__version__}"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*ROOT.glob("[!.]*.*"), ROOT / "Makefile", ROOT / "LICENSE"]:
        if path.is_file():
            shutil.copy(path, tree)
    files = files_in(tree)
    with tarfile.open(build(tree, "sdist")) as archive:
        archive.extractall(tmp_path)
    assert files - files_in(unpacked) == set()
    with zipfile.ZipFile(build(unpacked, "wheel")) as wheel:
        names = set(wheel.namelist())
        info = {name.partition("/")[2]: wheel.read(name).decode() for name in names if ".dist-info/" in name}
    parts = {path.relative_to(BUNDLED.parent.parent.parent).as_posix() for path in BUNDLED.iterdir()} | TRAINERS
    code = {name for name in files if re.fullmatch(r"sketch_perceptual/(?!assets).*(\.py|\.typed|\.txt)", name)}
    assert {name for name in names if ".dist-info/" not in name} == code | parts
    assert "sketch-perceptual = sketch_perceptual.__main__:main" in info["entry_points.txt"]
    links = set(re.findall(r"!?\[[^]]*\]\((.+?)\)", info["METADATA"]))
    assert "https://host/owner/name/raw/main/docs/before_after.png" in links
    assert {link.partition("://")[0] for link in links} == {"https"}
    needed = re.findall(r"^Requires-Dist: ([\w-]+)(?!.*extra)", info["METADATA"], re.MULTILINE)
    assert {*needed} == {"torch", "huggingface_hub", "safetensors", "Pillow", "numpy", "tqdm"}
