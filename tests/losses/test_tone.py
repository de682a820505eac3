import pytest
import torch
from loss_backbones import images

from sketch_perceptual.losses import PixelLoss, ToneLoss


@pytest.mark.parametrize("size", [(64, 64), (20, 12), (5, 3)])
def test_grey_paper_costs_its_difference(size):
    white = torch.ones(2, 3, *size)
    grey = white - torch.tensor([0.1, 0.2]).view(2, 1, 1, 1)
    torch.testing.assert_close(ToneLoss()(grey, white), torch.tensor([0.1, 0.2]) / ToneLoss.TYPICAL)


def test_each_pixel_of_flat_paper_counts_alike_at_any_size():
    white = torch.ones(1, 3, 9, 9)
    corner, inside = white.clone(), white.clone()
    corner[..., 8, 8] = inside[..., 3, 3] = 0.5
    torch.testing.assert_close(ToneLoss()(corner, white), ToneLoss()(inside, white))


def test_tint_counts_and_the_pattern_within_a_square_does_not():
    white = torch.ones(1, 3, 32, 32)
    yellow = white.clone()
    yellow[:, 2] -= 0.3
    torch.testing.assert_close(ToneLoss()(yellow, white), torch.tensor([0.1]) / ToneLoss.TYPICAL)
    rows = torch.ones(1, 3, 32, 32)
    rows[..., ::2, :] = -1
    assert ToneLoss()(rows, rows.mT) == 0
    assert PixelLoss()(rows, rows.mT) > 1


def test_what_it_gives_is_within_the_pixels_difference():
    x, y = images(0), images(1)
    tone, pixel = ToneLoss.TYPICAL * ToneLoss()(x, y), PixelLoss.TYPICAL * PixelLoss()(x, y)
    assert (tone <= pixel).all()
