"""The real huggingface_hub against a small Hub on loopback: what is uploaded, what comes back, and what goes wrong."""

import logging
import os
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import datasets
import pytest
from accelerate import Accelerator
from conftest import reset_accelerate
from hub_server import CUT, DROP, Repo
from huggingface_hub import ModelCard, constants

from sketch_perceptual.data.hf_dataset import load_rows
from sketch_perceptual.diffusion.pipelines import load_pipeline
from sketch_perceptual.errors import InputError, hub_reason
from sketch_perceptual.evaluation.retrieval import read_split
from sketch_perceptual.files import files_in
from sketch_perceptual.networks.backbone import AttentionVGG16, load_backbone
from sketch_perceptual.networks.embedder import load_embedder, make_embedder
from sketch_perceptual.networks.hub_model import fingerprint, read_config
from sketch_perceptual.networks.style_net import JohnsonNet, load_johnson
from sketch_perceptual.training.hub import create_repo, push
from sketch_perceptual.training.startup import start_logging

FILES = ["README.md", "model.safetensors"]
WRONG = {
    403: r"the Hub answers 403.*: access denied",
    409: r"the Hub answers 409.*: the repository changed during the request: try again",
    429: r"the Hub answers 429.*: rate limited: try again in a few minutes",
    500: r"the Hub answers 500.*: try again later",
    DROP: r"the Hub cannot be reached \(.+\): check the connection and try again",
    CUT: r"the Hub cannot be reached \(.+\): check the connection and try again",
}


@pytest.fixture(scope="module")
def accelerator():
    reset_accelerate()
    return Accelerator(cpu=True)


@pytest.fixture
def run(accelerator):
    return SimpleNamespace(accelerator=accelerator, hub_model_id="someone/sketch")


def made(args, run):
    """The id of the repository that is created."""
    create_repo(args, run)
    return run.hub_model_id


def options(**given):
    usual = {"push_to_hub": True, "hub_model_id": "sketch", "hub_token": None, "hub_private_repo": False}
    return SimpleNamespace(**usual | {"output_dir": "out"} | given)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "out's [best]"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A card\n")
    (folder / "model.safetensors").write_bytes(os.urandom(1000))
    (folder / "optimizer.safetensors").write_bytes(b"not to be uploaded")
    return folder


@pytest.mark.parametrize("private", [False, True])
def test_a_repository_is_made_or_found_and_its_full_name_known(private, hub, run):
    args = options(hub_private_repo=private)
    assert made(args, run) == made(args, run) == "someone/sketch"
    assert hub.repos["someone/sketch"].private == private
    assert made(options(hub_model_id="people/sketch"), run) == "people/sketch"
    assert made(options(hub_model_id=None, output_dir="a/b"), run) == "someone/b"


def test_what_is_public_is_not_pushed_to_as_private(hub, run):
    create_repo(options(), run)
    with pytest.raises(InputError, match=r"`hub_private_repo`: someone/sketch exists and is public"):
        create_repo(options(hub_private_repo=True), run)


def test_who_is_not_logged_in_or_may_only_read_is_told_before_training(hub, run, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match=r"cannot create sketch: the Hub answers 401, .*: log in with "):
        create_repo(options(), run)
    with pytest.raises(InputError, match=r"cannot create sketch: the Hub answers 403, .*access denied") as error:
        create_repo(options(hub_token="hf_reader"), run)
    assert "hf_reader" not in str(error.value)


@pytest.mark.parametrize("fault", [429, 500, DROP, CUT])
def test_a_repository_that_cannot_be_made_is_told_before_training(fault, hub, run):
    hub.faults["create"] = fault
    with pytest.raises(InputError, match=f"`push_to_hub` cannot create sketch: {WRONG[fault]}"):
        create_repo(options(), run)


def test_what_is_made_is_uploaded_and_nothing_else(hub, folder, run):
    repo = hub.repos["someone/sketch"] = Repo(private=False)
    push(options(hub_model_id="someone/sketch"), run, folder, FILES)
    assert repo.files == {name: (folder / name).read_bytes() for name in FILES}
    push(options(push_to_hub=False), run, folder, ["optimizer.safetensors"])
    assert repo.commits == 1


