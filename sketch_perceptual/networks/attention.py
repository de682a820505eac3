"""Channel and spatial attention (Woo et al. 2018, CBAM) as the sketch paper uses it: two gates, no batch norm."""

import torch
from torch import Tensor, nn

from ..errors import InputError


class ChannelAttention(nn.Module):
    """M_c(x) = sigmoid(W1 W0 avg(x) + W1 W0 max(x)): (B, C, H, W) -> (B, C, 1, 1) in (0, 1).

    Woo et al. 2018, section 3.1; Seo 2025, equation 2. `channels` must be at least `reduction`.
    """

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        if not 1 <= reduction <= channels:
            raise InputError(f"`reduction` must lie between 1 and the {channels} channels, got {reduction}")
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, channels // reduction, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(channels // reduction, channels, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        average, maximum = x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
        return torch.sigmoid(self.mlp(average) + self.mlp(maximum))


class SpatialAttention(nn.Module):
    """M_s(x) = sigmoid(conv_kxk([avg over channels; max over channels])): (B, C, H, W) -> (B, 1, H, W) in (0, 1).

    Woo et al. 2018, section 3.2; Seo 2025, equation 1. `kernel` is odd, so that the map keeps its size.
    """

    def __init__(self, kernel: int = 7):
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise InputError(f"`spatial_kernel` must be odd and positive, got {kernel}")
        self.conv = nn.Conv2d(2, 1, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.conv(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)))


class CBAM(nn.Module):
    """Channel, then spatial attention, each multiplying its input: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, reduction: int = 16, spatial_kernel: int = 7):
        super().__init__()
        self.channel = ChannelAttention(channels, reduction)
        self.spatial = SpatialAttention(spatial_kernel)

    def start_open(self) -> None:
        """Initialise all gates to one half for any input, so that the output is a quarter of the input."""
        nn.init.zeros_(self.channel.mlp[2].get_parameter("weight"))
        nn.init.zeros_(self.spatial.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.channel(x)
        return x * self.spatial(x)
