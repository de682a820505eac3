import json

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from sketch_perceptual.errors import InputError
from sketch_perceptual.networks.backbone import LAYERS, AttentionVGG16, load_backbone, tuned_resolution
from sketch_perceptual.networks.hub_model import fingerprint
from sketch_perceptual.networks.style_net import JohnsonNet

ATTENTION_KEYS = {
    f"features.{index}.attention.{name}.weight"
    for index in (4, 9)
    for name in ("channel.mlp.0", "channel.mlp.2", "spatial.conv")
}


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    """A file in the layout of torchvision's features, as VGG-16 weights are handed around."""
    path = tmp_path_factory.mktemp("weights") / "trunk.safetensors"
    save_file(AttentionVGG16("none", num_classes=0).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    torch.manual_seed(0)
    model = torchvision.models.vgg16(weights=None).eval()
    path = tmp_path_factory.mktemp("weights") / "vgg16.safetensors"
    save_file(model.state_dict(), path)
    return model, path


def test_without_attention_it_is_torchvisions_vgg16(vgg):
    theirs, path = vgg
    ours = AttentionVGG16("none").eval()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert ours.load_vgg16(path) == []
    images = torch.rand(2, 3, 64, 80) * 2 - 1
    mean, std = ours.mean, ours.std
    expected = torchvision.transforms.functional.normalize((images + 1) / 2, mean.flatten(), std.flatten())
    torch.testing.assert_close(ours.normalize(images), expected)
    assert torch.equal(ours(images), theirs(ours.normalize(images)))


def test_taps_are_what_their_names_say(vgg):
    theirs, path = vgg
    ours = AttentionVGG16("none", num_classes=0)
    ours.load_vgg16(path)
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    taps = ours.taps(images, LAYERS)
    assert list(taps) == list(LAYERS)
    x, relus = ours.normalize(images), []
    for layer in theirs.features:
        x = layer(x)
        if isinstance(layer, torch.nn.ReLU):
            relus.append(x.clone())
    for name, expected in zip(LAYERS, relus, strict=True):
        assert torch.equal(taps[name], expected), name


def test_a_tap_is_read_before_the_attention_that_follows_it():
    model = AttentionVGG16(num_classes=0)
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    before = model.taps(images, ["relu1_2", "relu2_1"])
    model.features[4].attention.channel.mlp[2].weight.data.fill_(-9.0)
    after = model.taps(images, ["relu1_2", "relu2_1"])
    assert torch.equal(before["relu1_2"], after["relu1_2"])
    assert not torch.equal(before["relu2_1"], after["relu2_1"])


def test_taps_stop_at_the_deepest_layer_asked_for():
    model = AttentionVGG16("none", num_classes=0)
    ran = []
    for index, layer in enumerate(model.features):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    model.taps(torch.zeros(1, 3, 32, 32), ["relu2_1", "relu1_1"])
    assert ran == list(range(model.tap_index["relu2_1"] + 1))


@pytest.mark.parametrize(
    ("options", "gmac", "last_map"),
    [
        ({"attention": "none"}, 15.4, 7),
        ({"attention": "identity"}, 183.2, 28),
        ({"attention": "cbam"}, 183.2, 28),
        ({"attention": "cbam", "pool_after_attention": True}, 15.4, 7),
    ],
)
def test_multiply_adds_and_map_size_at_224_pixels(options, gmac, last_map):
    with torch.device("meta"):
        model, images = AttentionVGG16(**options), torch.zeros(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter:
        features = model.features(images)
    assert features.shape == (1, 512, last_map, last_map)
    assert model(images).shape == (1, 1000)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmac, abs=0.06)


@pytest.mark.parametrize(
    ("attention", "layer", "pixels"),
    [
        ("none", "relu3_3", 40),
        ("none", "relu4_3", 92),
        ("none", "relu5_3", 196),
        ("identity", "relu3_3", 15),
        ("identity", "relu4_3", 28),
        ("identity", "relu5_3", 54),
    ],
)
def test_how_much_of_the_image_a_layer_sees(attention, layer, pixels):
    model = AttentionVGG16(attention, num_classes=0, last_layer=layer)
    for parameter in model.parameters():
        parameter.data.fill_(1e-3)  # no gradient is lost in a ReLU
    for block in model.features:
        if hasattr(block, "pool"):
            block.pool = torch.nn.AvgPool2d(2)  # nor in a pixel that is not the largest
    side = 224 if attention == "none" else 64
    images = torch.ones(1, 3, side, side, requires_grad=True)
    activations = model.taps(images, [layer])[layer]
    activations[0, 0, activations.shape[2] // 2, activations.shape[3] // 2].backward()
    assert int((images.grad[0, 0] != 0).any(0).sum()) == pixels


@pytest.mark.parametrize(("pools", "twin"), [(False, "identity"), (True, "none")])
def test_open_gates_change_nothing_until_something_is_learned(pools, twin, trunk, tmp_path):
    model = AttentionVGG16(pool_after_attention=pools, open_gates=True, num_classes=0)
    assert set(model.load_vgg16(trunk)) == ATTENTION_KEYS
    pretrained = AttentionVGG16(twin, num_classes=0)
    pretrained.load_vgg16(trunk)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.equal(model(images), pretrained(images))
    model(images).sum().backward()
    attention = model.features[4].attention
    assert attention.channel.mlp[2].weight.grad.abs().sum() > 0
    assert attention.spatial.conv.weight.grad.abs().sum() > 0
    model.features[9].attention.spatial.conv.weight.data.add_(0.1)
    model.save_pretrained(tmp_path)
    again = load_backbone(tmp_path)
    assert again.settings["open_gates"]
    assert torch.equal(again(images), model.eval()(images))


def test_imagenet_weights_leave_only_the_attention_new(vgg, trunk):
    _, path = vgg
    model = AttentionVGG16()
    assert set(model.load_vgg16(path)) == ATTENTION_KEYS
    assert torch.equal(model.features[5].weight, load_file(path)["features.5.weight"])
    assert set(AttentionVGG16(num_classes=0).load_vgg16(trunk)) == ATTENTION_KEYS
    assert AttentionVGG16("none", num_classes=0).load_vgg16(path) == []
    assert AttentionVGG16("none", num_classes=7).load_vgg16(path) == ["classifier.6.weight", "classifier.6.bias"]
    new = AttentionVGG16("none", num_classes=7).load_vgg16(trunk)
    assert len(new) == 6
    assert all(name.startswith("classifier.") for name in new)


def test_half_precision_weights_become_float32(trunk, tmp_path):
    halves = {name: weight.half() for name, weight in load_file(trunk).items()}
    save_file(halves, tmp_path / "half.safetensors")
    model = load_backbone(tmp_path / "half.safetensors", attention="none")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.features[0].weight, halves["features.0.weight"].float())


def _without(state, name):
    return {k: v for k, v in state.items() if k != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: _without(s, "features.28.weight"), r"1 tensors .* first features.28.weight"),
        (lambda s: s | {"features.99.weight": torch.zeros(1)}, "first features.99.weight"),
        (lambda s: s | {"features.0.weight": torch.zeros(64, 1, 3, 3)}, "another shape, first features.0.weight"),
        (lambda s: {"unet." + k: v for k, v in s.items()}, "26 tensors"),
    ],
)
def test_weights_that_do_not_fit_are_refused(trunk, tmp_path, change, message):
    save_file(change(load_file(trunk)), tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=message):
        AttentionVGG16("none", num_classes=0).load_vgg16(tmp_path / "other.safetensors")


