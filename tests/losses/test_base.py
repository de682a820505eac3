import warnings

import pytest
import torch
from loss_backbones import images, make_sources
from PIL import Image

from sketch_perceptual.data.images import to_tensor
from sketch_perceptual.errors import InputError
from sketch_perceptual.losses import PixelLoss


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return make_sources(tmp_path_factory.mktemp("backbones"))


def test_resolution_shrinks_and_never_enlarges():
    loss, x, y = PixelLoss(resolution=32), images(0, 128), images(1, 128)
    assert not torch.allclose(loss(x, y), PixelLoss()(x, y), rtol=0.05)
    assert torch.equal(loss(x[..., :32, :48], y[..., :32, :48]), PixelLoss()(x[..., :32, :48], y[..., :32, :48]))
    assert loss._shrink(torch.zeros(1, 3, 64, 96)).shape == (1, 3, 32, 48)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), images(), "images must be floating point .* torch.uint8"),
        (torch.zeros(1, 4, 8, 8), torch.zeros(1, 3, 8, 8), r"\(B, 1, H, W\) if grey, got \(1, 4, 8, 8\)"),
        (torch.zeros(3, 8, 8), torch.zeros(3, 8, 8), r"got \(3, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 9), "same size"),
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
