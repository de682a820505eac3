import sys
import warnings

import pytest
import torch
from loss_backbones import images, make_sources
from torch import nn

from sketch_perceptual.errors import InputError
from sketch_perceptual.losses import (
    LOSSES,
    ImageLoss,
    PerceptualLoss,
    PixelLoss,
    ToneLoss,
    build_loss,
    build_losses,
    check_loss,
)
from sketch_perceptual.losses.registry import MeanLoss
from sketch_perceptual.networks.backbone import AttentionVGG16


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return make_sources(tmp_path_factory.mktemp("backbones"))


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_keeps_the_contract(name, sources):
    state = torch.get_rng_state()
    loss = build_loss(name, backbone=sources[name])
    assert torch.equal(torch.get_rng_state(), state)  # a script draws what it draws without the loss
    check_loss(loss, name)
    nn.ModuleList([loss]).train()
    assert not any(module.training for module in loss.modules())
    x, y = images(0).requires_grad_(), images(1).requires_grad_()
    loss(x, y).sum().backward()
    assert y.grad is None
    assert all(p.grad is None for p in loss.parameters())
    first = x.grad.clone()
    x.grad = None
    loss(x, y).sum().backward()
    assert torch.equal(x.grad, first)


def test_several_losses_are_one_by_their_weights(sources):
    loss = build_losses(["attention_vgg", "gram=0.5"], backbone=sources["gram"])
    check_loss(loss, "both")
    one, other = (build_loss(name, backbone=sources["gram"]) for name in ("attention_vgg", "gram"))
    x, y = images(0), images(1)
    torch.testing.assert_close(loss(x, y), (one(x, y) + 0.5 * other(x, y)) / 1.5)
    assert isinstance(build_losses(["pixel=3"]), PixelLoss)
    with_tone = build_losses(["gram", "tone=3"], backbone=sources["gram"], layers=["relu1_2"])
    gram = build_loss("gram", backbone=sources["gram"], layers=["relu1_2"])
    torch.testing.assert_close(with_tone(x, y), (gram(x, y) + 3 * ToneLoss()(x, y)) / 4)


def maps(x, y):
    return (x - y).abs()


@pytest.mark.parametrize("shape", [(-1,), (-1, 1), (-1, 1, 1, 1)])
def test_one_number_an_image_may_have_ones_behind_it(shape):
    def theirs(x, y):
        return maps(x, y).mean((1, 2, 3)).reshape(shape)

    check_loss(theirs, "theirs")
    x, y = images(0), images(1)
    both = MeanLoss([theirs, PixelLoss()], [1, 1])
    torch.testing.assert_close(both(x, y), (maps(x, y).mean((1, 2, 3)) + PixelLoss()(x, y)) / 2)


@pytest.mark.parametrize("wrong", [maps, nn.L1Loss(), nn.L1Loss(reduction="none"), lambda x, y: 0.5])
def test_any_other_value_is_refused(wrong):
    with pytest.raises(InputError, match=r"one number per image, shape \(B,\) or \(B, 1, 1, 1\); got"):
        check_loss(wrong)
    with pytest.raises(InputError, match="one number per image"):
        MeanLoss([wrong], [1])(images(0), images(1))


@pytest.mark.parametrize("weight", ["0", "-1", "x", "nan", "inf"])
def test_the_weight_of_a_loss_is_a_positive_number(weight):
    with pytest.raises(InputError, match=f"the weight of the perceptual loss pixel .* got '{weight}'"):
        build_losses(["pixel", f"pixel={weight}"])


class Wrong(ImageLoss):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, images, target):
        return self.value(images, target)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda x, y: (x - y).abs().mean(), r"one number per image"),
        (lambda x, y: (x - y).double().abs().mean((1, 2, 3)), "float32, not torch.float64"),
        (lambda x, y: (x - y).abs().mean((1, 2, 3)) + 1, "0 on equal images"),
        (lambda x, y: -(x - y).abs().mean((1, 2, 3)), "positive on different"),
        (lambda x, y: (x - y).abs().mean((1, 2, 3)) / 0, "finite"),
        (lambda x, y: (x - y).abs().mean((1, 2, 3)).detach(), "gradient to the images"),
        (lambda x, y: (x - y).abs().mean((1, 2, 3)) * len(x), "each image on its own"),
    ],
)
def test_a_broken_plugin_is_told_what_it_breaks(value, message):
    with pytest.raises(InputError, match=message):
        check_loss(Wrong(value))


