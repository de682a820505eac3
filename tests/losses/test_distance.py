import pytest
import torch
from loss_backbones import images, make_sources

from sketch_perceptual.errors import InputError
from sketch_perceptual.losses import PerceptualLoss, PixelLoss, build_loss
from sketch_perceptual.networks.backbone import AttentionVGG16


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return make_sources(tmp_path_factory.mktemp("backbones"))


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
    named = build_loss("paper_l1", backbone=backbone, layers=layers, layer_weights=weights)
    assert torch.equal(named(x, y), literal(x, y))
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


def test_weights_learned_for_more_layers_are_not_used():
    shallow = PerceptualLoss(layers=["relu1_2", "relu2_2", "relu3_3"])
    assert set(shallow.layer_weights.values()) == {1 / 3}
    assert len(set(PerceptualLoss().layer_weights.values())) == 4


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
    ("options", "message"),
    [
        ({"distance": "cosine"}, "`distance` must be one of l2, l1, got 'cosine'"),
        ({"distance": "l1"}, '`distance`="l1" needs `normalization`="none"'),
        ({"normalization": "unit"}, "`normalization` must be one of soft, none"),
        ({"layer_weights": [1.0, -1.0, 1.0, 1.0]}, "must not be negative"),
        ({"layer_weights": [0.0] * 4}, "all 0"),
        ({"resolution": 8}, "at least 16"),
        ({"resolution": "64"}, "`resolution` must be an integer of .*, got '64'"),
        ({"resolution": 64.5}, "`resolution` must be an integer of .*, got 64.5"),
        ({"layer_weights": [1.0]}, "1 `layer_weights` for 4 layers"),
        ({"layers": ["conv1"]}, "distinct names"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        PerceptualLoss(AttentionVGG16("none", num_classes=0), **options)
