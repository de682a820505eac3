import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from sketch_perceptual.data.datasets import LabelledImages
from sketch_perceptual.data.images import to_tensor


def saved(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def places(width, height):
    """Column x is red x, row y is green y: a pixel tells where it came from."""
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([columns, rows, 0 * rows], -1).astype(np.uint8))


def images(*pictures, **options):
    names = [f"picture {index}" for index in range(len(pictures))]
    return LabelledImages(pictures, names, [0] * len(pictures), ["a", "b"], **{"resolution": 8, **options})


def fingerprints(data, keys, **options):
    return {
        name: pixels.numpy().tobytes()
        for batch in DataLoader(data, sampler=keys, **options)
        for name, pixels in zip(batch["name"], batch["pixel_values"], strict=True)
    }


def test_draws_follow_from_seed_epoch_and_row_alone_and_leave_the_global_generator():
    data = images(*[places(60, 40)] * 6)
    keys = [(3, index) for index in range(6)]
    alone = fingerprints(data, keys)
    assert len(set(alone.values())) == 6
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    data[0, 0]
    assert torch.equal(before, torch.random.get_rng_state())
    assert fingerprints(data, keys[::-1], batch_size=4, num_workers=2) == alone
    subset = data.select([5, 2]).select([1])
    assert fingerprints(subset, [(3, 0)]) == {"picture 2": alone["picture 2"]}
    for other, epoch in ((data, 4), (images(*data.sources, seed=1), 3)):
        changed = fingerprints(other, [(epoch, index) for index in range(6)])
        assert all(changed[name] != alone[name] for name in alone)


def test_crops_have_every_size_and_place_and_half_are_mirrored():
    data = images(places(240, 240), resolution=16)
    pixels = torch.stack([(data[epoch, 0]["pixel_values"] + 1) * 127.5 for epoch in range(300)])
    across, down = pixels[:, 0, 8], pixels[:, 1, :, 8]
    widths, heights = ((line[:, 11] - line[:, 4]) * 16 / 7 for line in (across, down))
    assert 110 < (widths < 0).sum() < 190 and (heights > 0).all()
    widths = widths.abs()
    areas, ratios = widths * heights / 240**2, widths / heights
    assert 0.07 < areas.min() < 0.12 and 0.9 < areas.max() < 1.02 and 0.4 < areas.median() < 0.65
    assert 0.72 < ratios.min() < 0.8 and 1.25 < ratios.max() < 1.38
    left, right = (across[:, 7:9].mean(1) + side * widths / 2 for side in (-1, 1))
    assert left.min() < 5 and right.max() > 235


@pytest.mark.parametrize("size, corner", [((256, 256), (16, 16)), ((256, 300), (16, 38)), ((310, 256), (43, 16))])
def test_without_augmentation_it_is_the_middle_seven_eighths(size, corner):
    data = images(places(*size), resolution=224)
    data.augment = False
    expected = to_tensor(data.image(0).crop((*corner, corner[0] + 224, corner[1] + 224)))
    assert all(torch.equal(data[epoch, 0]["pixel_values"], expected) for epoch in (0, 7))


@pytest.mark.parametrize("augment", [True, False])
@pytest.mark.parametrize("size", [(90, 20), (20, 90), (1, 90), (90, 1), (1, 1), (500, 3)])
def test_every_shape_becomes_a_square_of_its_own_colours(size, augment):
    data = images(Image.new("RGB", size, (255, 0, 51)))
    data.augment = augment
    expected = torch.tensor([1, -1, 51 / 127.5 - 1])[:, None, None].expand(3, 8, 8)
    for epoch in range(5):
        torch.testing.assert_close(data[epoch, 0]["pixel_values"], expected)


def test_sixteen_bits_keep_their_greys():
    wide = np.tile(np.repeat(np.uint16([20000, 40000]), 32), (64, 1))
    data = images(saved(Image.fromarray(wide), "TIFF"))
    data.augment = False
    pixels = (data[0, 0]["pixel_values"] + 1) * 127.5
    assert pixels[:, 0, [0, 7]].round().tolist() == [[78, 156]] * 3


@pytest.mark.parametrize("background, level", [("white", 1), ("black", -1)])
def test_transparency_shows_the_background(background, level):
    data = images(saved(Image.new("RGBA", (16, 16), (0, 0, 0, 0))), background=background)
    assert (data[0, 0]["pixel_values"] == level).all()
