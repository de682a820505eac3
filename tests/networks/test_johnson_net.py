import pytest
import torch

from sketch_perceptual.errors import InputError
from sketch_perceptual.networks.style_net import JohnsonNet, load_johnson


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return JohnsonNet(width=4).eval()


@pytest.fixture(scope="module")
def model(network, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    network.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("upsampling", ["transposed", "resize"])
@pytest.mark.parametrize("size", [(1, 1), (3, 70), (8, 8), (33, 18), (64, 64)])
def test_the_output_has_the_size_of_the_input(upsampling, size):
    images = torch.rand(2, 3, *size) * 2 - 1
    found = JohnsonNet(upsampling=upsampling, width=4)(images)
    assert found.shape == images.shape
    assert found.abs().max() < 150 / 127.5


def test_the_published_network_has_its_weights():
    network = JohnsonNet()
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.ConvTranspose2d)]
    widths = [m.out_channels for m in convolutions]
    assert widths == [32, 64, 128, *[128] * 10, 64, 32, 3]
    assert [m.kernel_size[0] for m in convolutions] == [9, *[3] * 14, 9]
    assert [m.stride[0] for m in convolutions] == [1, 2, 2, *[1] * 10, 2, 2, 1]
    assert {m.padding_mode for m in convolutions if isinstance(m, torch.nn.Conv2d)} == {"reflect"}
    assert sum(isinstance(m, torch.nn.InstanceNorm2d) for m in network.modules()) == 15
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in JohnsonNet("batch").modules()) == 15


def test_it_loads_as_it_was_saved(network, model):
    images = torch.rand(1, 3, 20, 30) * 2 - 1
    assert torch.equal(load_johnson(model)(images), network(images))
    for source, sentence in (("nowhere/net", "no style network at nowhere/net"), ("tests", "there is no config.json")):
        with pytest.raises(InputError, match=sentence):
            load_johnson(source)
    with pytest.raises(InputError, match="`norm` must be one of instance, batch, got 'layer'"):
        JohnsonNet("layer")


def test_losses_can_be_measured_as_in_training_without_a_trace():
    network, images = JohnsonNet("batch", width=4).train(), torch.rand(2, 3, 16, 16) * 2 - 1
    before = {name: value.clone() for name, value in network.named_buffers()}
    with network.kept_statistics(), torch.no_grad():
        measured = network(images)
    assert len(before) == 45
    assert all(torch.equal(value, before[name]) for name, value in network.named_buffers())
    assert torch.equal(network(images), measured)  # in training, by the batch
    assert not any(torch.equal(value, before[name]) for name, value in network.named_buffers())
