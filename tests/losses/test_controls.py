import pytest
import torch
from loss_backbones import images, make_sources

from sketch_perceptual.losses import build_loss
from sketch_perceptual.networks.backbone import AttentionVGG16


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return make_sources(tmp_path_factory.mktemp("backbones"))


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