def test_a_second_push_removes_what_the_first_left_and_nothing_of_the_user(hub, folder, run):
    repo = hub.repos["someone/sketch"] = Repo(private=False)
    repo.files = {"before.png": b"", "before2.png": b"", "docs/before.png": b"", "notes.md": b"", "README.md": b"old"}
    push(options(hub_model_id="someone/sketch"), run, folder, FILES, at_times=("before.png", "README.md"))
    assert sorted(repo.files) == ["README.md", "before2.png", "docs/before.png", "model.safetensors", "notes.md"]
    assert repo.files["README.md"] != b"old"


STAGES = ["list", "preupload", "lfs", "storage", "commit"]


@pytest.mark.parametrize(
    ("stage", "fault"), [(stage, fault) for stage in STAGES for fault in (403, 409, 500, DROP, CUT)]
)
def test_an_upload_that_fails_keeps_the_files_and_says_why(stage, fault, hub, folder, caplog, run):
    repo = hub.repos["someone/sketch"] = Repo(private=False)
    hub.faults[stage] = fault
    with pytest.raises(InputError, match=f"the upload to someone/sketch failed: {WRONG[fault]}.*All files") as error:
        push(options(hub_model_id="someone/sketch"), run, folder, FILES, at_times=("before.png",))
    assert stage in hub.asked
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, "optimizer.safetensors"])
    assert "Signature" not in str(error.value)
    assert "hf_writer" not in str(error.value) + caplog.text
    assert repo.files == {} or (stage, fault) == ("commit", CUT)  # which was done, though nobody heard of it


def test_the_command_that_is_told_uploads_the_same(hub, folder, run):
    repo = hub.repos["someone/sketch"] = Repo(private=False)
    repo.files = {"before.png": b"", "notes.md": b""}
    hub.faults["commit"] = 409
    with pytest.raises(InputError) as error:
        push(options(hub_model_id="someone/sketch"), run, folder, FILES, at_times=("before.png",))
    hub.faults.clear()
    told = str(error.value).partition("To upload them: ")[2]
    command = [sys.executable, *shlex.split(told)[1:]]
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert sorted(repo.files) == ["README.md", "model.safetensors", "notes.md"]


@pytest.mark.parametrize("fault", [403, 500, DROP, None])
def test_an_upload_by_xet_that_fails_says_why(fault, hub, folder, monkeypatch, run):
    """At its token, and None: at the storage, where nothing listens."""
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.repos["someone/sketch"] = Repo(private=False)
    hub.faults["xet"] = fault
    with pytest.raises(InputError, match=r"the upload to someone/sketch failed: the Hub (answers|cannot be reached)"):
        push(options(hub_model_id="someone/sketch"), run, folder, FILES)
    assert "xet" in hub.asked


NETWORKS = {
    "backbone": (lambda: AttentionVGG16(pool_after_attention=True, reduction=2, num_classes=0), load_backbone),
    "embedder": (lambda: AttentionVGG16(pool_after_attention=True, reduction=2, num_classes=0), load_embedder),
    "johnson": (lambda: JohnsonNet(width=4), load_johnson),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_network_comes_back_from_the_hub(kind, hub, narrow):
    make, load = NETWORKS[kind]
    network = make()
    network.push_to_hub("sketch")
    assert sorted(hub.repos["someone/sketch"].files) == ["README.md", "config.json", "model.safetensors"]
    again = load("someone/sketch")
    assert fingerprint(again.backbone if kind == "embedder" else again) == fingerprint(network)


@pytest.mark.parametrize("fault", [429, 500, DROP, CUT])
def test_a_network_that_cannot_be_read_is_told_with_the_reason(fault, hub, narrow):
    NETWORKS["backbone"][0]().push_to_hub("sketch")
    hub.faults["download"] = fault
    with pytest.raises(InputError, match=f"no backbone at someone/sketch: it must be .* \\({WRONG[fault]}\\)"):
        load_backbone("someone/sketch")


def test_a_network_that_is_private_or_absent_or_has_no_weights_is_told_so(hub, narrow, monkeypatch):
    NETWORKS["backbone"][0]().push_to_hub("sketch", private=True)
    load_backbone("someone/sketch")
    del hub.repos["someone/sketch"].files["model.safetensors"]
    hub.repos["someone/sketch"].commits += 1
    with pytest.raises(InputError, match=r"no backbone at someone/sketch: .*the Hub answers 404, 'Entry not found'"):
        load_backbone("someone/sketch")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match=r"someone/other: .*the Hub answers 401, .*hf auth login`, and check"):
        load_backbone("someone/other")


