import pytest
import torch
from loss_backbones import images, make_sources

from sketch_perceptual.errors import InputError
from sketch_perceptual.losses import StyleLoss, calibration, check_loss, gram_matrix, total_variation
from sketch_perceptual.networks.backbone import AttentionVGG16


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return make_sources(tmp_path_factory.mktemp("backbones"))


@pytest.fixture(scope="module")
def style(sources):
    return StyleLoss(sources["vgg"])


def test_the_style_loss_keeps_the_contract_and_sees_no_place(sources):
    loss = StyleLoss(sources["attention_vgg"], layers=["relu1_2", "relu2_2"])
    check_loss(loss, "style")
    x = images(0)
    mirrored = StyleLoss(AttentionVGG16("none", num_classes=0), layers=["relu1_1"])
    weight = mirrored.backbone.features[0].weight
    weight.data = weight.mean(3, True).expand(-1, -1, -1, 3)
    assert float(mirrored(x, x.flip(3)).max()) == pytest.approx(0, abs=1e-9)  # a Gram matrix forgets where things are
    assert float(mirrored(x, images(1)).min()) > 1e-9


def test_no_layer_drowns_the_others_in_a_style(style):
    grams = style.grams(calibration.reference_drawings()[::5])
    parts = {}
    for name in grams:
        alone = {other: gram if other == name else torch.zeros_like(gram) for other, gram in grams.items()}
        parts[name] = style.distance(alone, {other: gram.roll(1, 0) for other, gram in alone.items()})
    torch.testing.assert_close(sum(parts.values()), style.distance(grams, {n: g.roll(1, 0) for n, g in grams.items()}))
    shares = torch.stack([part.mean() for part in parts.values()])
    assert float(shares.max() / shares.sum()) < 0.5


def test_gram_matrices_and_total_variation_have_known_answers():
    features = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]])  # 2 channels of 1 x 2 pixels
    assert torch.equal(gram_matrix(features), torch.tensor([[[5.0, 11.0], [11.0, 25.0]]]) / 4)
    assert gram_matrix(features.half()).dtype == torch.float32
    stripes = torch.tensor([[[[1.0, -1.0], [1.0, -1.0]]]])
    assert total_variation(stripes).tolist() == [4.0]
    assert total_variation(torch.full((2, 3, 4, 5), 0.7)).tolist() == [0, 0]
    with pytest.raises(InputError, match=r"at least 2 pixels a side, got \(2, 3, 4, 1\)"):
        total_variation(torch.zeros(2, 3, 4, 1))


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
def test_style_is_finite_on_blank_pages(style, value):
    page, target = torch.full((1, 3, 32, 32), value, requires_grad=True), torch.full((1, 3, 32, 32), -value)
    style(page, target).sum().backward()
    assert page.grad.isfinite().all()
    assert style(page, page).item() == 0
