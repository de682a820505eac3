"""What a saved network may hold, and what is said of anything else."""

import json
import re

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file

from sketch_perceptual.errors import InputError
from sketch_perceptual.networks.backbone import AttentionVGG16, load_backbone
from sketch_perceptual.networks.embedder import SketchEmbedder, load_embedder
from sketch_perceptual.networks.style_net import JohnsonNet, load_johnson

pytestmark = pytest.mark.usefixtures("narrow")
SMALL = {"attention": "cbam", "pool_after_attention": True, "reduction": 2, "num_classes": 0}
LOADERS = {"backbone": load_backbone, "johnson": load_johnson, "embedder": load_embedder}


def save(kind, folder):
    if kind == "johnson":
        JohnsonNet(width=4).save_pretrained(folder)
    else:
        (AttentionVGG16(**SMALL) if kind == "backbone" else SketchEmbedder(SMALL)).save_pretrained(folder)


def refused(kind, folder, sentence):
    with pytest.raises(InputError) as error:
        LOADERS[kind](folder)
    assert str(error.value).startswith(sentence), str(error.value)


# network, what is put into its config.json -> what is said after the file's path
SETTINGS = [
    ("backbone", {"reduction": None}, ": reduction must be a positive integer, got null"),
    ("backbone", {"reduction": "2"}, ': reduction must be a positive integer, got "2"'),
    ("backbone", {"reduction": 2.0}, ": reduction must be a positive integer, got 2.0"),
    ("backbone", {"reduction": True}, ": reduction must be a positive integer, got true"),
    ("backbone", {"reduction": [2]}, ": reduction must be a positive integer, got [2]"),
    ("backbone", {"reduction": 1000}, ": reduction must lie between 1 and the 4 channels, got 1000"),
    ("backbone", {"num_classes": -1}, ": num_classes must be an integer of at least 0, got -1"),
    ("backbone", {"num_classes": float("nan")}, ": num_classes must be an integer of at least 0, got NaN"),
    ("backbone", {"spatial_kernel": 4}, ": spatial_kernel must be odd and positive, got 4"),
    ("backbone", {"pool_after_attention": 1}, ": pool_after_attention must be true or false, got 1"),
    ("backbone", {"attention": {}}, ": attention must be one of cbam, identity, none, got {}"),
    ("backbone", {"classes": "cat"}, ": classes must be a list"),
    ("backbone", {"classes": ["cat"]}, ": 1 classes for num_classes=0"),
    ("backbone", {"last_layer": 3}, ": last_layer must be one of relu1_1, "),
    ("backbone", {"calibration": {"relu1_1": {"softening": 1, "distance": float("inf"), "gram": 1}}}, ": calibration"),
    ("backbone", {"reductoin": 2}, ": there is no setting 'reductoin', only attention, "),
    ("johnson", {"width": None}, ": width must be a positive integer, got null"),
    ("johnson", {"norm": 5}, ": norm must be one of instance, batch, got 5"),
    ("johnson", {"depth": 5}, ": there is no setting 'depth', only norm, upsampling, width"),
    ("embedder", {"resolution": "64"}, ': resolution must be a positive integer, got "64"'),
    ("embedder", {"background": 7}, ": background must be a string, got 7"),
    ("embedder", {"background": "whiet"}, ": background: 'whiet' is not a colour"),
    ("embedder", {"embedding": "head"}, ": embedding head needs a backbone with a classifier"),
    ("embedder", {"backbone": 3}, ": backbone must hold an object, got 3"),
    ("embedder", {"backbone": {"reduction": None}}, ": backbone: reduction must be a positive integer, got null"),
    ("embedder", {"backbone": {"x": 1}}, ": backbone: there is no setting 'x'"),
]


@pytest.mark.parametrize(("kind", "settings", "sentence"), SETTINGS)
def test_a_config_that_no_network_can_have_is_named_with_its_value(kind, settings, sentence, tmp_path):
    save(kind, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    refused(kind, tmp_path, f"{path}{sentence}")


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[1]", " must hold an object, got "),
        ("[" * 100_000, " is not valid JSON"),
        ("{", " is not valid JSON"),
        ("\xff", " is not valid JSON"),
    ],
)
def test_a_config_that_is_no_object_is_named(kind, text, sentence, tmp_path):
    save(kind, tmp_path)
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    refused(kind, tmp_path, f"{tmp_path / 'config.json'}{sentence}")


@pytest.mark.parametrize("kind", LOADERS)
def test_only_safetensors_are_loaded(kind, tmp_path):
    save(kind, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"there is no .*model\.safetensors; pytorch_model\.bin is a pickle"):
        LOADERS[kind](tmp_path)


def overflow(weight):
    weight = weight.clone()
    weight.view(-1)[-1] = torch.inf
    return weight


WEIGHTS = {  # what is done to a tensor -> what is said of it after the file's path
    "is int8": lambda weight: weight.to(torch.int8),
    "is float8_e4m3fn": lambda weight: weight.to(torch.float8_e4m3fn),
    "is complex64": lambda weight: weight.to(torch.complex64),
    "has values that are not finite": lambda weight: weight * torch.nan,
    "has values that are not finite:": overflow,
    "do not fit": lambda weight: weight.repeat(2, *[1] * (weight.ndim - 1)),
}


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("trouble", WEIGHTS)
def test_weights_that_no_network_can_have_are_named(kind, trouble, tmp_path):
    save(kind, tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    name = sorted(weights)[-1]
    broken = WEIGHTS[trouble](weights[name])
    if broken.dtype not in safetensors.torch._SIZE:
        pytest.skip(f"this safetensors writes no {broken.dtype}")
    save_file(weights | {name: broken}, path)
    with pytest.raises(InputError) as error:
        LOADERS[kind](tmp_path)
    assert all(text in str(error.value) for text in (str(path), name, trouble))


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("content", [b"", b"\0" * 8, {}, {"other": torch.zeros(1)}])
def test_a_file_without_its_weights_is_named(kind, content, tmp_path):
    save(kind, tmp_path)
    path = tmp_path / "model.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save_file(content, path)
    with pytest.raises(InputError, match=re.escape(str(path))):
        LOADERS[kind](tmp_path)


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_floating_precision_load(kind, dtype, tmp_path):
    save(kind, tmp_path)
    path = tmp_path / "model.safetensors"
    weights = {name: weight.to(dtype) for name, weight in load_file(path).items()}
    save_file(weights, path)
    loaded = LOADERS[kind](tmp_path).state_dict()
    assert all(torch.equal(loaded[name], weight.float()) for name, weight in weights.items())


def test_batch_norm_counts_its_batches_in_integers(tmp_path):
    JohnsonNet("batch", width=4).save_pretrained(tmp_path)
    assert load_johnson(tmp_path).state_dict()["layers.1.num_batches_tracked"] == 0


@pytest.mark.parametrize(
    ("kind", "noun"), [("backbone", "backbone"), ("johnson", "style network"), ("embedder", "network")]
)
def test_what_is_not_there_is_named(kind, noun, tmp_path):
    refused(
        kind, "nowhere/net", f"no {noun} at nowhere/net: it must be a folder or a Hub id written by save_pretrained"
    )
    refused(kind, tmp_path, f"no {noun} at {tmp_path}: there is no config.json")
