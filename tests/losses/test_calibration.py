import pytest
import torch
from loss_backbones import images, make_sources

from sketch_perceptual.errors import InputError
from sketch_perceptual.losses import LOSSES, PerceptualLoss, build_loss, calibrate, calibration, soft_distance
from sketch_perceptual.networks.backbone import AttentionVGG16


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return make_sources(tmp_path_factory.mktemp("backbones"))


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


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"paper_l1"}))  # which has no unit
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
    with pytest.raises(InputError, match="`calibration` must be for each layer a positive softening"):
        AttentionVGG16("none", num_classes=0, calibration=wrong)
