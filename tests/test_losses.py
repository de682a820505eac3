import sys
import warnings

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from sketch_perceptual.data.images import to_tensor
from sketch_perceptual.errors import InputError
from sketch_perceptual.losses import (
    LOSSES,
    ImageLoss,
    PerceptualLoss,
    PixelLoss,
    StyleLoss,
    build_loss,
    calibrate,
    calibration,
    check_loss,
    gram_matrix,
    soft_distance,
    total_variation,
)
from sketch_perceptual.networks.backbone import AttentionVGG16


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


def test_the_papers_words_have_a_known_answer(sources):
    backbone = AttentionVGG16.from_pretrained(sources["attention_vgg"])
    layers, weights = ["relu1_2", "relu3_1"], [2.0, 0.5]
    x, y = images(0), images(1)
    a, b = backbone.taps(x, layers), backbone.taps(y, layers)
    l1 = sum(w * (a[n] - b[n]).abs().mean((1, 2, 3)) for n, w in zip(layers, weights, strict=True))
    l2 = sum(w * (a[n] - b[n]).square().mean((1, 2, 3)) for n, w in zip(layers, weights, strict=True))
    literal = PerceptualLoss(backbone, layers, weights, normalization="none", distance="l1")
    torch.testing.assert_close(literal(x, y), l1)
    torch.testing.assert_close(PerceptualLoss(backbone, layers, weights, normalization="none")(x, y), l2)
    assert backbone.calibration == {}
    torch.testing.assert_close(PixelLoss()(x, y), (x - y).abs().mean((1, 2, 3)) / PixelLoss.TYPICAL)


def test_the_distance_has_a_known_answer(sources):
    backbone = AttentionVGG16.from_pretrained(sources["attention_vgg"])
    backbone.calibration = {
        "relu1_2": {"softening": 3.0, "distance": 0.5, "gram": 1.0, "weight": 1.0},
        "relu2_1": {"softening": 2.0, "distance": 0.25, "gram": 1.0, "weight": 3.0},
    }
    x, y = images(0), images(1)
    parts = {}
    for name, softening in (("relu1_2", 3.0), ("relu2_1", 2.0)):
        a, b = (backbone.taps(image, [name])[name] for image in (x, y))
        units = [f / (f.square().sum(1, keepdim=True) + softening**2).sqrt() for f in (a, b)]
        parts[name] = (units[0] - units[1]).square()
    first = parts["relu1_2"].sum(1).mean((1, 2)) / 0.5
    second = parts["relu2_1"].sum(1).mean((1, 2)) / 0.25
    loss = PerceptualLoss(backbone, ["relu1_2", "relu2_1"])
    torch.testing.assert_close(loss(x, y), first / 4 + second * 3 / 4)
    torch.testing.assert_close(loss(x, y, per_layer=True), {"relu1_2": first, "relu2_1": second})
    even = PerceptualLoss(backbone, ["relu1_2", "relu2_1"], [1, 1])
    torch.testing.assert_close(even(x, y), (first + second) / 2)
    torch.testing.assert_close(PerceptualLoss(backbone, ["relu1_2"])(x, y), first)  # learned for two layers


def test_a_map_says_where_two_drawings_differ(sources):
    loss = PerceptualLoss(sources["attention_vgg"])
    x = torch.ones(2, 3, 64, 48)
    y = x.clone()
    y[1, :, 40:60, 30:44] = -1
    places = loss(x, y, spatial=True)
    assert places.shape == (2, 64, 48)
    assert places[0].max() == 0
    assert places[1, 40:60, 30:44].mean() > 3 * places[1, :30].mean()
    torch.testing.assert_close(places.mean((1, 2)), loss(x, y), rtol=0.05, atol=1e-6)
    layers = loss(x, y, spatial=True, per_layer=True)
    torch.testing.assert_close(sum(layers.values()) / 4, places)


def test_grey_images_are_the_same_as_their_rgb(sources):
    loss = PerceptualLoss(sources["attention_vgg"])
    x, y = (images(seed)[:, :1] for seed in (0, 1))
    wide = [image.expand(-1, 3, -1, -1) for image in (x, y)]
    assert torch.equal(loss(x, y), loss(*wide))
    assert torch.equal(loss(x, wide[1]), loss(*wide))


def test_a_soft_distance_ignores_what_is_weak():
    strong, weak = 100 * torch.rand(1, 8, 4, 4), 1e-3 * torch.rand(1, 8, 4, 4)
    zero = torch.zeros_like(weak)
    assert float(soft_distance(weak, zero, 1.0).max()) < 1e-4
    torch.testing.assert_close(soft_distance(strong, zero, 1.0), torch.ones(1, 4, 4), rtol=0.01, atol=0)
    assert float(soft_distance(strong, strong, 1.0).abs().max()) == 0


