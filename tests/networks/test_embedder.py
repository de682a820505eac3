import io
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from sketch_perceptual.data.images import fit_image, to_tensor
from sketch_perceptual.errors import InputError
from sketch_perceptual.networks.backbone import AttentionVGG16
from sketch_perceptual.networks.embedder import SketchEmbedder, load_embedder, make_embedder

pytestmark = pytest.mark.usefixtures("narrow")


CONFIG = {"attention": "cbam", "pool_after_attention": True, "reduction": 2}


@pytest.mark.parametrize(
    ("embedding", "head", "dim"),
    [("pooled", "vgg", 8), ("flat", "linear", 8 * 49), ("logits", "vgg", 5), ("head", "linear", 5)],
)
def test_every_embedding_is_what_its_name_says(embedding, head, dim, tmp_path):
    torch.manual_seed(0)
    embedder = SketchEmbedder(CONFIG | {"num_classes": 5, "head": head}, embedding, resolution=64)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    found, last = embedder(images), embedder.backbone.last_map(images)
    expected = {
        "pooled": last.mean((2, 3)),
        "flat": F.adaptive_avg_pool2d(last, 7).flatten(1),
        "logits": embedder.backbone(images),
        "head": embedder.backbone(images),
    }[embedding]
    assert found.shape == (2, dim)
    torch.testing.assert_close(found, F.normalize(expected))
    assert not embedder.training
    assert not any(weight.requires_grad for weight in embedder.parameters())
    embedder.save_pretrained(tmp_path)
    again = SketchEmbedder.from_pretrained(tmp_path)
    assert torch.equal(again(images), found)
    assert json.loads((tmp_path / "config.json").read_text())["embedding"] == embedding


def test_embed_takes_pictures_of_any_kind_and_batch_size(tmp_path):
    torch.manual_seed(0)
    embedder = SketchEmbedder(CONFIG | {"num_classes": 0}, resolution=48, fit="pad")
    draw = torch.Generator().manual_seed(1)
    pictures = [
        Image.fromarray(torch.randint(256, (h, w, 3), generator=draw, dtype=torch.uint8).numpy())
        for h, w in ((48, 48), (30, 70), (200, 90))
    ]
    pictures[1].save(tmp_path / "wide.png")
    found = embedder.embed([pictures[0], tmp_path / "wide.png", pictures[2]], batch_size=2)
    tensors = torch.stack([to_tensor(fit_image(picture, 48, "pad")) for picture in pictures])
    torch.testing.assert_close(found, embedder(tensors))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    clear = Image.new("RGBA", (48, 48), (0, 0, 0, 0))
    torch.testing.assert_close(embedder.embed([clear]), embedder.embed([Image.new("RGB", (48, 48), "white")]))
    one = found[1:2]
    wide = tmp_path / "wide.png"
    for single in (
        wide,
        str(wide),
        wide.read_bytes(),
        io.BytesIO(wide.read_bytes()),
        pictures[1],
        (path for path in [wide]),
    ):
        torch.testing.assert_close(embedder.embed(single), one)
    half = embedder.half().embed(iter(pictures), batch_size=2)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, found, atol=0.01, rtol=0)
    for nothing in ([], iter([])):
        with pytest.raises(InputError, match="no images to embed"):
            embedder.embed(nothing)
    for other, name in ((None, "NoneType"), (7, "int"), (np.zeros((4, 4, 3), np.uint8), "ndarray")):
        with pytest.raises(InputError, match=f"expected a path, .*, got {name}"):
            embedder.embed(other)
    for size in (0, 2.0):
        with pytest.raises(InputError, match=f"`batch_size` must be an integer of at least 1, got {size}"):
            embedder.embed(pictures, batch_size=size)


def test_the_resolution_of_a_backbone_is_what_it_was_tuned_at(tmp_path):
    AttentionVGG16(**CONFIG, num_classes=0, resolution=48).save_pretrained(tmp_path)
    assert load_embedder(tmp_path).resolution == 48
    assert load_embedder(tmp_path, resolution=None).resolution == 48
    assert load_embedder(tmp_path, resolution=32).resolution == 32
    SketchEmbedder(CONFIG | {"num_classes": 0, "resolution": 48}, resolution=40).save_pretrained(tmp_path)
    assert load_embedder(tmp_path).resolution == 40


def test_an_embedder_loads_from_backbones_embedders_and_weights(tmp_path):
    torch.manual_seed(0)
    tuned = AttentionVGG16(**CONFIG, num_classes=3, head="linear", classes=["a", "b", "c"])
    tuned.save_pretrained(tmp_path / "tuned")
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    bare = load_embedder(tmp_path / "tuned", resolution=64)
    assert (bare.embedding, bare.resolution, bare.fit) == ("pooled", 64, "pad")
    torch.testing.assert_close(bare(images), F.normalize(tuned.last_map(images).mean((2, 3))))
    logits = load_embedder(tmp_path / "tuned", embedding="logits", fit="crop", background=None)
    torch.testing.assert_close(logits(images), F.normalize(tuned(images)))

    trained = SketchEmbedder(CONFIG | {"num_classes": 6, "head": "linear"}, "head", 32, "crop")
    trained.save_pretrained(tmp_path / "trained")
    own = load_embedder(tmp_path / "trained", embedding=None, resolution=None)
    assert (own.embedding, own.resolution, own.fit) == ("head", 32, "crop")
    pooled = load_embedder(tmp_path / "trained", embedding="pooled")
    assert (pooled.resolution, pooled(images).shape) == (32, (2, 8))

    vgg = AttentionVGG16("none", num_classes=0)
    save_file(vgg.state_dict(), tmp_path / "vgg.safetensors")
    assert load_embedder(tmp_path / "vgg.safetensors").backbone.attention == "none"
    for source, option, sentence in (
        ("tuned", "head", "tuned is a backbone without a head"),
        ("trained", "logits", "trained has a head .*not a classifier"),
        ("vgg.safetensors", "logits", "needs a backbone with a classifier"),
        ("nothing", None, "no network at .*nothing"),
    ):
        with pytest.raises(InputError, match=sentence):
            load_embedder(tmp_path / source, embedding=option)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"embedding": "mean"}, "`embedding` must be one of pooled, flat, logits, head"),
        ({"fit": "squeeze"}, "`fit` must be one of"),
        ({"resolution": 0}, "`resolution` must be a positive integer, got 0"),
        ({"background": "whiet"}, "`background`: 'whiet' is not a colour"),
    ],
)
def test_a_wrong_option_is_named(options, sentence):
    with pytest.raises(InputError, match=sentence):
        SketchEmbedder(CONFIG | {"num_classes": 0}, **options)


def test_the_feature_key_changes_with_what_changes_features_and_with_nothing_else():
    torch.manual_seed(0)
    network = AttentionVGG16(**CONFIG, num_classes=4, head="linear")
    other = AttentionVGG16(**CONFIG, num_classes=4, head="linear")
    options = [{}, {"resolution": 64}, {"fit": "crop"}, {"background": "black"}, {"embedding": "flat"}]
    keys = [make_embedder(network, **option).feature_key for option in options] + [make_embedder(other).feature_key]
    assert len(set(keys)) == 6
    assert make_embedder(network, embedding="logits", background="#fff").feature_key == keys[0]