def test_config_and_weights_are_of_one_commit(hub, narrow):
    NETWORKS["backbone"][0]().push_to_hub("sketch")
    load_backbone("someone/sketch")
    sha = hub.repos["someone/sketch"].sha
    assert {path.split("/resolve/")[1] for path in hub.paths if "/resolve/" in path} == {
        "main/config.json",
        f"{sha}/model.safetensors",
    }


@pytest.mark.parametrize(
    "make", [NETWORKS["backbone"][0], NETWORKS["johnson"][0], lambda: make_embedder(NETWORKS["backbone"][0]())]
)
def test_the_card_of_a_network_runs_as_pushed(make, hub, narrow, tmp_path, monkeypatch):
    make().push_to_hub("sketch")
    monkeypatch.chdir(tmp_path)
    card = hub.repos["someone/sketch"].files["README.md"].decode()
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert '"someone/sketch"' in snippet
    assert ModelCard(card).data.library_name == "sketch-perceptual"
    exec(snippet, {})


def test_offline_is_told_as_what_it_is():
    with pytest.raises(InputError, match=r"HF_HUB_OFFLINE is set: unset it"):
        load_backbone("someone/nothing")


def test_an_error_of_no_network_is_its_first_line():
    assert hub_reason(ValueError("no such file\nand more")) == "no such file"


@pytest.mark.parametrize("fault", [429, 500, DROP, CUT])
def test_a_pipeline_that_cannot_be_read_is_told_with_the_reason(fault, hub, accelerator, tiny_sd):
    base = hub.repos["someone/tiny-sd"] = Repo(private=False)
    base.files = {path.relative_to(tiny_sd).as_posix(): path.read_bytes() for path in files_in(tiny_sd)}
    hub.faults["download"] = fault
    with pytest.raises(InputError, match=f"_path` someone/tiny-sd cannot be loaded; .*: {WRONG[fault]}"):
        load_pipeline(accelerator, "someone/tiny-sd", 32)


@pytest.mark.parametrize("fault", [401, 500, DROP])
def test_a_data_set_that_cannot_be_read_is_told_with_the_reason(fault, hub, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    hub.repos["someone/drawings"] = Repo(private=False)
    hub.faults |= {"info": fault, "download": fault}
    says = {401: "the Hub answers 401.*: log in with `hf auth login`"} | WRONG
    with pytest.raises(InputError, match=f"`dataset_name` someone/drawings cannot be loaded: {says[fault]}"):
        load_rows("someone/drawings")


def test_what_a_network_was_trained_on_is_asked_and_not_guessed(hub, narrow):
    """Without its split, which has not come, it would be scored on what it knows."""
    make_embedder(NETWORKS["backbone"][0]()).push_to_hub("sketch")
    repo = hub.repos["someone/sketch"]
    assert read_split("someone/sketch") is None
    repo.files["split.json"] = b'{"validation": ["a"], "left_out": []}'
    repo.commits += 1
    read_config("someone/sketch", AttentionVGG16)
    hub.faults["download"] = 500
    with pytest.raises(InputError, match=r"split of someone/sketch .*: the Hub answers 500"):
        read_split("someone/sketch")
    hub.faults.clear()
    assert read_split("someone/sketch") == {"validation": {"a"}, "left_out": set()}


def test_addresses_stay_out_of_the_log(hub, folder, accelerator, caplog, monkeypatch, run):
    monkeypatch.setattr(logging.getLogger(), "handlers", logging.getLogger().handlers[:])
    args = options(hub_model_id="someone/sketch")
    start_logging(accelerator, args)
    create_repo(args, run)
    push(args, run, folder, FILES)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split()[-1] for line in lines if "http" in line] == [f"{hub.url}/someone/sketch/commit/{1:040x}"]
