import pytest
import torch
from timm.layers.cbam import CbamModule

from sketch_perceptual.errors import InputError
from sketch_perceptual.networks.attention import CBAM, ChannelAttention, SpatialAttention


def test_agrees_with_timm_where_both_describe_cbam():
    theirs, ours = CbamModule(64, rd_ratio=1 / 16).eval(), CBAM(64)
    ours.channel.mlp[0].weight.data = theirs.channel.fc1.weight.data
    ours.channel.mlp[2].weight.data = theirs.channel.fc2.weight.data
    ours.spatial.conv.weight.data = theirs.spatial.conv.conv.weight.data  # its fresh batch norm divides by 1 + 5e-6
    x = torch.randn(2, 64, 9, 7)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_gates_by_hand():
    channel = ChannelAttention(2, reduction=1)
    channel.mlp[0].weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(2, 2, 1, 1)
    channel.mlp[2].weight.data = torch.tensor([[1.0, 0.0], [0.0, -1.0]]).view(2, 2, 1, 1)
    x = torch.tensor([[[[1.0, 3.0]], [[0.0, 4.0]]]])  # averages 2 and 2, maxima 3 and 4
    torch.testing.assert_close(channel(x).flatten(), torch.sigmoid(torch.tensor([5.0, -6.0])))
    spatial = SpatialAttention(kernel=1)
    spatial.conv.weight.data = torch.tensor([1.0, 10.0]).view(1, 2, 1, 1)  # average first, then maximum
    torch.testing.assert_close(spatial(x).flatten(), torch.sigmoid(torch.tensor([0.5 + 10.0, 3.5 + 40.0])))


def test_impossible_sizes_are_named():
    with pytest.raises(InputError, match="`spatial_kernel` must be odd and positive, got 4"):
        SpatialAttention(4)
    with pytest.raises(InputError, match="`reduction` must lie between 1 and the 8 channels, got 16"):
        ChannelAttention(8, reduction=16)