@pytest.mark.parametrize("change", [0.1, 10.0])
def test_a_soft_distance_and_its_gradient_are_those_of_soft_unit_vectors(change):
    draw = torch.Generator().manual_seed(0)
    target = 100 * torch.rand(2, 16, 5, 4, generator=draw)
    f = (target + change * torch.rand(target.shape, generator=draw)).requires_grad_()
    units = [x / (x.square().sum(1, keepdim=True) + 30.0**2).sqrt() for x in (f.double(), target.double())]
    expected = (units[0] - units[1]).square().sum(1)
    found = soft_distance(f, target, 30.0)
    torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-6)
    gradients = [torch.autograd.grad(x.sum(), f)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3 * float(gradients[1].abs().max()))


@pytest.mark.parametrize("name", LOSSES)
def test_unrelated_drawings_are_one_unit_for_every_loss(name, sources):
    drawings = calibration.reference_drawings()
    loss = build_loss(name, backbone=sources[name])
    with torch.no_grad():
        assert float(calibration.unrelated(loss, drawings)) == pytest.approx(1, abs=0.02)
        assert float(loss(drawings[:2], drawings[:2]).max()) == 0


def test_the_unit_does_not_depend_on_the_users_images(sources):
    """One drawing, twins, a blank page: nothing about a loss follows from them."""
    losses = [PerceptualLoss(sources["attention_vgg"]) for _ in range(2)]
    page = torch.ones(4, 3, 32, 32)
    losses[1](page, page)
    x, y = images(0), images(1)
    assert torch.equal(losses[0](x, y), losses[1](x, y))
    assert losses[0].calibration == losses[1].calibration


def test_a_calibration_is_measured_once_and_saved_with_the_backbone(sources, tmp_path, monkeypatch):
    backbone = AttentionVGG16.from_pretrained(sources["attention_vgg"])
    measured = calibrate(backbone, ["relu1_2", "relu3_3"])
    backbone.save_pretrained(tmp_path)
    monkeypatch.setattr(calibration, "reference_drawings", lambda: pytest.fail("measured again"))
    again = AttentionVGG16.from_pretrained(tmp_path)
    assert again.calibration == measured == calibrate(again, ["relu3_3"])
    assert set(again.truncate("relu2_1").calibration) == {"relu1_2"}


def test_other_weights_need_another_calibration(sources):
    backbone = AttentionVGG16("none", num_classes=0)
    calibrate(backbone, ["relu1_2"])
    backbone.load_vgg16(sources["vgg"])
    assert backbone.calibration == {}


@pytest.mark.parametrize(
    "wrong",
    [
        3,
        {"relu9_9": {"softening": 1, "distance": 1, "gram": 1}},
        {"relu1_1": {"softening": 0, "distance": 1, "gram": 1}},
        {"relu1_1": {"softening": 1, "distance": 1, "gram": 1, "weight": -1}},
        {"relu1_1": None},
    ],
)
def test_a_calibration_that_is_none_is_named(wrong):
    with pytest.raises(InputError, match="calibration must give each layer"):
        AttentionVGG16("none", num_classes=0, calibration=wrong)


def test_lpips_is_the_packages_own_arithmetic(sources):
    import lpips

    ours = build_loss("lpips", backbone=sources["lpips"])
    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    theirs.load_state_dict(ours.net.state_dict())
    x, y = images(0), images(1)
    torch.testing.assert_close(ours(x, y) * ours.typical, theirs.eval()(x, y).flatten())
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
        (torch.zeros(1, 4, 8, 8), torch.zeros(1, 3, 8, 8), r"\(B, 1, H, W\) if grey, got \(1, 4, 8, 8\)"),
        (torch.zeros(3, 8, 8), torch.zeros(3, 8, 8), r"got \(3, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 9), "one size"),
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


def test_images_in_zero_one_are_a_warning_and_white_paper_is_none():
    with pytest.warns(UserWarning, match=r"both span \[0, 1\]"):
        PixelLoss()((images(0) + 1) / 2, (images(1) + 1) / 2)
    paper, pencil = torch.ones(1, 3, 32, 32), torch.full((1, 3, 32, 32), 0.4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PixelLoss()(paper, pencil)
        PixelLoss()(paper, paper)


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
        build_loss("attention_vgg", backbone=sources["vgg"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distance": "cosine"}, "l1"),
        ({"distance": "l1"}, "normalization"),
        ({"normalization": "unit"}, "soft"),
        ({"layer_weights": [1.0, -1.0, 1.0, 1.0]}, "negative"),
        ({"layer_weights": [0.0] * 4}, "all 0"),
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


def test_no_layer_drowns_the_others_in_a_style(sources):
    loss = StyleLoss(sources["vgg"])
    grams = loss.grams(calibration.reference_drawings()[::5])
    parts = {}
    for name in grams:
        alone = {other: gram if other == name else torch.zeros_like(gram) for other, gram in grams.items()}
        parts[name] = loss.distance(alone, {other: gram.roll(1, 0) for other, gram in alone.items()})
    torch.testing.assert_close(sum(parts.values()), loss.distance(grams, {n: g.roll(1, 0) for n, g in grams.items()}))
    shares = torch.stack([part.mean() for part in parts.values()])
    assert float(shares.max() / shares.sum()) < 0.5


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