def test_a_trainable_plugin_is_refused():
    class Trainable(PixelLoss):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

    with pytest.raises(InputError, match="frozen"):
        check_loss(Trainable())


def test_no_torchvision_warning_reaches_the_user(sources):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in LOSSES:
            build_loss(name, backbone=sources[name])


def test_loss_names_options_and_plugins(tmp_path, monkeypatch, sources):
    (tmp_path / "my_losses.py").write_text(
        "from sketch_perceptual.losses import PixelLoss\n"
        "class Mine(PixelLoss): pass\n"
        "def half(): return lambda x, y: 0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert type(build_loss("my_losses:Mine", backbone=None, layers=None)) is sys.modules["my_losses"].Mine
    plain = str(sources["folder"] / "plain")
    cases = {
        ("my_losses:half",): "must return one number per image",
        ("my_losses:Nope",): "cannot be imported",
        ("nowhere:Mine",): "cannot be imported .*PYTHONPATH",
        ("ssim",): "no perceptual loss 'ssim': choose attention_vgg, vgg, gram, tone, pixel, lpips",
        ("attention_vgg", plain): "the loss for it is vgg",
        ("vgg", sources["attention_vgg"]): "the loss for it is attention_vgg",
        ("pixel", plain): "does not take `backbone`: it takes only `resolution`",
    }
    for (name, *backbone), message in cases.items():
        with pytest.raises(InputError, match=message):
            build_loss(name, backbone=backbone[0] if backbone else None)


@pytest.mark.parametrize(
    ("name", "code", "options", "message"),
    [
        ("range", "assert x.abs().max() <= 1", {}, "from -1.3 to 1.3: AssertionError"),
        ("size", "assert x.shape[-1] >= 64", {"size": 32}, r"\(2, 3, 32, 32\)"),
        ("dtype", "assert x.dtype == torch.float32", {"dtype": torch.bfloat16}, "in torch.bfloat16, .*AssertionError"),
    ],
)
def test_a_plugin_is_tried_as_training_will(tmp_path, monkeypatch, name, code, options, message):
    (tmp_path / f"plugin_{name}.py").write_text(
        f"import torch\nclass Mine:\n    def __call__(self, x, y):\n        {code}\n"
        "        return (x - y).float().abs().mean((1, 2, 3))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=f"plugin_{name}:Mine fails on images of .*{message}"):
        build_loss(f"plugin_{name}:Mine", **options)


def test_a_plugin_that_breaks_while_it_loads_is_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_plugin.py").write_text("1 / 0")
    with pytest.raises(InputError, match=r"broken_plugin:Mine cannot be imported .*ZeroDivisionError"):
        build_loss("broken_plugin:Mine")
    (tmp_path / "unready_plugin.py").write_text("class Mine:\n    def __init__(self): raise OSError('no weights')")
    with pytest.raises(InputError, match="unready_plugin:Mine cannot be built: OSError: no weights"):
        build_loss("unready_plugin:Mine")

    class Point:
        name = "mine"

        def load(self):
            raise ModuleNotFoundError("No module named 'gone'")

    monkeypatch.setattr("sketch_perceptual.losses.registry.entry_points", lambda group: [Point()])
    with pytest.raises(InputError, match=r"loss mine cannot be imported .*No module named 'gone'"):
        build_loss("mine")


def test_an_entry_point_is_found_by_its_name(monkeypatch):
    class Point:
        name = "mine"

        def load(self):
            return PixelLoss

    monkeypatch.setattr("sketch_perceptual.losses.registry.entry_points", lambda group: [Point()])
    assert isinstance(build_loss("mine"), PixelLoss)


def test_untrained_attention_is_said(sources):
    with pytest.warns(UserWarning, match="untrained and random"):
        build_loss("attention_vgg", backbone=sources["vgg"], layers=["relu1_2"])


@pytest.mark.parametrize(("name", "attention"), [("attention_vgg", "cbam"), ("vgg", "none"), ("vgg", "identity")])
def test_a_network_that_is_loaded_keeps_only_what_the_loss_reads(tmp_path, name, attention):
    network = AttentionVGG16(attention, True, num_classes=3, head="linear")
    network.save_pretrained(tmp_path)
    loss = build_loss(name, backbone=str(tmp_path), layers=["relu2_2", "relu1_2"])
    assert loss.backbone.last_layer == "relu2_2"
    assert not list(loss.backbone.classifier.parameters())
    whole = PerceptualLoss(network, ["relu2_2", "relu1_2"])
    torch.testing.assert_close(loss(images(0), images(1)), whole(images(0), images(1)), rtol=0, atol=0)
