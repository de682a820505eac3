import sys
import warnings

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from sketch_perceptual.backbone import AttentionVGG16
from sketch_perceptual.errors import InputError
from sketch_perceptual.images import to_tensor
from sketch_perceptual.losses import (
    LOSSES,
    ImageLoss,
    PerceptualLoss,
    PixelLoss,
    StyleLoss,
    build_loss,
    check_loss,
    gram_matrix,
    total_variation,
    typical_distance,
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """What `backbone` is for each loss: a tuned folder, plain VGG-16 weights, nothing."""
    folder = tmp_path_factory.mktemp("backbones")
    torch.manual_seed(0)
    AttentionVGG16(pool_after_attention=True, num_classes=0).save_pretrained(folder / "tuned")
    plain = AttentionVGG16("none", num_classes=0)
    plain.save_pretrained(folder / "plain")
    save_file(plain.state_dict(), folder / "trunk.safetensors")
    trunk = str(folder / "trunk.safetensors")
    return {"attention_vgg": str(folder / "tuned"), "vgg": trunk, "lpips": trunk, "pixel": None, "folder": folder}


def images(seed=0, size=64, n=2):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_keeps_the_contract(name, sources):
    loss = build_loss(name, backbone=sources[name])
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


class Wrong(ImageLoss):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, images, target):
        return self.value(images, target)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda x, y: (x - y).abs().mean(), r"one number an image"),
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


def test_known_answer_by_hand(sources):
    backbone = AttentionVGG16.from_pretrained(sources["attention_vgg"])
    layers, weights = ["relu1_2", "relu3_1"], [2.0, 0.5]
    x, y = images(0), images(1)
    a, b = backbone.taps(x, layers), backbone.taps(y, layers)
    l1 = sum(w * (a[n] - b[n]).abs().mean((1, 2, 3)) for n, w in zip(layers, weights, strict=True))
    l2 = sum(w * (a[n] - b[n]).square().mean((1, 2, 3)) for n, w in zip(layers, weights, strict=True))
    torch.testing.assert_close(PerceptualLoss(backbone, layers, weights)(x, y), l1)
    torch.testing.assert_close(PerceptualLoss(backbone, layers, weights, distance="l2")(x, y), l2)
    torch.testing.assert_close(PixelLoss()(x, y), (x - y).abs().mean((1, 2, 3)))


def test_typical_distance_makes_losses_comparable(sources):
    few = list(images(n=3))
    loss = build_loss("vgg", backbone=sources["vgg"])
    a, b, c = images(n=3).split(1)
    expected = (loss(a, b) + loss(b, c) + loss(c, a)) / 3
    assert typical_distance(loss, few) == pytest.approx(float(expected))
    assert typical_distance(lambda x, y: 100 * loss(x, y), few) == pytest.approx(100 * float(expected))
    assert typical_distance(loss, few[:1]) == 1.0


def test_lpips_is_the_packages_own_arithmetic(sources):
    import lpips

    ours = build_loss("lpips", backbone=sources["lpips"])
    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    theirs.load_state_dict(ours.net.state_dict())
    x, y = images(0), images(1)
    torch.testing.assert_close(ours(x, y), theirs.eval()(x, y).flatten())
    trunk = AttentionVGG16("none", num_classes=0)
    trunk.load_vgg16(sources["lpips"])
    assert torch.equal(ours.net.net.slice3[1].weight, trunk.features[10].weight)


def test_no_torchvision_warning_reaches_the_user(sources):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in LOSSES:
            build_loss(name, backbone=sources[name])


def test_resolution_shrinks_and_never_enlarges():
    loss, x, y = PixelLoss(resolution=32), images(0, 128), images(1, 128)
    assert not torch.allclose(loss(x, y), PixelLoss()(x, y), rtol=0.05)
    assert torch.equal(loss(x[..., :32, :48], y[..., :32, :48]), PixelLoss()(x[..., :32, :48], y[..., :32, :48]))
    assert loss._shrink(torch.zeros(1, 3, 64, 96)).shape == (1, 3, 32, 48)


def test_features_ignore_an_outer_autocast_and_follow_their_own_dtype(sources):
    loss = build_loss("vgg", backbone=sources["vgg"], layers=["relu1_2"])
    seen = []
    loss.backbone.features[0].register_forward_hook(lambda _, inputs, output: seen.append(output.dtype))
    x, y = images(0), images(1)
    plain = loss(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(x.bfloat16().float(), y), loss(x.bfloat16(), y))
        assert torch.equal(loss(x, y), plain)
    assert set(seen) == {torch.float32}
    halved = loss.to(torch.bfloat16)(x, y)
    assert seen[-1] == torch.bfloat16
    assert halved.dtype == torch.float32
    torch.testing.assert_close(halved, plain, rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), images(), "images must be floating point .* torch.uint8"),
        (torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8), r"RGB of shape \(B, 3, H, W\), got \(1, 1, 8, 8\)"),
        (torch.zeros(3, 8, 8), torch.zeros(3, 8, 8), r"got \(3, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 9), "one shape"),
        (torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 255.0), r"must lie in \[-1, 1\], got 255 to 255"),
        (torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), torch.nan), r"must lie in \[-1, 1\], got nan"),
    ],
)
def test_wrong_images_are_named(x, y, message):
    with pytest.raises(InputError, match=message):
        PixelLoss()(x, y)