def test_missing_or_damaged_sources_are_sentences(tmp_path, monkeypatch, trunk):
    (tmp_path / "cut.safetensors").write_bytes(trunk.read_bytes()[:1000])
    (tmp_path / "vgg16.pth").write_bytes(b"pickle")
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(
        torchvision.models.VGG16_Weights,
        "get_state_dict",
        lambda *a, **k: (_ for _ in ()).throw(OSError("no network")),
    )
    cases = {
        "nowhere.safetensors": "there is no weights file .*nowhere.safetensors",
        "cut.safetensors": "cut.safetensors cannot be read as safetensors",
        "vgg16.pth": "no backbone at .*vgg16.pth",
        "empty": "no backbone at .*empty: there is no config.json",
        "imagenet": r"could not be downloaded \(no network\).*Make a .safetensors.*vgg16.safetensors",
    }
    for source, message in cases.items():
        with pytest.raises(InputError, match=message):
            load_backbone(source if source == "imagenet" else tmp_path / source)
    with pytest.raises(InputError, match=r"not a \.safetensors"):
        AttentionVGG16(num_classes=0).load_vgg16(tmp_path / "vgg16.pth")


def test_save_and_load_keep_configuration_weights_and_outputs(tmp_path):
    model = AttentionVGG16(pool_after_attention=True, num_classes=0, spatial_kernel=3, reduction=8).eval()
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    again = load_backbone(tmp_path)
    assert again._hub_mixin_config == model._hub_mixin_config
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    assert torch.equal(again(images), model(images))
    assert fingerprint(again) == fingerprint(model)
    assert fingerprint(AttentionVGG16(num_classes=0)) != fingerprint(model)


