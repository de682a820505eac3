"""Johnson's image transformation network."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .hub_model import HubModel
from .settings import check_settings, integer, one_of

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "instance": lambda channels: nn.InstanceNorm2d(channels, affine=True),
    "batch": nn.BatchNorm2d,
}
UPSAMPLING = ("transposed", "resize")
STRIDE = 4  # of the residual blocks
SMALLEST = 8  # pixels a side; the widest kernel pads by four
TANH = 150 / 127.5  # as in the authors' code: beyond 0-255, so that black and white are not at tanh's flat ends


class JohnsonNet(
    nn.Module,
    HubModel,
    library_name="sketch-perceptual",
    tags=["sketch", "style-transfer", "image-to-image"],
):
    """Maps photos (B, 3, H, W) in [-1, 1] to pictures of the same size, in [-1.18, 1.18].

    9x9 convolution to 32 channels, two of 3x3 and stride 2 to 64 and 128, five residual blocks, two steps up, 9x9 to
    RGB, scaled tanh; reflection padding (Johnson et al. 2016, supplement, table 1).

    Args:
        norm: "instance" (the authors' code) or "batch" (their paper), which depends on the rest of a batch.
        upsampling: "transposed" convolutions, or "resize", nearest neighbours and a convolution, without checkerboard.
        width: channels of the first layer.
    """

    noun = "style network"
    usage = """from PIL import Image

from sketch_perceptual.commands.stylize import load_johnson, stylize

photo = Image.new("RGB", (300, 200), "skyblue")  # any picture, any size
stylize(load_johnson("{source}"), [photo])[0].save("sketch.png")"""
    rules: ClassVar = {"norm": one_of(*NORMS), "upsampling": one_of(*UPSAMPLING), "width": integer(1)}

    def __init__(self, norm: str = "instance", upsampling: str = "transposed", width: int = 32):
        super().__init__()
        check_settings(self.rules, {"norm": norm, "upsampling": upsampling, "width": width})

        def layer(convolution: nn.Module, channels: int) -> list[nn.Module]:
            return [convolution, NORMS[norm](channels), nn.ReLU(inplace=True)]

        def up(channels: int, width: int) -> list[nn.Module]:
            if upsampling == "resize":
                return [nn.Upsample(scale_factor=2), *layer(_conv(channels, width, 3), width)]
            return layer(nn.ConvTranspose2d(channels, width, 3, 2, padding=1, output_padding=1), width)

        self.layers = nn.Sequential(
            *layer(_conv(3, width, 9), width),
            *layer(_conv(width, 2 * width, 3, 2), 2 * width),
            *layer(_conv(2 * width, 4 * width, 3, 2), 4 * width),
            *(_Residual(4 * width, NORMS[norm]) for _ in range(5)),
            *up(4 * width, 2 * width),
            *up(2 * width, width),
            _conv(width, 3, 9),
        )

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        bottom, right = (max(SMALLEST, -(-side // STRIDE) * STRIDE) - side for side in (height, width))
        x = F.pad(images, (0, right, 0, bottom), mode="replicate")
        return torch.tanh(self.layers(x)[..., :height, :width]) * TANH

    @contextmanager
    def kept_statistics(self) -> Iterator[None]:
        """Use the statistics of the batch in batch norm, as in training, without updating the running statistics."""
        norms = [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.track_running_stats = False
        try:
            yield
        finally:
            for norm in norms:
                norm.track_running_stats = True


def settled(network: JohnsonNet, images: Tensor) -> JohnsonNet:
    """Return the network with instance norm replaced by batch norm, with the statistics of `images` (B, 3, H, W).

    With the parts of one large image, all of its parts are normalised alike.
    """
    if network.settings["norm"] == "batch":
        return network
    twin = JohnsonNet(**network.settings | {"norm": "batch"}).to(images.device)
    twin.load_state_dict(network.state_dict(), strict=False)  # instance norm has no running statistics
    for module in twin.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # only the statistics of these images
    twin.train()(images)
    return twin.eval()


class _Residual(nn.Module):
    def __init__(self, channels: int, norm):
        super().__init__()
        self.layers = nn.Sequential(
            _conv(channels, channels, 3),
            norm(channels),
            nn.ReLU(inplace=True),
            _conv(channels, channels, 3),
            norm(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def _conv(channels: int, width: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2, padding_mode="reflect")


def load_johnson(source: str | Path) -> JohnsonNet:
    """Load a network from a folder or Hub id written by `save_pretrained`, in eval mode; InputError."""
    return JohnsonNet.from_pretrained(source)