def test_one_number_whatever_the_pictures_came_as():
    levels = torch.randint(0, 256, (2, 20, 24, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pil = [Image.fromarray(array.numpy()) for array in levels]
    unit = [array.permute(2, 0, 1) / 255 for array in levels]
    pairs = [pil, list(levels), [array.numpy() for array in levels], unit]
    values = [PixelLoss()(*(to_tensor(image)[None] for image in pair)) for pair in pairs]
    values.append(PixelLoss()(*(2 * image[None] - 1 for image in unit)))
    torch.testing.assert_close(torch.cat(values), values[0].expand(5))


def test_both_images_in_zero_one_is_a_warning():
    with pytest.warns(UserWarning, match=r"both lie in \[0, 1\]"):
        PixelLoss()(images(0).abs(), images(1).abs())


def test_a_prediction_that_is_not_finite_passes_through():
    x = images(0)
    x[1] = torch.nan
    value = PixelLoss()(x, images(1))
    assert torch.isfinite(value[0])
    assert torch.isnan(value[1])


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
        ("my_losses:half",): "must return one number an image",
        ("my_losses:Nope",): "cannot be imported",
        ("nowhere:Mine",): "cannot be imported .*PYTHONPATH",
        ("ssim",): "no perceptual loss 'ssim': choose attention_vgg, vgg, pixel, lpips",
        ("attention_vgg", plain): "score it with --perceptual_loss vgg",
        ("vgg", sources["attention_vgg"]): "score it with --perceptual_loss attention_vgg",
        ("pixel", plain): "does not take these options, backbone",
    }
    for (name, *backbone), message in cases.items():
        with pytest.raises(InputError, match=message):
            build_loss(name, backbone=backbone[0] if backbone else None)


def test_an_entry_point_is_found_by_its_name(monkeypatch):
    class Point:
        name = "mine"

        def load(self):
            return PixelLoss

    monkeypatch.setattr("sketch_perceptual.losses.entry_points", lambda group: [Point()])
    assert isinstance(build_loss("mine"), PixelLoss)


def test_untrained_attention_is_said(sources):
    with pytest.warns(UserWarning, match="untrained and random"):
        build_loss("attention_vgg", backbone=sources["vgg"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distance": "cosine"}, "l1"),
        ({"resolution": 8}, "at least 16"),
        ({"layer_weights": [1.0]}, "1 layer_weights for 4 layers"),
        ({"layers": ["conv1"]}, "distinct names"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        PerceptualLoss(AttentionVGG16("none", num_classes=0), **options)


def test_the_style_loss_keeps_the_contract_and_sees_no_place(sources):
    loss = StyleLoss(sources["attention_vgg"], layers=["relu1_2", "relu2_2"])
    check_loss(loss, "style")
    x = images(0)
    mirrored = StyleLoss(AttentionVGG16("none", num_classes=0), layers=["relu1_1"])
    weight = mirrored.backbone.features[0].weight
    weight.data = weight.mean(3, True).expand(-1, -1, -1, 3)
    assert float(mirrored(x, x.flip(3)).max()) == pytest.approx(0, abs=1e-9)  # a Gram matrix forgets where things are
    assert float(mirrored(x, images(1)).min()) > 1e-9


def test_gram_matrices_and_total_variation_have_known_answers():
    features = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]])  # 2 channels of 1 x 2 pixels
    assert torch.equal(gram_matrix(features), torch.tensor([[[5.0, 11.0], [11.0, 25.0]]]) / 4)
    assert gram_matrix(features.half()).dtype == torch.float32
    stripes = torch.tensor([[[[1.0, -1.0], [1.0, -1.0]]]])
    assert total_variation(stripes).tolist() == [4.0]
    assert total_variation(torch.full((2, 3, 4, 5), 0.7)).tolist() == [0, 0]


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
def test_style_is_finite_on_blank_pages(sources, value):
    loss = StyleLoss(sources["vgg"])
    page, target = torch.full((1, 3, 32, 32), value, requires_grad=True), torch.full((1, 3, 32, 32), -value)
    loss(page, target).sum().backward()
    assert page.grad.isfinite().all()
    assert loss(page, page).item() == 0


@pytest.mark.parametrize("name", ["attention_vgg", "vgg"])
def test_a_network_that_is_loaded_keeps_only_what_the_loss_reads(tmp_path, name):
    network = AttentionVGG16("cbam" if name == "attention_vgg" else "none", True, num_classes=3, head="linear")
    network.save_pretrained(tmp_path)
    loss = build_loss(name, backbone=str(tmp_path), layers=["relu2_2", "relu1_2"])
    assert loss.backbone.last_layer == "relu2_2"
    assert not list(loss.backbone.classifier.parameters())
    whole = PerceptualLoss(network, ["relu2_2", "relu1_2"])
    assert whole.backbone is network
    torch.testing.assert_close(loss(images(0), images(1)), whole(images(0), images(1)), rtol=0, atol=0)