def test_bundled_is_the_network_of_the_package_unless_a_folder_is_called_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fingerprint(load_backbone("bundled")) == fingerprint(load_backbone())
    assert tuned_resolution("bundled") == 64
    with pytest.raises(InputError, match="no style network at bundled"):
        JohnsonNet.from_pretrained("bundled")
    AttentionVGG16("none", num_classes=0, last_layer="relu1_1", resolution=32).save_pretrained("bundled")
    assert load_backbone("bundled").last_layer == "relu1_1"
    assert tuned_resolution("bundled") == 32


def test_a_saved_network_tells_at_which_size_it_was_tuned(trunk, tmp_path):
    assert tuned_resolution() == 64
    assert tuned_resolution("imagenet") == tuned_resolution(trunk) == 224
    for resolution in (None, 96):
        network = AttentionVGG16("none", num_classes=0, resolution=resolution)
        network.truncate("relu1_2").save_pretrained(tmp_path)
        assert tuned_resolution(tmp_path) == (resolution or 224)
    (tmp_path / "config.json").write_text('{"resolution": "large"}')
    with pytest.raises(InputError, match=r"resolution must be a positive integer, got \"large\""):
        tuned_resolution(tmp_path)


def test_a_saved_network_must_fit_its_configuration(tmp_path):
    AttentionVGG16("none", num_classes=0).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"attention": "cbam"}))
    with pytest.raises(InputError, match=r"do not fit its config\.json"):
        load_backbone(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"attention": "se"},
        {"num_classes": -1},
        {"head": "mlp"},
        {"classes": ["cat", "dog"]},
    ],
)
def test_options_out_of_range_are_named(options):
    with pytest.raises(InputError, match=next(iter(options))):
        AttentionVGG16(**options)


def test_a_classifier_sits_on_the_last_layer_that_is_kept():
    network = AttentionVGG16(last_layer="relu2_2", num_classes=5, head="linear")
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    pooled = network.taps(images, ["relu2_2"])["relu2_2"].mean((2, 3))
    torch.testing.assert_close(network(images), network.classifier(pooled))


@pytest.mark.parametrize("layers", [[], ["relu6_1"], ["relu1_1", "relu1_1"]])
def test_layers_are_checked(layers):
    with pytest.raises(InputError, match=r"`layers` must be .*relu1_1"):
        AttentionVGG16("none", num_classes=0).taps(torch.zeros(1, 3, 32, 32), layers)


def test_a_truncated_network_has_the_same_taps_and_no_others(tmp_path):
    whole = AttentionVGG16(
        pool_after_attention=True, num_classes=3, head="linear", classes=["cat", "dog", "fish"]
    ).eval()
    whole.truncate("relu4_3").half().save_pretrained(tmp_path)
    cut = load_backbone(tmp_path)
    assert sum(weight.numel() for weight in cut.parameters()) == 7_638_020
    images, layers = torch.rand(1, 3, 32, 32) * 2 - 1, ["relu1_2", "relu4_3"]
    for weight in whole.parameters():
        weight.data = weight.data.half().float()
    for name, tap in whole.taps(images, layers).items():
        assert torch.equal(cut.taps(images, layers)[name], tap)
    with pytest.raises(InputError, match=r"ends at relu4_3 .*relu5_1"):
        cut.taps(images, ["relu1_2", "relu5_1"])


@pytest.mark.parametrize("options", [{"attention": "none"}, {}, {"pool_after_attention": True}])
def test_gradient_checkpointing_gives_the_same_gradients(options):
    model = AttentionVGG16(num_classes=2, head="linear", **options)
    images, gradients = torch.rand(1, 3, 32, 32) * 2 - 1, []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        model(images).sum().backward()
        gradients.append([weight.grad.clone() for weight in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_only_what_the_taps_need_is_kept(tmp_path):
    whole = AttentionVGG16(pool_after_attention=True, num_classes=3, head="linear").eval()
    whole.save_pretrained(tmp_path)
    cut = load_backbone(tmp_path, layers=["relu2_2", "relu1_2"])
    assert (cut.last_layer, cut.num_classes, cut.training) == ("relu2_2", 0, False)
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    assert torch.equal(cut.taps(images, ["relu2_2"])["relu2_2"], whole.taps(images, ["relu2_2"])["relu2_2"])


def test_attention_in_a_weights_file_is_loaded(tmp_path):
    tuned = AttentionVGG16(num_classes=0)
    save_file(tuned.state_dict(), tmp_path / "tuned.safetensors")
    again = AttentionVGG16(num_classes=0)
    assert again.load_vgg16(tmp_path / "tuned.safetensors") == []
    assert fingerprint(again) == fingerprint(tuned)
